"""From annotated sections to a model."""

from volseg.system import require

require("torch", "segmentation_models_pytorch", "optuna", "matplotlib", "tomli_w", extra="train")
