"""How far a whole run is, from its first second on."""

import numpy as np
import pytest

from tests.helpers import Quiet, segment_probabilities, write_volume
from volseg import progress
from volseg.engine import run_log


class Overall(Quiet):
    """Keeps what it hears of the whole run, too."""

    def __init__(self):
        super().__init__()
        self.heard = []

    def overall(self, share, left):
        self.heard.append((share, left))


@pytest.fixture
def probabilities(tmp_path):
    voxels = np.random.default_rng(0).integers(0, 255, (16, 32, 32)).astype(np.uint8)
    return write_volume(str(tmp_path / "map.zarr"), voxels)


def test_the_share_of_the_whole_run_grows_from_0_to_1_over_all_stages(probabilities, tmp_path, monkeypatch):
    monkeypatch.setattr(run_log, "OVERALL_INTERVAL_S", -1.0)
    show = Overall()
    segment_probabilities(probabilities, tmp_path / "run", show=show, blocks={"shape": (8, 16, 32)})
    shares = [share for share, _ in show.heard]
    assert shares == sorted(shares)
    assert (shares[0], round(shares[-1], 6)) == (0.0, 1.0)
    assert len(set(shares)) > len(show.stages) > 3, "it grows within stages"
    assert show.heard[0][1] > 0, "the plan tells before anything is done"
    assert show.heard[-1][1] == 0
    assert all(left is not None for _, left in show.heard)


def test_lines_bars_and_a_notebook_tell_of_the_whole_run(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_INTERVAL_S", -1)
    lines, bars, notebook = progress.Lines(), progress.Bars(), progress.NotebookBars()
    lines.overall(0.0, 90.0)
    advance = lines.stage("predict", 100, 0)
    lines.overall(0.2, 72.0)
    advance(50)
    assert [line.split("Mvoxel")[0] for line in capsys.readouterr().err.splitlines()][:1] == [
        "whole run    0 %  90 s left"
    ]
    lines.write = (said := []).append
    lines.overall(0.4, 54.0)
    advance(10)
    assert said[0].startswith("whole run   40 %  54 s left; predict     60 %")
    bars.overall(0.25, 300.0)
    bars.overall(0.5, 200.0)
    bars.stage("predict", 100, 10)
    (whole, predict) = bars.live.tasks
    assert (whole.description, whole.completed, whole.fields["left"]) == ("whole run", 0.5, "3.3 min")
    assert predict.completed == 10
    bars.stop()
    notebook.overall(0.5, None)
    assert "whole run   50 %" in notebook._page()
    assert '<progress max="1" value="0.5">' in notebook._page()


def test_a_bar_counts_the_time_that_the_first_blocks_took(monkeypatch):
    """Two workers end their first blocks at nearly the same time: the time between them is no measure of a speed."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bars = progress.Bars()
    advance = bars.stage("predict", 100_000_000, 40_000_000)
    for now[0] in (10.0, 10.01):
        advance(10_000_000)
    speed, left = (column.render(bars.live.tasks[0]).plain for column in (bars.live.columns[3], bars.live.columns[6]))
    bars.stop()
    assert (speed, left) == ("2.00 Mvoxel/s", "20 s")
    assert progress.StageProgress("predict", 10, 10).line(0.0) == "predict    100 %  done before"


def test_of_many_short_blocks_few_moments_are_kept():
    stage = progress.StageProgress("relabel", 10**6, 0, now=0.0)
    for k in range(10**5):
        stage.advance(1, now=0.01 * (k + 1))
    assert len(stage.ends) < 300
    assert stage.speed == pytest.approx(100, rel=0.02)
    assert stage.left(1000.0) == pytest.approx(9000, rel=0.02)
