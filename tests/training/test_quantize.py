"""A model's INT8 form: it is close to the network, its bits depend on nothing else, and a run knows what it took."""

import shutil

import numpy as np
import pytest

from tests.helpers import CARD, Quiet, settings
from volseg import api
from volseg.engine import folder, pipeline
from volseg.errors import UserError
from volseg.inference import backends, export, model
from volseg.inference.normalization import gray_statistics
from volseg.io import arrays, volume
from volseg.planning import prepare as describe
from volseg.training import quantize as quantize

SHAPE = (3, 96, 128)


@pytest.fixture(scope="module")
def quantized(image, tmp_path_factory):
    """The shipped model with an INT8 form calibrated on a few synthetic sections."""
    path = tmp_path_factory.mktemp("int8") / "model.safetensors"
    shutil.copy(model.shipped(), path)
    quantize.quantize(path, image, sections=("0:3",), truth=f"{image}/labels/truth/0", held_out=("8:12",))
    return path


@pytest.fixture(scope="module")
def tile(image):
    source = volume.open(image)
    statistics = gray_statistics(source.shape, source.read)
    (whole,) = quantize._calibration_tiles(source, [15], CARD, statistics)
    return np.ascontiguousarray(whole[..., :96, :128])


def network(path, precision, batch=1, threads=1):
    blob = export.export_model(path, "openvino", precision)
    return backends.load(blob, "openvino", precision, (batch, *SHAPE), threads)


def test_the_card_says_what_int8_costs(quantized):
    facts = model.load_card(quantized).to_json()["int8"]
    assert facts["calibrated"]["sections"] == [0, 1, 2]
    held = facts["held_out"]
    assert held["iou_fp32"] > 0.6
    assert abs(held["iou_fp32"] - held["iou_int8"]) < 0.03
    assert held["mean_difference"] < 2 / 255
    assert "8:12" in quantize.format_facts(facts)


def test_the_weights_are_left_as_they_are(quantized):
    before, after = (model.load(path)[0].state_dict() for path in (model.shipped(), quantized))
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() for name in before)
    assert model.network_digest(model.shipped()) == model.network_digest(quantized)


def test_int8_is_close_to_fp32_but_not_the_same(quantized, tile):
    left, right = (network(quantized, precision)(tile) for precision in ("fp32", "int8"))
    assert 0 < np.abs(left - right).mean() < 2 / 255


@pytest.mark.parametrize(("batch", "threads"), [(1, 2), (4, 2)])
def test_int8_bits_depend_on_neither_threads_nor_batch(quantized, tile, batch, threads):
    tiles = [np.roll(tile, i, axis=-1) for i in range(4)]
    one = network(quantized, "int8")
    wanted = np.concatenate([one(t) for t in tiles])
    many = network(quantized, "int8", batch, threads)
    parts = [(i, np.concatenate(tiles[i : i + batch])) for i in range(0, 4, batch)]
    got = np.concatenate([out for _, out in backends.imap(many, parts, threads)])
    np.testing.assert_array_equal(got, wanted)


def test_blocks_change_no_probability_in_int8(image, quantized, tmp_path):
    stored = []
    for block in ((22, 150, 170), (5, 64, 101)):
        config = settings(predict={"model": str(quantized), "precision": "int8"}, blocks={"shape": block})
        run = describe.from_image(volume.open(image), config, str(tmp_path / f"{block[0]}.partial"))
        assert run.engine.precision == "int8"
        folder.begin(run, overwrite=False)
        for i in range(len(run.predict_grid)):
            pipeline.process_block(run.out, run.id, "predict", i)
        stored.append(arrays.open_array(run.out, "0")[:])
    np.testing.assert_array_equal(*stored)


def test_a_run_begun_in_int8_goes_on_in_no_other_precision(image, quantized, tmp_path):
    out = str(tmp_path / "run.volseg.zarr")
    config = settings(predict={"model": str(quantized), "precision": "int8"})
    folder.begin(describe.from_image(volume.open(image), config, f"{out}.partial"), overwrite=False)
    other = settings(predict={"model": str(quantized), "precision": "fp32"})
    with pytest.raises(UserError, match=r"precision = 'int8', this one 'fp32'"):
        api.infer(image, out, config=other, progress=Quiet())


def test_a_model_without_the_form_is_refused(quantized, tmp_path):
    network, card = model.load(quantized)
    model.save(tmp_path / "plain.safetensors", network, card.changed(int8=None))
    with pytest.raises(UserError, match="carries no quantized form; make it with volseg quantize"):
        model.quantized(tmp_path / "plain.safetensors")


def test_only_openvino_computes_in_int8():
    with pytest.raises(UserError, match="'int8' is not offered by the onnx backend; it has fp32"):
        backends.choose("onnx", "int8")


@pytest.mark.parametrize(("loss", "allowed"), [(0.0, True), (0.0029, True), (0.0031, False)])
def test_auto_may_take_what_loses_little(loss, allowed):
    held_out = {"sections": "8:12", "iou_fp32": 0.9, "iou_int8": 0.9 - loss}
    assert CARD.changed(int8={"held_out": held_out}).int8_allowed is allowed
    assert not CARD.changed(int8={}).int8_allowed
    assert not CARD.int8_allowed


def test_sections_to_calibrate_on_are_not_held_out(image, quantized):
    with pytest.raises(UserError, match="section 8 is both"):
        quantize.quantize(quantized, image, sections=("0:9",), truth=image, held_out=("8:12",))


@pytest.mark.parametrize("held", [(), ("8", "10")])
def test_what_is_held_out_is_one_range_and_that_is_said_at_once(image, quantized, held):
    with pytest.raises(UserError, match="give one range without gaps"):
        quantize.quantize(quantized, image, sections=("0:3",), truth=f"{image}/labels/truth/0", held_out=held)


@pytest.mark.parametrize("decode", [{"height": "distance", "distance_nm": 100.0}, {"height": "head"}, {"contour": 0.3}])
def test_the_foreground_is_the_same_whatever_objects_are_cut_by(decode):
    probability = np.full((2, 3, 16, 16), 200, np.uint8)
    probability[:, :, :8] = 0
    real = np.zeros((3, 16, 16), bool)
    real[:, 8:] = True
    found = quantize.foreground_iou(probability, real, CARD.changed(decode={"fragments": decode}))
    assert found == quantize.foreground_iou(probability, real, CARD.changed(decode={})) > 0.8
