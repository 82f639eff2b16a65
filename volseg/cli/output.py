"""How commands tell things: results on standard output, as text or JSON; all else on standard error and in a log file."""

from __future__ import annotations

import functools
import json
import logging
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from volseg import __version__
from volseg.config import Config, origins
from volseg.errors import UserError
from volseg.progress import LOGGER, LineFormatter, Progress, Silent, terminal_progress

EXIT_INTERRUPTED = 130  # after Ctrl-C


@dataclass(frozen=True)
class Output:
    """How the command under way tells things: see the help of the options of these names."""

    json: bool = False
    verbose: bool = False
    quiet: bool = False
    log_file: str = ""


_CURRENT: ContextVar[Output] = ContextVar("output", default=Output())  # noqa: B039  it is frozen


def _every_command(
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print the log, with times and tracebacks, in place of progress.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors alone.")] = False,
    log_file: Annotated[str, typer.Option("--log-file", metavar="FILE", help="Add the log to this file.")] = "",
) -> None:
    """The options that every command takes."""


class Group(TyperGroup):
    """Commands each of which takes the options of `Output`, too."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        app = typer.Typer(add_completion=False)
        app.command()(_every_command)
        for name, command in self.commands.items():
            command.params += [option for option in typer.main.get_command(app).params if option.name != "help"]
            command.callback = _telling(name, command.callback)
            command.invoke = functools.partial(_refuse_empty, command.invoke)  # type: ignore[method-assign]


def _refuse_empty(invoke: Callable[[typer.Context], Any], context: typer.Context) -> Any:
    """The command, unless it is given an option or an argument that is empty: what ``--roi "$REGION"`` is when that was not
    set, and would do the whole volume.
    """
    for parameter in context.command.params:
        name, value = parameter.name or "", context.params.get(parameter.name or "")
        if "" in (value if isinstance(value, list | tuple) else [value]):
            source = context.get_parameter_source(name)
            if source and source.name == "COMMANDLINE":
                option = parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.metavar or name.upper()
                raise UserError(
                    f"{option} is empty; give it a value or leave it out (is a variable of the shell not set?)"
                )
    return invoke(context)


def _telling(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The command with that name, within which things are told as its options want it."""

    @functools.wraps(function)
    def call(*args: Any, **values: Any) -> Any:
        with _told(Output(*(values.pop(option) for option in Output.__dataclass_fields__))):
            return function(*args, **values)

    return call


@contextmanager
def _told(output: Output) -> Iterator[None]:
    if output.quiet and output.verbose:
        raise UserError("--quiet and --verbose are opposites; leave out one of them")
    LOGGER.disabled = False  # a library that configures logging may have switched off the loggers that there were
    before, level, handlers = _CURRENT.set(output), LOGGER.level, _handlers(output)
    try:
        if handlers:
            LOGGER.setLevel(logging.DEBUG)
        for handler in handlers:
            handler.setFormatter(LineFormatter())
            LOGGER.addHandler(handler)
        LOGGER.info("volseg %s: %s", __version__, shlex.join(sys.argv))
        yield
        LOGGER.debug("ended")
    except typer.Exit:
        raise
    except BaseException as error:
        LOGGER.debug("ended by %s", type(error).__name__, exc_info=True)
        raise
    finally:
        for handler in handlers:
            LOGGER.removeHandler(handler)
            handler.close()
        LOGGER.setLevel(level)
        _CURRENT.reset(before)


def _handlers(output: Output) -> list[logging.Handler]:
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)] if output.verbose else []
    if output.log_file:
        try:
            handlers.append(logging.FileHandler(output.log_file, encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"cannot write the log file {output.log_file}: {error.strerror or error}; give --log-file a file in a folder "
                "that exists"
            ) from None
    return handlers


# ---------------------------------------------------------------- what commands call


def settings_page(config: Config, layers: list[tuple[str, dict]]) -> str:
    """All settings as a config file; what is no default has a comment that says which layer it comes from.

    >>> print(settings_page(Config(), []).split("[stitch]")[1].splitlines()[1])
    seed = 0.6
    """
    origin, lines = origins(layers), []
    for section, values in config.model_dump(mode="json").items():
        lines += ["", f"[{section}]"]
        for key, value in values.items():
            plain = value is None or (section, key) == ("train", "data")  # no TOML value, and tables
            line = f"# {key} is {_toml(value) if value else 'not set'}" if plain else f"{key} = {_toml(value)}"
            where = origin.get((section, key))
            lines.append(f"{line:<40}  # {where}" if where else line)
    return "\n".join(lines[1:])


def _toml(value: Any) -> str:
    """A plain value as TOML, on one line.

    >>> _toml({"queue": "gpu", "worker_options": {"nthreads": 2}})
    '{"queue" = "gpu", "worker_options" = {"nthreads" = 2}}'
    """
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(key)} = {_toml(one)}' for key, one in value.items())}}}"
    return f"[{', '.join(map(_toml, value))}]" if isinstance(value, list) else json.dumps(value)


def emit(text: str, plain: Any) -> None:
    """The result of a command, on standard output: as text, or ``plain`` as JSON."""
    typer.echo(json.dumps(plain, indent=1, default=str) if _CURRENT.get().json else text)


def wants_json() -> bool:
    """Whether the result is to be JSON, so that nothing else may stand on standard output."""
    return _CURRENT.get().json


def note(text: str) -> None:
    """Something worth knowing beside the result, on standard error."""
    LOGGER.info(text)
    if not (_CURRENT.get().quiet or _CURRENT.get().verbose):
        typer.echo(f"volseg: {text}", err=True)


def say(text: str) -> None:
    """A line about work under way: on standard output, or on standard error where JSON stands there."""
    LOGGER.info(text)
    if not (_CURRENT.get().quiet or _CURRENT.get().verbose):
        typer.echo(text, err=_CURRENT.get().json)


@contextmanager
def shown(stopped: str) -> Iterator[Progress]:
    """The progress of work; Ctrl-C ends it with what is said then."""
    silent = _CURRENT.get().quiet or _CURRENT.get().verbose
    progress: Progress = Silent() if silent else terminal_progress()
    try:
        yield progress
    except KeyboardInterrupt:
        typer.echo(f"volseg: stopped; {stopped}", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    finally:
        progress.stop()
