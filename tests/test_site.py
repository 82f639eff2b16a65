"""The documentation: it builds without a broken link, says of each setting and message what it is, and its code runs."""

import ast
import logging
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from functools import lru_cache
from itertools import takewhile
from pathlib import Path

import pytest
import typer

from tests.helpers import ROOT
from volseg import cli, config

DOCS = ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
GENERATED = runpy.run_path(str(DOCS / "pages.py"))
ERRORS = {"UserError", "IncompleteRunError", "OutOfMemoryError"}
NOT_RUN = re.compile(r"# not run: (.+)")


def test_the_site_builds_and_no_link_is_broken(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "site").rglob("index.html"))) >= 14
    settings = (tmp_path / "site" / "settings" / "index.html").read_text()
    assert all(f"<code>{name}</code>" in settings for name in config.Stitch.model_fields)
    api = (tmp_path / "site" / "api" / "index.html").read_text()
    assert "Raises" in api
    assert "Whether to replace an existing run." in api


# ---------------------------------------------------------------- settings and commands


def test_every_setting_is_explained():
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \|$", GENERATED["settings"](), re.M)
    sections = [field.annotation for field in config.Config.model_fields.values()]
    wanted = [key for section in [*sections, config.TrainData] for key in section.model_fields]
    assert sorted(row[0] for row in rows) == sorted(wanted)
    assert [row[0] for row in rows if not row[3]] == []


def test_a_setting_has_its_type_default_and_comment():
    page = GENERATED["settings"]()
    assert "| `tta` | `1`, `4`, `8` | `1` | ways to lay a tile that are averaged" in page
    assert "| `chunk` | 3 x whole number | `[32, 256, 256]` | what zarr compresses" in page


def test_every_command_and_option_is_listed():
    page = GENERATED["commands"]()
    for name, command in typer.main.get_command(cli.app).commands.items():
        assert f"## volseg {name}\n" in page
        assert all(param.help for param in command.params if param.name != "help"), name


# ---------------------------------------------------------------- messages


def words(node):
    """The text of an expression, with ``{}`` for what is put in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(words, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return words(node.left) + words(node.right)
    return words(node.body) if isinstance(node, ast.IfExp) else "{}"


@lru_cache
def messages():
    """Each message of an error that a user can mend, with its place; not those that are put together elsewhere.

    Rules between settings are `ValueError` in the classes of settings, which become such errors.
    """
    found = []
    for path in sorted((ROOT / "volseg").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            kinds = ERRORS | {"ValueError"} if path.name == "config.py" else ERRORS
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in kinds and node.args:
                text = words(node.args[0])
                if len(re.findall(r"[a-z]", text)) > 10:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {text}")
    return found


def explained():
    """Of each message on the page, an expression that finds it."""
    rows = re.findall(r"^\| (`.*?`) \| (.*) \|$", (DOCS / "troubleshooting.md").read_text(), re.M)
    assert all(advice for _, advice in rows)
    quoted = [text for cell, _ in rows for text in re.findall(r"`([^`]+)`", cell)]
    return {text: re.compile(".*".join(map(re.escape, text.strip(". ").split("...")))) for text in quoted}


def test_every_message_that_a_user_can_meet_is_on_the_page_of_troubles():
    """A new message wants a row, or its words in a row, of docs/troubleshooting.md; ``...`` stands for what differs."""
    known, met = explained(), messages()
    assert len(met) > 250
    missing = [message for message in met if not any(found.search(message) for found in known.values())]
    assert missing == []


def test_no_row_of_troubles_is_of_a_message_that_is_gone():
    met = [*messages(), *(path.read_text() for path in (ROOT / "volseg").rglob("*.py"))]
    gone = [text for text, found in explained().items() if not any(found.search(message) for message in met)]
    assert gone == []


# ---------------------------------------------------------------- code


def blocks(page):
    """The fenced blocks of a page: language and text."""
    found = re.findall(r"^( *)```(\w+)\n(.*?)^\1```$", (DOCS / page).read_text(encoding="utf-8"), re.M | re.S)
    return [(language, textwrap.dedent(text)) for _, language, text in found]


def commands(text):
    joined = text.replace("\\\n", " ")
    lines = (shlex.split(line, comments=True) for line in joined.splitlines())
    return [list(takewhile(lambda word: word not in (">", ">>"), words)) for words in lines if words]


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_settings_on_a_page_are_ones_that_there_are(page):
    group = typer.main.get_command(cli.app)
    for line in (DOCS / page).read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        sets = [quoted or plain for quoted, plain in re.findall(r"--set (?:'([^'=]+=[^']+)'|([\w.]+=[^\s`)]+))", line)]
        config.load(sets=[text for text in sets if text[0].islower()])  # not SECTION.KEY=VALUE
    for language, text in blocks(page):
        assert language in ("bash", "sh", "python", "toml"), f"{language}: say what it is"
        if language == "toml":
            config.resolve((page, tomllib.loads(text)))
        if language == "python":
            compile(text, page, "exec")
        for given in commands(text) if language in ("bash", "sh") else []:
            if given[0] == "volseg":
                group.commands[given[1]].make_context(given[1], given[2:])


RUN = [page for page in PAGES if any(language in ("bash", "python") for language, _ in blocks(page))]


@pytest.mark.parametrize("page", RUN)
def test_the_code_of_a_page_runs(page, run, tmp_path, monkeypatch, image, reference):
    """In order, in a folder with a volume and a run of it, unless the page makes them."""
    monkeypatch.chdir(tmp_path)
    code = blocks(page)
    if "volseg synth em.zarr" not in "".join(text for _, text in code):
        Path("em.zarr").symlink_to(image)
        shutil.copytree(reference, "em.volseg.zarr")
    level, names = logging.getLogger("volseg").level, {"__name__": "page"}
    try:
        for language, text in code:
            if language == "bash":
                for given in commands(text):
                    assert given[0] == "volseg"
                    status, _, said = run(*given[1:])
                    assert status == 0, f"{given}: {said}"
            elif language == "python" and not NOT_RUN.match(text):
                exec(compile(text, page, "exec"), names)
    finally:
        logging.getLogger("volseg").setLevel(level)


def test_code_that_is_not_run_says_why():
    skipped = [NOT_RUN.match(text)[1] for page in PAGES for _, text in blocks(page) if NOT_RUN.match(text)]
    assert all(reason.startswith("needs ") for reason in skipped)
    assert len(skipped) <= 3
