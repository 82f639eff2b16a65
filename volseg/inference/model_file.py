"""The model file that settings name, whatever they name it by."""

from __future__ import annotations

from pathlib import Path

from volseg.config import Predict
from volseg.errors import UserError
from volseg.inference import model


def model_file(settings: Predict) -> Path:
    """The model file to run: the one that ships, that of the settings, or what an ONNX file or package of theirs is made into.

    Raises
    ------
    UserError
        What is named is none, or a network that does not fit; the message says what does not.
    """
    if not settings.model:
        return model.shipped()
    path = Path(settings.model)
    if path.suffix.lower() in (".onnx", ".zip", ".yaml", ".yml") or path.is_dir():
        from volseg.inference.foreign import as_model_file

        return as_model_file(path, settings.outputs, settings.activation)
    if settings.outputs or settings.activation != "auto":
        raise UserError(
            f"predict.outputs and predict.activation describe ONNX files and bioimage.io packages; {path} says itself what "
            "its outputs are: leave them out"
        )
    return path
