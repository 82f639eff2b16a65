"""Training from Python: `volseg.train` and `volseg.tune`, from a config to a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from volseg.config import Config
from volseg.errors import UserError
from volseg.inference.settings import Settings, settings_of
from volseg.training import require_extra


def train(
    config: str | os.PathLike | Config | dict,
    *,
    settings: Settings = (),
    add: Sequence[str | os.PathLike] = (),
    scribbles: bool | None = None,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Train a model on annotated sections; returns the path of its file.

    A training that was stopped goes on from its last checkpoint.

    Parameters
    ----------
    config : path, Config or dict
        Settings with a ``[train]`` table.
    settings : iterable of str
        Single settings, such as ``"train.steps=600"``.
    add : sequence of path
        Corrected sections to learn from as well, such as folders of `suggest`: training goes on from the last model of this
        config, in a folder of its own, and tells what changed.
    scribbles : bool, optional
        Whether 0 in what is added is what nobody looked at; if not given, the labels tell.
    say : callable, optional
        Called with each line of progress; `print` if not given.
    """
    require_extra()
    if add:
        from volseg.training.corrections import given_settings, train_more

        settings = list(settings)
        chosen = settings_of(config, settings, base={})
        return train_more(chosen, add, say or print, scribbles=scribbles, given=given_settings(settings))
    if scribbles is not None:
        raise UserError("scribbles says how to read what --add gives; give that, or leave it out")
    from volseg.training.train import train

    return train(settings_of(config, settings, base={}), say or print)


def tune(
    config: str | os.PathLike | Config | dict, *, settings: Settings = (), say: Callable[[str], None] | None = None
) -> Path:
    """Search a learning rate and batch size; returns the path of a config for `train` with the best."""
    require_extra()
    from volseg.training.tune import tune

    return tune(settings_of(config, settings, base={}), say or print)
