"""The commands: options in, results or one line of error out; `commands` lists them, and everything is done by `volseg.api`."""

from volseg.cli.commands import app, main

__all__ = ["app", "main"]
