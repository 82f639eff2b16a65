"""The graph of a run's basins goes out, a partition of it comes back: labels as it says, in any blocks."""

import heapq
import shutil
from pathlib import Path

import numpy as np
import pandas
import pyarrow
import pytest
import zarr
from pyarrow import parquet

from tests.helpers import LIGHT, Quiet, Stops, digest, segment_probabilities
from tests.io.test_affinities import TAKEN, affinities_of, cells
from volseg import api
from volseg.engine.finished import open_run
from volseg.engine.partition import decided, stored_basins
from volseg.errors import UserError
from volseg.evaluation.calibrate import calibrate
from volseg.evaluation.evaluate import evaluate
from volseg.evaluation.review import review
from volseg.evaluation.verify import verify
from volseg.io import arrays, files

FRAGMENTS = {"smooth": [1, 1, 1], "threshold": 0.5, "contour": 1.0}
STITCH = {"min_voxels": 60, "seed": 0.75, "count_cut": False}
BLOCKS = {"whole": (30, 64, 72), "eight": (15, 32, 40), "odd": (7, 64, 23)}


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """Noisy affinities of touching cells, and the cells."""
    path, truth = tmp_path_factory.mktemp("cells"), cells()
    noise = np.random.default_rng(2).normal(0, 0.12, (3, *truth.shape)).astype(np.float32)
    affinities = np.clip(0.85 * affinities_of(truth) + np.float32(0.07) + noise, 0, 1)
    zarr.create_array(path / "affinities.zarr", data=affinities)
    zarr.create_array(path / "truth.zarr", data=truth)
    return path


@pytest.fixture(scope="module")
def runs(volumes):
    """A run in each of the blocks, and the graph of its basins. Tests must not change them."""
    for name, block in BLOCKS.items():
        made = segment_probabilities(
            volumes / "affinities.zarr", volumes / name, **TAKEN, fragments=FRAGMENTS, stitch=STITCH,
            blocks={"shape": block},
        )  # fmt: skip
        api.export(made, f"{volumes}/{name}.graph", progress=Quiet())
    return volumes


@pytest.fixture
def copied(runs, tmp_path):
    """A copy of a run that a test may change."""
    return lambda name="eight": shutil.copytree(runs / name, tmp_path / name)


def tables(runs, name="whole"):
    return [pandas.read_parquet(f"{runs}/{name}.graph/{table}.parquet") for table in ("nodes", "edges")]


def contracted(nodes, edges, cost):
    """Greedy additive edge contraction (Keuper et al. 2015): the most attractive edge joins, while there is one above 0."""
    parent = {basin: basin for basin in nodes["basin"]}
    weights = {basin: {} for basin in parent}
    for a, b, weight in zip(edges["basin_a"], edges["basin_b"], cost, strict=True):
        weights[a][b] = weights[b][a] = weight
    queue = [(-weight, a, b) for a, others in weights.items() for b, weight in others.items() if a < b and weight > 0]
    heapq.heapify(queue)
    while queue:
        negative, a, b = heapq.heappop(queue)
        if parent[a] != a or parent[b] != b or weights[a].get(b) != -negative:
            continue
        parent[b] = a
        del weights[a][b]
        for c, weight in weights.pop(b).items():
            if c != a:
                del weights[c][b]
                total = weights[a].get(c, 0) + weight
                weights[a][c] = weights[c][a] = total
                if total > 0:
                    heapq.heappush(queue, (-total, min(a, c), max(a, c)))

    def root(basin):
        while parent[basin] != basin:
            basin = parent[basin]
        return basin

    return np.array([root(basin) for basin in nodes["basin"]])


@pytest.fixture(scope="module")
def solved(runs):
    """What a multicut of the graph makes: basins with their objects, small ones in none."""
    nodes, edges = tables(runs)
    group = contracted(nodes, edges, edges["contact_faces"] * (edges["mean_probability"] - 0.4))
    size = pandas.Series(nodes["voxels"].to_numpy()).groupby(group).transform("sum").to_numpy()
    return pandas.DataFrame({"basin": nodes["basin"], "object": np.where(size >= 60, group + 1, 0)})


def decide(path, partition, **options):
    return api.segment(str(path), partition=partition, config=LIGHT, progress=Quiet(), **options)


# ---------------------------------------------------------------- out


