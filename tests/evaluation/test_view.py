"""A run in Neuroglancer: what it is told, what it is sent, and what a browser then draws."""

import io
import json
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
import zmesh
from PIL import Image

import volseg
from volseg.box import Blocks
from volseg.errors import UserError
from volseg.evaluation import view as module
from volseg.evaluation.review import open_reviewed
from volseg.io import arrays


def fetched(shown, path):
    with urllib.request.urlopen(f"{shown.root}/{path}", timeout=20) as answer:
        return answer.read()


@pytest.fixture(scope="module")
def shown(reference):
    with volseg.view(reference, object=4) as shown:
        yield shown


@pytest.mark.parametrize("layer", ["image", "mask", "labels"])
def test_every_chunk_of_every_level_is_sent_as_it_is_stored(layer, shown, image, reference):
    stored = {"image": image, "mask": reference, "labels": f"{reference}/labels/instances"}[layer]
    info = json.loads(fetched(shown, f"{layer}/info"))
    for number, scale in enumerate(info["scales"]):
        shape, chunk = scale["size"][::-1], scale["chunk_sizes"][0][::-1]
        data = np.full(shape, 99, info["data_type"])
        for box in Blocks(tuple(shape), tuple(chunk)):
            place = "_".join(f"{a}-{b}" for a, b in zip(box.start[::-1], box.stop[::-1], strict=True))
            raw = fetched(shown, f"{layer}/{scale['key']}/{place}")
            data[box.slices] = np.frombuffer(raw, data.dtype).reshape(box.shape)
        expected = arrays.node(stored, str(number))[:]
        np.testing.assert_array_equal(data, expected[0] if layer == "mask" else expected)
        assert scale["resolution"] == [5 * 2**number] * 3


def test_the_page_knows_layers_voxel_size_object_and_place(shown, reference):
    state = shown.viewer.state.to_json()
    assert state["dimensions"] == {axis: [5e-9, "m"] for axis in "xyz"}
    assert [(layer["name"], layer["type"]) for layer in state["layers"]] == [
        ("image", "image"), ("mask", "image"), ("contour", "image"), ("labels", "segmentation"),
    ]  # fmt: skip
    assert state["layers"][3]["segments"] == ["4"]
    x, y, z = (int(n) for n in state["position"])
    assert volseg.open(reference).labels[z : z + 1, y : y + 1, x : x + 1].item() == 4
    assert all(f"precomputed://{shown.root}/" in layer["source"][0]["url"] for layer in state["layers"])
    assert shown.url.startswith("http://127.0.0.1:")


def test_the_table_is_the_list_of_segments_and_meshes_are_made_when_asked_for(shown, reference):
    table = volseg.open(reference).objects
    inline = json.loads(fetched(shown, "labels/properties/info"))["inline"]
    assert [int(one) for one in inline["ids"]] == table["id"].tolist()
    assert json.loads(fetched(shown, "labels/info"))["mesh"] == "mesh"
    assert json.loads(fetched(shown, "labels/mesh/4:0")) == {"fragments": ["4"]}
    vertices = zmesh.Mesh.from_precomputed(fetched(shown, "labels/mesh/4")).vertices
    row = table[table["id"] == 4].iloc[0]
    bounds = [[5 * row[f"{axis}{end}"] for axis in "xyz"] for end in "01"]
    np.testing.assert_allclose([vertices.min(0), vertices.max(0)], bounds, atol=2.5)


@pytest.mark.parametrize(
    "path",
    ["labels/0/0-999_0-1_0-1", "labels/9/0-1_0-1_0-1", "labels/mesh/999", "truth/info", "labels/..%2f..%2frun.json"],
)
def test_what_is_not_there_is_not_sent(path, shown):
    with pytest.raises(urllib.error.HTTPError, match="404"):
        fetched(shown, path)


def test_nobody_reads_without_the_pages_token(shown):
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{shown.root[:-1]}x/labels/info", timeout=20)


def test_a_decision_is_gone_to_and_marked(reference):
    first = open_reviewed(reference).decisions[0]
    with volseg.view(reference, review=1) as shown:
        state = shown.viewer.state.to_json()
    assert [int(n) for n in state["position"]] == [first.x, first.y, first.z]
    assert set(map(int, state["layers"][3]["segments"])) == {first.label_a, first.label_b}
    assert state["layers"][4]["annotations"][0]["description"] == str(first)


def test_a_volume_that_has_moved_is_left_out_or_given(reference, image, tmp_path):
    shutil.copytree(reference, tmp_path / "run.zarr")
    facts = json.loads((tmp_path / "run.zarr/run.json").read_text())
    facts["source"]["path"] = str(tmp_path / "gone.zarr")
    (tmp_path / "run.zarr/run.json").write_text(json.dumps(facts))
    assert list(module.layers_of(volseg.open(tmp_path / "run.zarr"))) == ["mask", "contour", "labels"]
    given = module.layers_of(volseg.open(tmp_path / "run.zarr"), image)
    assert list(given) == ["image", "mask", "contour", "labels"]
    assert given["image"].levels[0].path == image


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"object": 999}, "has no object 999"),
        ({"review": 99999}, "no number 99999"),
        ({"object": 1, "review": 1}, "give one of them"),
    ],
)
def test_what_is_not_in_the_run_is_said_in_a_line(more, says, reference):
    with pytest.raises(UserError, match=says):
        volseg.view(reference, **more)


def test_the_command_prints_the_address_and_ends_with_ctrl_c(reference):
    """What a shell starts in the background has Ctrl-C ignored: the command is started as one in the foreground."""
    start = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from volseg.cli import main; main()"
    words = [sys.executable, "-c", start, "view", reference]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            url = process.stdout.readline().strip()
            with urllib.request.urlopen(url, timeout=20) as page:
                assert b"<html" in page.read().lower()
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=20) == 0
        finally:
            process.kill()


def test_napari_is_told_by_its_command_where_it_is_not_installed(reference, run):
    code, out, _ = run("view", reference, "--napari")
    assert code == 0
    assert f"napari --plugin napari-ome-zarr {reference}" in out


@pytest.mark.skipif(not any(map(shutil.which, module.BROWSERS)), reason="needs Chromium or Chrome on the PATH")
def test_a_browser_draws_gray_values_and_colored_segments(shown, tmp_path):
    shown.screenshot(tmp_path / "em.png", size=(400, 300))
    pixels = np.asarray(Image.open(io.BytesIO((tmp_path / "em.png").read_bytes())).convert("RGB")).astype(int)
    assert pixels.shape == (300, 400, 3)
    section = pixels[5:145, 5:195]  # the panel of x and y, without its frame
    spread = section.max(axis=2) - section.min(axis=2)
    assert (spread < 10).mean() > 0.2  # gray
    assert (spread > 30).mean() > 0.1  # objects
    assert len(np.unique(section[spread < 10])) > 50


def test_a_picture_needs_a_browser(shown, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="--screenshot needs Chromium or Chrome on the PATH"):
        shown.screenshot(tmp_path / "em.png")
