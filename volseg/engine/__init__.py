"""A run: what it is, where it lies, and what happens to each of its blocks."""
