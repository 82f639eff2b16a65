"""From annotated sections to a model."""
