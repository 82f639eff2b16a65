"""Errors that volseg raises on purpose."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake that its user can mend: one line that says what was wanted, what came and what to do."""


class DamagedFileError(UserError):
    """A file of a run that is missing, cut short or otherwise not what was written."""

    def __init__(self, path: str, key: str, state: str) -> None:
        super().__init__(
            f"{path}/{key} {state}; give the command that made the run again to make it anew, or begin again with --overwrite"
        )
        self.path, self.key = path, key

    def __reduce__(self) -> tuple:
        return DamagedFileError, (self.path, self.key, "is damaged")


class OutOfMemoryError(UserError):
    """What was to be computed at once does not fit the memory of the device or the machine."""


class IncompleteRunError(UserError):
    """Some blocks could not be done; the rest is kept, and the same command goes on from there."""
