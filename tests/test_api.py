"""volseg from Python: what a script or a notebook calls."""

import json
import subprocess
import sys

import dask.array
import numpy as np
import pytest
import zarr

import volseg
from tests.helpers import SHAPE, digest, markers_of, run_stages, settings
from volseg.box import Box
from volseg.engine import stages
from volseg.engine.block_tables import Values
from volseg.engine.stages import Stage, same
from volseg.errors import UserError


def test_every_name_is_there_and_documented():
    for name in volseg.__all__:
        assert getattr(volseg, name).__doc__


def test_importing_loads_neither_torch_nor_dask():
    code = "import sys, volseg; sys.exit(any(name in sys.modules for name in ('torch', 'dask', 'zarr', 'numba', 'pandas')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_two_lines_segment_an_array_to_the_labels_of_its_file(image, reference, tmp_path):
    gray = zarr.open_array(f"{image}/0", mode="r")[:]
    for kind, array in (("numpy", gray), ("dask", dask.array.from_array(gray, chunks=(8, 64, 64)))):
        voxels = {"input": {"voxel_size_nm": (5.0, 5.0, 5.0)}, "cluster": {"workers": 1}}
        run = volseg.infer(array, tmp_path / f"{kind}.zarr", config=settings(**voxels))
        assert digest(run.path) == digest(reference)
        assert sorted(path.name for path in tmp_path.glob(f"{kind}*")) == [f"{kind}.zarr"]


def test_a_zarr_array_is_read_where_it_lies(image, reference, tmp_path):
    array = zarr.open_array(f"{image}/0", mode="r")
    run = volseg.infer(array, tmp_path / "run.zarr", config=settings(cluster={"workers": 1}))
    assert digest(run.path) == digest(reference)
    assert run.run.source.path.startswith(image)


def test_an_output_that_exists_is_refused_before_an_array_is_read(reference, tmp_path):
    class Unread:
        shape, dtype = (8, 64, 64), np.dtype(np.uint8)

        def __getitem__(self, index):
            raise AssertionError(index)

    (tmp_path / "precious").mkdir()
    for work in (volseg.infer, volseg.segment, volseg.convert):
        for out, said in ((tmp_path / "precious", "is left alone"), (reference, "exists")):
            with pytest.raises(UserError, match=said):
                work(Unread(), out)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_an_array_needs_a_name(image):
    with pytest.raises(UserError, match=r'give out="em\.volseg\.zarr"'):
        volseg.infer(np.zeros((4, 64, 64), np.uint8))


def test_a_finished_run_has_its_results(reference):
    run = volseg.open(reference)
    assert run.labels.shape == SHAPE == run.shape
    assert run.object_count == len(run.objects) == run.objects_arrow().num_rows == len(np.unique(run.labels[:])) - 1
    np.testing.assert_array_equal(run.dask_labels().compute(), run.labels[:])
    assert run.probabilities.shape == (2, *SHAPE)
    assert run.seconds["total"] > 0
    assert run.plan["inferred_voxels"] == run.actual["inferred_voxels"]
    assert run.show().size == (2 * SHAPE[2], SHAPE[1])
    assert json.loads(json.dumps(run.to_json()))["objects"] == run.object_count
    assert str(run.object_count) in run._repr_html_()


def test_a_section_outside_is_refused(reference):
    with pytest.raises(UserError, match=f"section {SHAPE[0]} is not in the volume; give one from 0 to {SHAPE[0] - 1}"):
        volseg.open(reference).show(SHAPE[0])


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a finished volseg run"):
        volseg.open(tmp_path)


def test_a_run_of_another_layout_is_refused_in_a_line(reference, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({**volseg.open(reference).to_json(), "format": 0}))
    with pytest.raises(UserError, match=r"made by another version of volseg \(layout 0, this one has 1\)"):
        volseg.open(tmp_path)


def test_settings_are_refused_with_their_place(image, tmp_path):
    with pytest.raises(UserError, match=r"--set stitch\.seed=2: stitch\.seed = 2"):
        volseg.infer(image, tmp_path / "run.zarr", settings=["stitch.seed=2"])


def test_a_plan_is_a_value(image):
    plan = volseg.plan(image, config=settings(cluster={"workers": 1}))
    assert plan.shape == SHAPE
    assert not plan.refusal
    assert json.loads(json.dumps(plan.to_json()))["total_seconds"] == plan.total_seconds
    assert "<pre>" in plan._repr_html_()


def test_scores_and_checks_are_values(image, reference):
    assert volseg.evaluate(volseg.open(reference), f"{image}/labels/truth").instances.pq > 0.3
    assert volseg.verify(reference, boxes=1).ok


def test_a_new_stage_is_one_more_entry_of_one_list(image, tmp_path, monkeypatch):
    """The dummy stage counts the labels of each block, once relabel has made them."""

    def count(run, i, timings):
        labels = run.layout.labels().read(run.grid[i])
        run.layout.part_labels.save(Values(np.unique(labels)), "dummy", i)

    def dummy(run):
        return [Stage("dummy", count, run.parts.own, "key", "labels", after={"relabel": same})]

    monkeypatch.setattr(stages, "STAGES", (*stages.STAGES, dummy))
    run, statistics = run_stages(
        image, tmp_path / "run.zarr", blocks={"shape": (11, 75, 170)}
    )  # threads of this process
    counted = [run.layout.part_labels.load("dummy", i).values for i in range(len(run.grid))]
    assert max(labels.max() for labels in counted) == run.layout.labels().read(Box.from_shape(SHAPE)).max() > 0
    assert markers_of(run).done("dummy") == {0, 1, 2, 3}
    assert "dummy" in statistics.seconds
