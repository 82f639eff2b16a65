"""Errors that volseg raises on purpose."""

from __future__ import annotations


def printable(text: str) -> str:
    """``text`` with its control characters written out: names of files must not steer a terminal.

    >>> printable("a\\x1b[31m.zarr")
    'a\\\\x1b[31m.zarr'
    """
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


class UserError(ValueError):
    """A mistake that its user can mend: one line that says what was wanted, what came and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(str(message)))


class DamagedFileError(UserError):
    """Files of a run that are missing, cut short or otherwise not what was written; ``keys`` below its folder ``path``."""

    def __init__(self, path: str, keys: str | tuple[str, ...], state: str) -> None:
        self.path, self.state = path, state
        self.keys = (keys,) if isinstance(keys, str) else tuple(keys)
        more = f" and {len(self.keys) - 1} more" if len(self.keys) > 1 else ""
        super().__init__(
            f"{path}/{self.keys[0]}{more} {state}; volseg repair makes it anew in a finished run, the command that began it in "
            "an unfinished one, and --overwrite begins again"
        )

    def __reduce__(self) -> tuple:
        return DamagedFileError, (self.path, self.keys, self.state)


class OutOfMemoryError(UserError):
    """What was to be computed at once does not fit the memory of the device or the machine."""


class IncompleteRunError(UserError):
    """Some blocks could not be done; the rest is kept, and the same command goes on from there."""
