"""What several test modules share: small runs, volumes, and the watershed cut into blocks."""

import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from volseg import api
from volseg.box import Blocks, Box
from volseg.config import Config, load, resolve
from volseg.engine import cluster, finish, folder, pipeline, schedule
from volseg.engine.layout import Layout
from volseg.engine.receipt import Receipt
from volseg.engine.receipts import Markers, RunStatistics
from volseg.engine.stages import keys, stages_of
from volseg.inference import model
from volseg.inference.model_card import ModelCard
from volseg.io import arrays, ome, probabilities, volume
from volseg.planning import prepare as describe
from volseg.segmentation.basins import watershed_block
from volseg.segmentation.heights import OUTSIDE
from volseg.segmentation.rules import NO_LIMIT, Rules
from volseg.segmentation.stitch import gather, link

ROOT = Path(__file__).resolve().parents[1]


SHAPE = (22, 150, 170)


TILES = {
    "predict": {"tile": 96, "overlap": 32}, "cluster": {"dashboard": ""},
    "stitch": {"min_voxels": 100, "seed": 0.9, "count_cut": False},
}  # fmt: skip


class Quiet:
    """Keeps what a run says."""

    def __init__(self):
        self.said, self.stages = [], {}

    def message(self, text):
        self.said.append(text)

    def stage(self, name, voxels, done):
        self.stages[name] = [done]
        return self.stages[name].append

    def stop(self):
        pass


def settings(**sections):
    base = dict(model.load_card(model.shipped()).decode)
    for name, table in [*TILES.items(), *sections.items()]:
        base[name] = {**base.get(name, {}), **table}
    return load(base=base)


def digest(out):
    """SHA-256 of the raw bytes of the labels."""
    labels = volume.open(str(out), dataset="labels/instances/0")
    return hashlib.sha256(labels.read(Box.from_shape(labels.shape)).tobytes()).hexdigest()


def command(image, out, *more):
    sets = [f"--set={s}.{k}={json.dumps(v)}" for s, table in TILES.items() for k, v in table.items()]
    return [sys.executable, "-m", "volseg", "infer", image, "--out", str(out), *sets, *more]


def wait_for_markers(out, count, process, stage="predict"):
    """Waits until a run has done so many blocks of a stage."""
    folder = Path(f"{out}.partial/work/markers/{stage}")
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if folder.is_dir() and len(list(folder.glob("[0-9]*.json"))) >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"the run made no {count} markers of {stage}: {process.poll()}")


def decide(path, change, *, progress=None, recompute=False):
    """`volseg.segment` of a run with the settings that ``change`` makes of its own."""
    out = folder.absolute(str(path))
    layout = Layout(out)
    if not layout.finished and Layout(folder.partial_path(out)).described:
        layout = Layout(folder.partial_path(out))
    if not (layout.finished or layout.described):
        return api.segment(str(path), progress=progress or Quiet(), recompute=recompute)
    old = layout.load_summary() if layout.finished else layout.load_description()
    config = change(Config(**old["config"]))
    return api.segment(str(path), config=config, progress=progress or Quiet(), recompute=recompute)


def with_sets(*sets):
    return lambda config: load(sets=sets, base=config.model_dump(mode="json", exclude={"train"}))


