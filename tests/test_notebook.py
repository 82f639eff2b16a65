"""The notebook of the documentation runs from its first cell to its last, in a kernel of its own."""

import subprocess
import sys

import pytest

from tests.helpers import ROOT

RUN = """
import sys
import nbclient, nbformat
book = nbformat.read(sys.argv[1], as_version=4)
try:
    nbclient.NotebookClient(book, timeout=200, kernel_name="python3").execute()
finally:
    nbformat.write(book, "done.ipynb")
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Of each cell of code, what it shows: text, and HTML."""
    nbformat = pytest.importorskip("nbformat", reason="needs nbclient (extra test)")
    folder = tmp_path_factory.mktemp("notebook")
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(ROOT / "docs" / "tutorial.ipynb")], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    cells = [cell for cell in nbformat.read(folder / "done.ipynb", as_version=4).cells if cell.cell_type == "code"]
    return [
        "\n".join(
            str(output.get("text", "")) + "".join(map(str, output.get("data", {}).values())) for output in cell.outputs
        )
        for cell in cells
    ]


def test_each_cell_shows_what_it_is_there_for(outputs):
    shape, bars, slider, table, scores, doubts, anew, *_ = outputs
    assert "(24, 128, 160)" in shape
    assert "<progress" in bars
    assert "predict    100 %" in bars
    assert "Warning" not in bars
    assert "<th>objects</th>" in bars
    assert slider.count("data:image/jpeg;base64,") == 8
    assert "oninput=" in slider
    assert "volume_um3" in table
    assert "iou" in scores
    assert "margin" in doubts
    assert anew.count("PQ") == 2


def test_nothing_that_it_shows_is_stored_in_the_repository():
    text = (ROOT / "docs" / "tutorial.ipynb").read_text()
    assert '"outputs": []' in text
    assert "image/png" not in text
    assert len(text) < 20_000