def test_the_graph_is_that_of_a_plain_loop_over_the_basins(runs):
    nodes, edges = tables(runs)
    stored = arrays.open_array(str(runs / "whole"), "work/fragments")[:].astype(np.int64)
    regions, first, index, voxels = np.unique(stored, return_index=True, return_inverse=True, return_counts=True)
    assert regions[0] == 0
    np.testing.assert_array_equal(nodes["basin"], np.sort(first[1:]))
    basin = np.where(stored > 0, first[index.reshape(stored.shape)], -1)
    np.testing.assert_array_equal(nodes["voxels"], voxels[1:][np.argsort(first[1:])])
    places = np.unravel_index(nodes["basin"].to_numpy(), stored.shape)
    np.testing.assert_array_equal(nodes[["z", "y", "x"]].to_numpy().T, places)
    labels = open_run(str(runs / "whole")).labels[:]
    np.testing.assert_array_equal(nodes["object"], labels[places])
    mask = arrays.open_array(str(runs / "whole"), "0")[0].astype(np.int64)
    sums = [mask[basin == each].sum() for each in nodes["basin"][:5]]
    np.testing.assert_array_equal(nodes["mask_sum"][:5], sums)
    pairs = []
    for axis in range(3):
        along = np.moveaxis(basin, axis, 0)
        both = np.stack([along[1:].ravel(), along[:-1].ravel()])
        pairs.append(np.sort(both[:, (both[0] != both[1]) & (both.min(0) >= 0)], axis=0))
    touching, faces = np.unique(np.concatenate(pairs, axis=1), axis=1, return_counts=True)
    np.testing.assert_array_equal(edges[["basin_a", "basin_b"]].to_numpy().T, touching)
    np.testing.assert_array_equal(edges["contact_faces"], faces)
    assert (edges["mean_probability"] <= edges["saddle_probability"] + 1e-9).all()


@pytest.mark.parametrize("name", ["eight", "odd"])
def test_the_graph_is_the_same_bytes_in_any_blocks(runs, name):
    for file in ("nodes.parquet", "edges.parquet", "README.md"):
        assert Path(f"{runs}/{name}.graph/{file}").read_bytes() == Path(f"{runs}/whole.graph/{file}").read_bytes()


def test_the_readme_tells_of_every_column(runs):
    text = Path(f"{runs}/whole.graph/README.md").read_text()
    for table in tables(runs):
        assert all(f"`{name}`" in text or f"`{name[:3]}_z`" in text for name in table.columns)


# ---------------------------------------------------------------- back


def test_a_multicut_elsewhere_gives_the_cells_and_the_same_bytes_in_any_blocks(runs, solved, copied, tmp_path):
    parquet.write_table(pyarrow.Table.from_pandas(solved), tmp_path / "solved.parquet")
    found = {}
    for name in BLOCKS:
        run = decide(copied(name), tmp_path / "solved.parquet")
        found[name] = digest(run.path)
        assert verify(run.path, boxes=4).ok
    assert len(set(found.values())) == 1
    assert found["whole"] != digest(runs / "whole")
    scores = evaluate(run.path, str(runs / "truth.zarr")).instances
    assert scores.matched == scores.truth_objects == scores.pred_objects
    own = evaluate(str(runs / "whole"), str(runs / "truth.zarr")).instances
    assert scores.pq > own.pq


def test_labels_are_what_the_table_says(runs, solved, copied):
    """By the voxel that a basin is called by, numbered by first voxels; an object need not be in one piece."""
    rng = np.random.default_rng(0)
    table = solved.assign(object=rng.integers(0, 9, len(solved)))
    labels = decide(copied(), table).labels[:]
    got = labels.ravel()[table["basin"]]
    _, first = np.unique(table["object"], return_index=True)
    names = {table["object"][row]: k for k, row in enumerate(sorted(row for row in first if table["object"][row]), 1)}
    np.testing.assert_array_equal(got, [names.get(each, 0) for each in table["object"]])


def test_csv_and_other_names_and_orders_give_the_same(solved, copied, tmp_path):
    renamed = solved.assign(object=solved["object"] * 7, weight=0.5).sample(frac=1, random_state=3)
    renamed.to_csv(tmp_path / "solved.csv", index=False)
    first = decide(copied(), solved)
    shown = Quiet()
    second = api.segment(first, partition=tmp_path / "solved.csv", config=LIGHT, progress=shown)
    assert first.run.partition == second.run.partition
    assert sum(shown.stages.get("stitch", [])[1:]) == 0  # nothing is decided again


def test_the_runs_own_objects_are_a_partition_that_changes_nothing(runs, copied):
    nodes, _ = tables(runs)
    run = decide(copied(), nodes)
    assert digest(run.path) == digest(runs / "whole")
    assert run.run.partition


