"""The injector of faults plays single episodes."""

import shutil
from pathlib import Path

import pytest

from benchmarks.chaos import bench
from benchmarks.chaos.episode import SAME, Episode, hash_result
from benchmarks.chaos.stand import Reference, Stand


@pytest.fixture
def stand(image, reference, tmp_path):
    """Episodes are played on a run that is there already."""
    (tmp_path / "em.zarr").symlink_to(image)
    shutil.copytree(reference, tmp_path / "reference-infer/run.volseg.zarr")
    return Stand(tmp_path, workers=1, references={"infer": Reference(hash_result(Path(reference)), 5.0)})


def test_a_killed_command_goes_on_to_the_same_bytes(stand):
    episode = bench.play(stand, "kill-finish", 0, 2)
    assert (episode.job, episode.outcome, episode.tracebacks) == ("decide", SAME, 0)
    assert episode.codes[-1] == 0


def test_what_verify_finds_in_a_damaged_run_is_repaired(stand):
    episode = bench.play(stand, "verify-pyramid", 0, 0)
    assert (episode.outcome, episode.faults, episode.tracebacks) == (SAME, 1, 0)


def test_episodes_are_counted_by_kind():
    ended = [
        Episode("a", outcome=SAME, faults=2),
        Episode("a", outcome="different", tracebacks=1),
        Episode("b", outcome="skipped"),
    ]
    a, b, all_kinds = bench.table(ended)
    assert (a["faults"], a["went on"], a["bytes different"], a["tracebacks"]) == (2, 1, 1, 1)
    assert (b["skipped"], all_kinds["kind"], all_kinds["episodes"]) == (1, "all 1 kinds", 3)
    assert set(bench.chosen("store,power-cut")) > {"store-503", "power-cut", "power-cut-after"}
    with pytest.raises(SystemExit, match="no kind is called nothing"):
        bench.chosen("nothing")
