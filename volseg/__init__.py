"""volseg: instance labels for electron-microscopy volumes of any size, the same for every cutting into blocks.

The functions here are all there is to call; `volseg.engine.pipeline` is where to start reading. Importing loads neither torch
nor dask: each name comes with its first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from volseg.system import keep_numba_cache, send_nothing

__version__ = "0.1.0"

send_nothing()  # before anything imports onnxruntime
keep_numba_cache()  # before anything imports numba, which looks for a place when it is imported

_MODULES = {
    "calibrate": "evaluation.calibrate",
    "convert": "api",
    "doctor": "planning.doctor",
    "evaluate": "evaluation.evaluate",
    "evaluate_points": "evaluation.detection",
    "export": "api",
    "export_model": "training.package",
    "infer": "api",
    "init": "training.init",
    "open": "api",
    "open_volume": "io.volume",
    "plan": "api",
    "repair": "api",
    "report": "evaluation.run_report",
    "review": "evaluation.review",
    "segment": "api",
    "suggest": "training.suggest",
    "train": "training.start",
    "tune": "training.start",
    "verify": "evaluation.verify",
    "view": "evaluation.view",
    "watershed": "segmentation.watershed",
    "Box": "box",
    "Config": "config",
    "DamagedFileError": "errors",
    "FinishedRun": "engine.finished",
    "IncompleteRunError": "errors",
    "OutOfMemoryError": "errors",
    "Progress": "progress",
    "UserError": "errors",
}
__all__ = [
    "Box", "Config", "DamagedFileError", "FinishedRun", "IncompleteRunError", "OutOfMemoryError", "Progress", "UserError",
    "calibrate", "convert", "doctor", "evaluate", "evaluate_points", "export", "export_model", "infer", "init", "open",
    "open_volume", "plan", "repair", "report", "review", "segment", "suggest", "train", "tune", "verify", "view", "watershed",
]  # fmt: skip

if TYPE_CHECKING:
    from volseg.api import (
        convert,
        export,
        infer,
        open,
        plan,
        repair,
        segment,
    )
    from volseg.box import Box
    from volseg.config import Config
    from volseg.engine.finished import FinishedRun
    from volseg.errors import DamagedFileError, IncompleteRunError, OutOfMemoryError, UserError
    from volseg.evaluation.calibrate import calibrate
    from volseg.evaluation.detection import evaluate_points
    from volseg.evaluation.evaluate import evaluate
    from volseg.evaluation.review import review
    from volseg.evaluation.run_report import report
    from volseg.evaluation.verify import verify
    from volseg.evaluation.view import view
    from volseg.io.volume import open_volume
    from volseg.planning.doctor import doctor
    from volseg.progress import Progress
    from volseg.segmentation.watershed import watershed
    from volseg.training.init import init
    from volseg.training.package import export_model
    from volseg.training.start import train, tune
    from volseg.training.suggest import suggest


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'volseg' has no attribute {name!r}")
    return getattr(import_module(f"volseg.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