def test_a_partition_is_kept_until_it_is_taken_back(runs, solved, copied):
    run = decide(copied(), solved)
    labels = digest(run.path)
    filled = ["stitch.seed=0.9", "stitch.fill_holes_voxels=100"]
    assert digest(api.segment(run, settings=filled, progress=Quiet()).path) == labels
    assert "a partition that was given" in "\n".join(open_run(run.path).report())
    assert not len(review(run.path).decisions)
    with pytest.raises(UserError, match="those of a partition, not of rules"):
        calibrate(run.path, str(runs / "truth.zarr"))
    back = ["stitch.seed=0.75", "stitch.fill_holes_voxels=0"]
    assert digest(decide(run.path, "none", settings=back).path) == digest(runs / "whole")
    assert not list(Path(run.path, "partition").glob("*"))


def test_holes_are_filled_again_once_a_partition_is_taken_back(solved, copied):
    filled = api.segment(
        str(copied()), settings=["stitch.fill_holes_voxels=5000", "stitch.min_voxels=900"], progress=Quiet()
    )
    before = digest(filled.path)
    assert digest(decide(filled.path, solved).path) == digest(decide(copied("odd"), solved).path) != before
    assert digest(decide(filled.path, "none").path) == before


def test_a_stopped_decision_goes_on(solved, copied):
    """Without the file, which the run has."""
    path = copied()
    with pytest.raises(KeyboardInterrupt):
        api.segment(str(path), partition=solved, config=LIGHT, progress=Stops("relabel"))
    went_on = api.segment(str(path), progress=Quiet())
    assert digest(went_on.path) == digest(decide(copied("odd"), solved).path)


def test_a_cleaned_run_keeps_its_partition(solved, copied):
    run = decide(copied(), solved)
    labels = digest(run.path)
    api.clean(run)
    with pytest.raises(UserError, match="a graph needs the basins"):
        api.export(run, f"{run.path}.graph", progress=Quiet())
    assert digest(api.segment(run, recompute=True, progress=Quiet()).path) == labels
    assert verify(run.path, boxes=2).ok


