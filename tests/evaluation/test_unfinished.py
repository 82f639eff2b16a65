"""The page about a run that is not finished."""

from pathlib import Path

import numpy as np
import pytest

import volseg
from tests.evaluation.test_run_report import Page
from tests.helpers import LIGHT, begin_run, do_stages, settings, write_volume
from volseg.engine import lock
from volseg.engine.stages import stages_of
from volseg.errors import UserError


@pytest.fixture
def begun(tmp_path):
    """A run of two blocks, of which the first has its probabilities, and the second has failed."""
    voxels = np.random.default_rng(0).integers(0, 255, (8, 32, 32)).astype(np.uint8)
    config = settings(**LIGHT, blocks={"shape": (8, 16, 32)})
    run = begin_run(write_volume(str(tmp_path / "map.zarr"), voxels), str(tmp_path / "run.partial"), config)
    do_stages(run, "import", some=[0])
    entry = {"stage": "import", "block": 1, "box": str(run.grid[1]), "reason": "disk <on> fire", "worker": "w0",
             "traceback": "Traceback: line 1", "key": stages_of(run)["import"].key}  # fmt: skip
    run.layout.save_failures([entry])
    run.layout.save_log(b"2026 INFO begun\n2026 ERROR disk\n")
    return run


def test_what_failed_and_how_far_it_got_are_told(begun, tmp_path):
    path = volseg.report(tmp_path / "run")
    assert path == f"{begun.out}/report.html"
    page = Page(Path(path).read_text())
    assert not page.open
    assert page.heads == ["What failed", "How far it got", "Blocks", "Settings that are no defaults", "Log"]
    said = page.text
    assert any("1 block failed, and all that could be done without is done" in text for text in said)
    for text in ("disk <on> fire", "Traceback: line 1", str(begun.grid[1])):
        assert text in said
    i = said.index("import", said.index("How far it got"))
    assert said[i : i + 4] == ["import", "1", "2", "50"]
    assert "2026 ERROR disk" in " ".join(said)


def test_a_stopped_run_says_how_it_goes_on_and_the_folder_itself_may_be_given(begun):
    begun.layout.remove_failures()
    text = Path(volseg.report(begun.out)).read_text()
    assert "it was stopped, or it failed as a whole" in text
    assert "No block that is not done has failed." in text


def test_the_page_of_a_run_that_is_being_written_lies_beside_it(begun, tmp_path):
    out = str(tmp_path / "run")
    with lock.Lock(out):
        path = volseg.report(out)
    assert path == f"{out}.report.html"
    assert "is being written by another volseg" in Path(path).read_text()


def test_where_there_is_no_run_it_is_said(tmp_path):
    with pytest.raises(UserError, match="is not a finished volseg run"):
        volseg.report(tmp_path / "absent")
