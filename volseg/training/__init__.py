"""From annotated sections to a model.

`init` and `suggest` look at volumes and runs, and need nothing beyond the base install.
"""

from volseg.system import require


def require_extra() -> None:
    """Goes on only where the packages are installed with which volseg learns: call it before the imports that need them."""
    require("torch", "segmentation_models_pytorch", "optuna", "matplotlib", "tomli_w", extra="train")