@pytest.mark.parametrize("half", [False, True])
def test_a_damaged_partition_is_made_again_of_the_labels(solved, copied, half):
    run = decide(copied(), solved)
    (file,) = Path(run.path, "partition").glob("*")
    stored = file.read_bytes()
    file.write_bytes(stored[: len(stored) // 2]) if half else file.unlink()
    assert [Path(key).name for key in verify(run.path, boxes=1).damaged] == [file.name]
    with pytest.raises(UserError, match="give it again with --partition FILE"):
        decided(run.run, stored_basins(run.run, "a test"))
    assert verify(api.repair(run, progress=Quiet()).path, boxes=2).ok
    assert file.read_bytes() == stored


def test_an_empty_partition_says_why_there_is_no_object(solved, copied):
    run = decide(copied(), solved.assign(object=0))
    assert run.object_count == 0
    assert "puts no basin into an object" in run.report()[0]


@pytest.mark.parametrize("holes", [0, 100])
def test_a_run_without_its_probabilities_takes_a_partition_unless_it_fills_holes(
    volumes, solved, copied, tmp_path, holes
):
    made = segment_probabilities(
        volumes / "affinities.zarr", tmp_path / "dropped", **TAKEN, fragments=FRAGMENTS, blocks={"shape": BLOCKS["odd"]},
        stitch={**STITCH, "fill_holes_voxels": holes}, output={"probabilities": "drop"},
    )  # fmt: skip
    before = digest(made.path)
    if holes:
        with pytest.raises(
            UserError, match=r"a partition where stitch\.fill_holes_voxels is set needs the probabilities"
        ):
            decide(made.path, solved)
        assert digest(made.path) == before
        return
    assert digest(decide(made.path, solved).path) == digest(decide(copied(), solved).path) != before
    assert verify(made.path, boxes=2).ok


# ---------------------------------------------------------------- refusals


def refusals():
    """Name -> (what becomes of the table, what the line must say)."""
    return {
        "no column": (lambda t: t.drop(columns="object"), "has no column 'object'"),
        "twice": (lambda t: pandas.concat([t, t[:1]]), "names basin .* more than once"),
        "unknown": (lambda t: t.assign(basin=t["basin"] + 1), r"names basin \d+, which .* does not have"),
        "missing": (lambda t: t[3:], r"lacks basin \d+ and 2 more of"),
        "halves": (lambda t: t.assign(object=t["object"] + 0.5), "object is float64; give a whole number"),
        "gaps": (lambda t: t.assign(object=t["object"].where(t["object"] > 9)), "object is float64"),
        "negative": (lambda t: t.assign(object=t["object"] - 1), "object goes from -1"),
    }


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize("case", [*refusals()])
def test_what_is_no_partition_of_the_run_is_refused_before_anything_changes(solved, copied, tmp_path, case, ending):
    change, said = refusals()[case]
    file, path = tmp_path / f"partition.{ending}", copied()
    before = sorted(p.stat().st_mtime_ns for p in path.rglob("*"))
    table = change(solved)
    _ = table.to_csv(file, index=False) if ending == "csv" else table.to_parquet(file)
    with pytest.raises(UserError, match=said):
        decide(path, file)
    assert sorted(p.stat().st_mtime_ns for p in path.rglob("*")) == before


def test_a_graph_of_another_run_is_refused(runs, volumes, solved, copied, tmp_path):
    other = segment_probabilities(
        volumes / "affinities.zarr", tmp_path / "other", **TAKEN, fragments={**FRAGMENTS, "smooth": [2, 2, 2]},
        stitch=STITCH,
    )  # fmt: skip
    api.export(other, tmp_path / "other.graph", progress=Quiet())
    with pytest.raises(UserError, match="is of the basins of another run"):
        decide(copied(), tmp_path / "other.graph/nodes.parquet")
    partitioned = decide(copied("odd"), solved)
    with pytest.raises(UserError, match=r"other \[fragments\] make others"):
        api.segment(partitioned, settings=["fragments.smooth=[2, 2, 2]"], progress=Quiet())
    with pytest.raises(UserError, match="is not a volseg run: corrections and partitions"):
        api.segment(volumes / "affinities.zarr", partition=solved)


@pytest.mark.parametrize("name", ["absent.parquet", "text.csv", "text.parquet"])
def test_a_file_that_holds_no_table_is_refused_in_one_line(run, runs, tmp_path, name):
    if name != "absent.parquet":
        (tmp_path / name).write_bytes(b"\x00\xff a \n")
    status, _, said = run("segment", runs / "whole", "--partition", tmp_path / name)
    assert status == 2
    assert len(said.strip().splitlines()) == 1
    assert "partition" in said


def test_a_tree_has_no_graph_and_takes_no_partition(volumes, solved, tmp_path):
    made = segment_probabilities(
        volumes / "affinities.zarr", tmp_path / "tree", **TAKEN, fragments=FRAGMENTS, blocks={"shape": BLOCKS["eight"]},
        stitch={**STITCH, "reduce": "tree"},
    )  # fmt: skip
    with pytest.raises(UserError, match=r"a graph needs the basins of .* in one process"):
        api.export(made, tmp_path / "tree.graph", progress=Quiet())
    with pytest.raises(UserError, match=r"a partition needs the basins of .* in one process"):
        decide(made.path, solved)


def test_the_command_line_does_both(run, copied, solved, tmp_path):
    path = copied()
    status, _, said = run("export", path, tmp_path / "basins", "--to", "graph")
    assert status == 0, said
    nodes = pandas.read_parquet(tmp_path / "basins/nodes.parquet")
    nodes[["basin", "object"]].to_csv(tmp_path / "own.csv", index=False)
    before = digest(path)
    status, out, said = run("segment", path, "--partition", tmp_path / "own.csv")
    assert status == 0, said
    assert "a partition that was given" in out
    assert digest(path) == before
    status, _, said = run("segment", path, "--partition", "none", "--corrections", "none")
    assert status == 0, said
    assert digest(path) == before


def test_a_run_on_an_object_store_takes_a_partition_from_there(bucket, volumes, solved, copied, tmp_path):
    store = f"{bucket}/partition"
    made = segment_probabilities(
        volumes / "affinities.zarr", f"{store}/run.zarr", **TAKEN, fragments=FRAGMENTS, stitch=STITCH,
        blocks={"shape": BLOCKS["eight"]},
    )  # fmt: skip
    api.export(made, tmp_path / "basins.graph", progress=Quiet())
    for table in ("nodes", "edges"):
        stored = tmp_path / f"basins.graph/{table}.parquet"
        assert stored.read_bytes() == Path(f"{volumes}/whole.graph/{table}.parquet").read_bytes()
    solved.to_parquet(tmp_path / "solved.parquet")
    files.write_bytes(store, "solved.parquet", (tmp_path / "solved.parquet").read_bytes())
    with pytest.raises(UserError, match="cannot read partition"):
        decide(made.path, f"{store}/absent.parquet")
    assert digest(decide(made.path, f"{store}/solved.parquet").path) == digest(decide(copied(), solved).path)
    assert verify(made.path, boxes=1).ok
