"""The pages of the documentation that are made of the program itself, and a hook of mkdocs that adds them.

``settings.md`` comes from the classes of `volseg.config` and the comments beside their fields, ``commands.md`` from the command
line, ``tutorial.md`` from the notebook, and benchmarks, contributing and changelog from the files of these names.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import tokenize
from io import StringIO
from pathlib import Path
from typing import Any, get_args, get_origin

import typer
from pydantic_core import PydanticUndefined

from volseg import cli, config

ROOT = Path(__file__).resolve().parents[1]
COPIED = {"benchmarks.md": "benchmarks/README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
TABLES = {
    "input": "What of a volume is read, and how.",
    "predict": "The network: which, on what, in what pieces.",
    "probabilities": "Which channels of a volume of probabilities are what: for `volseg segment` alone.",
    "blocks": "What one task owns. Never changes the labels.",
    "fragments": "From probabilities to basins.",
    "stitch": "From basins to objects. `volseg segment RUN --set stitch.KEY=VALUE` decides anew in seconds.",
    "output": "What is written, and on which grid.",
    "cluster": "Workers and what they may take. Never changes the labels.",
    "train": "For `volseg train`.",
    "tune": "For `volseg tune`.",
}


def generated() -> dict[str, str]:
    """Each generated page by its name."""
    pages = {name: copied(source) for name, source in COPIED.items()}
    return {**pages, "settings.md": settings(), "commands.md": commands(), "tutorial.md": notebook()}


def copied(source: str) -> str:
    """A page of the repository as one of the documentation: links lead where they led, as far as that is a page here."""
    text = (ROOT / source).read_text(encoding="utf-8")
    known = {f: name for name, f in COPIED.items()}

    def link(found: re.Match) -> str:
        words, target = found[1], found[2]
        if "://" in target or target.startswith("#"):
            return found[0]
        place = ((ROOT / source).parent / target.partition("#")[0]).resolve().relative_to(ROOT).as_posix()
        if place.startswith("docs/"):
            return f"[{words}]({place.removeprefix('docs/')})"
        return f"[{words}]({known[place]})" if place in known else words

    return re.sub(r"!?\[([^\]]*)\]\(([^)\s]+)\)", lambda m: "" if m[0].startswith("!") else link(m), text)


def notebook() -> str:
    """The notebook as a page, without what it shows."""
    cells = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text(encoding="utf-8"))["cells"]
    parts = [
        "".join(cell["source"]) if cell["cell_type"] == "markdown" else f"```python\n{''.join(cell['source'])}\n```"
        for cell in cells
    ]
    return "\n\n".join([*parts, "[The notebook](tutorial.ipynb) to run yourself."]) + "\n"


# ---------------------------------------------------------------- settings


def settings() -> str:
    """Every setting: its type, its default, and what its comment says."""
    lines = [
        "# Settings", "",
        "One name each, everywhere: the key in a config file, the field of `volseg.Config`, and `--set SECTION.KEY=VALUE`.",
        "Later ones win: the defaults here, the model file's own values, the config file, `--set`. `volseg settings` prints",
        "them all with where each comes from; `configs/default.toml` is this page as a file to copy from.", "",
        "A key that there is not is refused, with the nearest one that there is.", "",
    ]  # fmt: skip
    for name, field in config.Config.model_fields.items():
        section: Any = field.annotation
        lines += [f"## [{name}] {{#{name}}}", "", TABLES[name], "", *_table(section, name)]
        if name == "train":
            lines += ["### [[train.data]] {#train-data}", "", inspect.getdoc(config.TrainData), ""]
            lines += _table(config.TrainData, "train.data")
    return "\n".join(lines) + "\n"


def _table(section: Any, name: str) -> list[str]:
    told = (
        {**explained().get(name, {}), **comments(section)}
        if "." in name
        else {**comments(section), **explained().get(name, {})}
    )
    rows = [
        f"| `{key}` | {_cell(_type(field.annotation))} | {_cell(_default(field))} | {_cell(told.get(key, ''))} |"
        for key, field in section.model_fields.items()
    ]
    head = ["| key | type | default | what |", "|---|---|---|---|"]
    return ["<div class=keys markdown>", "", *head, *rows, "", "</div>", ""]


def comments(section: Any) -> dict[str, str]:
    """The comment beside each field of a class of settings."""
    source = inspect.getsource(section)
    told: dict[int, str] = {}
    for token in tokenize.generate_tokens(StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith("# fmt"):
            told[token.start[0]] = token.string.lstrip("# ")
    fields = [node for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)]  # type: ignore[attr-defined]
    found = {node.target.id: [told[n] for n in range(node.lineno, node.end_lineno + 1) if n in told] for node in fields}
    return {key: " ".join(parts) for key, parts in found.items()}


def explained() -> dict[str, dict[str, str]]:
    """What ``configs/default.toml`` says of each key, by table."""
    found: dict[str, dict[str, str]] = {}
    table = key = ""
    for line in (ROOT / "configs" / "default.toml").read_text(encoding="utf-8").splitlines():
        if head := re.match(r"(?:# )?\[\[?([\w.]+)\]", line):
            table, key = head[1], ""
            found.setdefault(table, {})
        elif item := re.match(r"(?:# )?(\w+) = (.*)$", line):
            comment = re.search(r"(?<=[\s\]\"])#\s*(.*)$", item[2])
            own = table.removesuffix(".data") if not line.startswith("# ") and table.endswith(".data") else table
            table, key = own, item[1]
            found[table][key] = comment[1] if comment else ""
        elif key and (more := re.match(r"\s+#\s*(.*)$", line)):
            found[table][key] += f" {more[1]}"
    return {table: {key: text for key, text in keys.items() if text} for table, keys in found.items()}


def _type(kind: Any) -> str:
    """A type in a few words: its choices, or numbers and lists of them."""
    if kind is type(None):
        return "not set"
    origin, inner = get_origin(kind), get_args(kind)
    if str(origin).endswith("Literal"):
        return ", ".join(f"`{json.dumps(choice)}`" for choice in inner)
    if hasattr(kind, "__metadata__"):
        return _type(inner[0])
    if origin is dict:
        return "table"
    if origin is tuple:
        each = [_type(one) for one in inner if one is not ...]
        return f"list of {each[0]}" if ... in inner else f"{len(each)} x {each[0]}"
    if inner:
        return " or ".join(dict.fromkeys(_type(one) for one in inner))
    return {"str": "text", "int": "whole number", "float": "number", "bool": "true, false"}.get(kind.__name__, "table")


def _default(field: Any) -> str:
    value = field.default
    if value is PydanticUndefined or value is None:
        return "not set"
    return f"`{json.dumps(value, default=str)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# ---------------------------------------------------------------- commands


def commands() -> str:
    """Every command with its arguments and options, as its help has them."""
    lines = [
        "# Commands", "",
        "Every command takes `--json` (print the result as JSON), `-v` (print the log, with times and tracebacks, in place of",
        "progress), `-q` (print results and errors alone), `--log-file FILE` and `-h`. `volseg --install-completion` completes",
        "commands and options in your shell.", "",
        "Exit codes: 0; 1 where something was done in part, or `verify` and `doctor` found something; 2 for a mistake, in one",
        "line; 130 after Ctrl-C.", "",
    ]  # fmt: skip
    group: Any = typer.main.get_command(cli.app)
    common = {"--json", "--verbose", "--quiet", "--log-file", "--help"}
    for name, command in group.commands.items():
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option" and not common & set(p.opts)]
        words = " ".join(p.metavar or p.name.upper() for p in arguments)
        lines += [
            f"## volseg {name}",
            "",
            f"    volseg {name} {words} [options]",
            "",
            inspect.cleandoc(command.help or ""),
            "",
        ]
        rows = [f"| `{p.metavar or p.name.upper()}` | {_cell(p.help or '')} |" for p in arguments]
        rows += [f"| `{_option(p)}` | {_cell(p.help or '')} |" for p in options]
        lines += ["| | |", "|---|---|", *rows, ""] if rows else []
    return "\n".join(lines) + "\n"


def _option(option: Any) -> str:
    words = ", ".join([*option.opts, *option.secondary_opts])
    if option.is_flag:
        return words
    return _cell(f"{words} {option.metavar or option.name.upper()}")


# ---------------------------------------------------------------- mkdocs


def on_files(files: Any, config: Any) -> Any:
    """Adds the generated pages."""
    from mkdocs.structure.files import File

    for name, text in generated().items():
        files.append(File.generated(config, name, content=text))
    return files