class Stops(Quiet):
    """Ends the run where a stage would begin."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def stage(self, name, voxels, done):
        if name == self.at:
            raise KeyboardInterrupt
        return super().stage(name, voxels, done)


RUN_STAGES_SETTINGS = {"predict": {"tile": 64, "overlap": 16, "precision": "fp32"}, "stitch": {"min_voxels": 10, "seed": 0.55},
         "cluster": {"workers": 1}}  # fmt: skip


def write_volume(path, data, nm=None, begin=(0.0, 0.0, 0.0)):
    """A zarr volume with these voxels, the center of the first one at ``begin``."""
    arrays.create_group(path)
    arrays.create_array(path, "0", shape=data.shape, dtype=data.dtype, chunk=data.shape, shard=data.shape, axes="zyx")
    arrays.write(arrays.open_array(path, "0"), Box.from_shape(data.shape), data)
    arrays.set_group_attributes(path, "", ome.multiscales("volume", "zyx", [("0", nm or (5.0, 5.0, 5.0))], begin=begin))
    return path


def run_stages(em, out, **sections):
    """A whole run of it on threads of this process, and what it took."""
    run = describe.from_image(volume.open(em), settings(**{**RUN_STAGES_SETTINGS, **sections}), str(out))
    folder.begin(run, overwrite=False)
    with cluster.connect(run.config.cluster, light=True) as client:
        return run, schedule.run_stages(client, run, markers_of(run), Quiet())


LIGHT = {"cluster": {"workers": 1, "dashboard": ""}}


def segment_probabilities(path, out, *, show=None, **sections):
    """A finished run of the probabilities at ``path``, decided as the reference is."""
    config = settings(**{**LIGHT, **sections})
    return api.segment(str(path), str(out), config=config, progress=show or Quiet())


def begin_run(path, out, config):
    """A run of the probabilities at ``path`` of which nothing is done."""
    channels = probabilities.named_channels(str(path), config.probabilities, config.input)
    made = describe.from_probabilities(channels, config, str(out))
    folder.begin(made, overwrite=True)
    return made


def markers_of(run):
    """The markers of a run, which do not wait for the disk."""
    return Markers(run.out, keys(run), durable=False)


def mark(run, stage, i, receipt=None):
    """A block of a stage counts as done."""
    markers = markers_of(run)
    markers.add(stage, i, receipt or Receipt())
    markers.flush()


def do_stages(run, *names, some=None):
    """The stages of a run, block after block in this process; ``some`` of the blocks or all."""
    for name in names:
        stage = stages_of(run)[name]
        markers = markers_of(run)
        if name == "relabel":
            folder.create_labels(run, markers)
        for i in range(len(stage.grid)) if some is None else some:
            markers.add(name, i, pipeline.process_block(run.out, run.id, name, i))
        markers.flush()


def segment_here(path, out, config):
    """A finished run of the probabilities at ``path``, without workers."""
    run = begin_run(path, out, config)
    do_stages(run, *(stage.name for stage in stages_of(run).values() if stage.group != "tree"))  # one process stitches
    return finish.finish(run, run.out, RunStatistics(), 0.0, 0.0)


def config_of(tables, out, **changes) -> Config:
    return resolve(("test", {"train": {**tables, "out": str(out), **changes}}))


SMALL = (16, 16, 8, 8, 8)


CARD = ModelCard.from_json({
    "name": "test", "encoder": model.PRETRAINED, "decoder": list(SMALL), "sections": 3, "heads": list(model.HEADS),
    "mean": 100.0, "std": 20.0, "decode": {"fragments": {"threshold": 0.4}},
})  # fmt: skip


def cut(height, block, *, order=None, repeat=(), connectivity=6):
    """The grid, regions, tables and links of a height field cut into blocks, done in any order, some of them twice."""
    grid = Blocks(height.shape, block)
    padded = np.pad(height, 1, constant_values=OUTSIDE)
    done = {}
    for i in [*(order if order is not None else range(len(grid))), *repeat]:
        box = grid[i]
        frame = box.grow(1).shift((1, 1, 1)).slices
        done[i] = watershed_block(padded[frame], np.ones(box.shape, np.uint8), box, height.shape, connectivity)
    tables = [done[i][1] for i in range(len(grid))]
    links = [link(i, lambda j: tables[j], grid) for i in range(len(grid))]
    return grid, [done[i][0] for i in range(len(grid))], tables, links


def basins_of(height, block, connectivity=6):
    """The volume's basins, found in blocks of that shape."""
    return gather(*cut(height, block, connectivity=connectivity)[2:])[0]


@st.composite
def fields(draw):
    """Small height fields with plateaus and holes, and a level."""
    shape = draw(st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7)))
    steps = draw(st.sampled_from([2, 4, 30]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    height = rng.integers(0, steps, shape).astype(np.int32)
    height[rng.random(shape) < draw(st.sampled_from([0.0, 0.2, 0.6]))] = OUTSIDE
    return height, draw(st.integers(-1, steps))


@st.composite
def all_rules(draw, level):
    """Rules that bite on small fields; most are often left out."""
    return Rules(
        level,
        persistence=draw(st.sampled_from([0, 0, 1, 2, 5])),
        join_height=draw(st.sampled_from([-1, -1, level + 1, level + 2, level + 6])),
        min_voxels=draw(st.integers(0, 5)),
        max_voxels=draw(st.sampled_from([NO_LIMIT, NO_LIMIT, 8, 40])),
        fill_voxels=draw(st.sampled_from([0, 0, 2, 20])),
        keep_unseeded=draw(st.booleans()),
        low_height=draw(st.sampled_from([-1, -1, level + 1, level + 4])),
        cut_weights=draw(st.sampled_from([(0, 0, 0), (1, 1, 1), (1, 2, 3)])),
        voxel_weight=draw(st.sampled_from([1, 6])),
    )


def row(*heights):
    return np.array([[heights]], np.int32)


def onnx_network(
    path, *, channels=1, inputs=1, last=("Sigmoid",), dims=4, size=("y", "x"), depth=5, opset=17, dtype=np.float32
):
    """An ONNX file: a convolution of 3 x 3 (x 3), then ``last``; its weights are the same for the same shape."""
    from onnx import helper, numpy_helper, save

    three = dims == 5
    weights = np.random.default_rng(1).normal(size=(channels, inputs, *(3,) * (dims - 2))).astype(dtype)
    nodes = [helper.make_node("Conv", ["image", "weights"], ["n0"], pads=[1] * (2 * (dims - 2)))]
    for i, kind in enumerate(last):
        nodes.append(helper.make_node(kind, [f"n{i}"], [f"n{i + 1}"], **({"axis": 1} if kind == "Softmax" else {})))
    space = [*([depth] if three else []), *size]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    made = helper.make_graph(
        nodes, "network", [helper.make_tensor_value_info("image", kind, ["batch", inputs, *space])],
        [helper.make_tensor_value_info(f"n{len(last)}", kind, ["batch", channels, *space])],
        [numpy_helper.from_array(weights, "weights")],
    )  # fmt: skip
    save(helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path
