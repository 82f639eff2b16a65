"""What the documentation shows is what the package does."""

import re
import runpy
import shlex

import numpy as np
import pytest
import typer

import volseg
from benchmarks import __main__ as benchmarks
from tests.helpers import ROOT
from volseg import cli
from volseg.box import Box
from volseg.config import load
from volseg.segmentation.extents import directions
from volseg.segmentation.objects import measure, objects_table


def test_the_picture_of_exactness_is_what_the_watershed_computes():
    script = runpy.run_path(str(ROOT / "docs" / "exactness.py"))
    assert script["draw"]() == (ROOT / "docs" / "exactness.svg").read_text(encoding="utf-8")


def commands() -> list[str]:
    """Each `volseg` command of README.md, without its comment."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.startswith("    volseg ")]


@pytest.mark.parametrize("command", commands())
def test_a_command_in_the_readme_is_one_the_command_line_takes(command):
    _, name, *rest = shlex.split(command, comments=True)
    typer.main.get_command(cli.app).commands[name].make_context(name, rest)


def benchmark_commands() -> list[str]:
    """Each `python -m benchmarks` command of benchmarks/README.md."""
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.startswith("    python -m benchmarks ")]
    spans = [" ".join(span.split()) for span in re.findall(r"`(python -m benchmarks [^`]+)`", text)]
    return [command for command in (*lines, *spans) if not command.endswith(("NAME", "--help"))]


@pytest.mark.parametrize("command", benchmark_commands())
def test_a_command_among_the_figures_is_one_that_the_benchmarks_take(command):
    name, *rest = shlex.split(command)[3:]
    typer.main.get_command(benchmarks.app).commands[name].make_context(name, rest)


def test_settings_in_the_readme_exist():
    sets = re.findall(r"--set (?:'([^']+)'|([\w.]+=[^\s`]+))", (ROOT / "README.md").read_text(encoding="utf-8"))
    load(sets=[quoted or plain for quoted, plain in sets])


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", "docker/README.md", "docs/design.md"]
)
def test_links_and_paths_lead_to_files(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    named = re.findall(r"`((?:volseg|tests|docs|docker|configs)/[\w./]+\.\w+)`", text)
    missing = [link for link in links if not ((ROOT / page).parent / link).exists()]
    assert missing + [path for path in named if not (ROOT / path).exists()] == []


def test_modules_named_in_the_design_exist():
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    folders = "|".join(path.name for path in (ROOT / "volseg").iterdir() if path.is_dir())
    named = [ROOT / "volseg" / name for name in re.findall(rf"`((?:{folders})/\w+)`", text)]
    assert [path.name for path in named if not (path.is_dir() or path.with_suffix(".py").exists())] == []


def test_functions_in_the_readme_are_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.S)
    compile(example, "README.md", "exec")
    assert set(re.findall(r"\bvolseg\.(\w+)", example)) <= set(volseg.__all__)
    assert all(hasattr(volseg.FinishedRun, name) for name in re.findall(r"\brun\.(?!zarr)(\w+)", example))


def test_the_data_dictionary_names_every_column():
    one, box, along = np.ones((1, 1, 1), np.uint32), Box((0, 0, 0), (1, 1, 1)), directions((1.0, 1.0, 1.0))
    sums = measure(one, np.arange(2), one.astype(np.uint8), box, [None, None, None], gray=one, along=along)
    columns = objects_table(sums, (1, 1, 1), (1.0, 1.0, 1.0))
    lines = (ROOT / "docs" / "objects.md").read_text(encoding="utf-8").splitlines()
    named = re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in lines if line.startswith("| `")))
    assert set(named) == set(columns)
