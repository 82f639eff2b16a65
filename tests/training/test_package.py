"""Models for others: bioimage.io's own library passes the package, and gets from it what volseg gets from the model."""

import gc
import shutil

import numpy as np
import pytest
import yaml

from tests.helpers import CARD, onnx_network, run_stages, write_volume
from volseg.box import Box
from volseg.config import Predict
from volseg.errors import UserError
from volseg.evaluation.synthetic import synth
from volseg.inference import backends, export, model
from volseg.inference.model_file import model_file
from volseg.io import arrays
from volseg.training import package
from volseg.training.package import export_model

UNRAISABLE = "pytest.PytestUnraisableExceptionWarning"

# The library leaves the files of a package to the garbage collector, which tells of it.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("ResourceWarning", UNRAISABLE)]


@pytest.fixture(autouse=True, scope="module")
def core():
    """The library; what it leaves open is told of here, not in another test."""
    yield pytest.importorskip("bioimageio.core")
    gc.collect()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small model file, its weights at random."""
    import torch

    torch.manual_seed(3)
    card = CARD.changed(use="tests", voxel_size_nm=[8.0, 5.0, 5.0], scores={"test": {"em": {"iou": 0.5}}})
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    model.save(path, model.build(card.encoder, card.decoder, card.sections, card.heads), card)
    return path


@pytest.fixture(scope="module")
def packed(trained):
    return export_model(trained, trained.with_name("net.zip"), authors=("A. Lovelace",), license="MIT")


def test_bioimageio_core_gets_from_a_package_what_a_run_gets_from_the_model(core, trained, packed, tmp_path):
    image = np.maximum(synth(Box.from_shape((1, 96, 128)), seed=4)[0], 1)  # 0 is padding to volseg
    em = write_volume(str(tmp_path / "em.zarr"), image, (8.0, 5.0, 5.0))
    run, _ = run_stages(em, tmp_path / "run.zarr", predict={"model": str(trained), "tile": 128, "precision": "fp32"})
    own = arrays.node(run.out, "0")[:, 0] / 255

    tensor = np.repeat(image, 3, axis=0)[None].astype(np.float32)  # beyond its ends a volume goes on as it is there
    shutil.unpack_archive(packed, tmp_path / "net")
    described = core.load_description(tmp_path / "net" / "rdf.yaml")
    theirs = core.predict(model=described, inputs={"image": tensor}).members["probability"].data.to_numpy()
    assert own.std() > 0.01, "there is something to compare"
    assert np.abs(theirs[0] - own).max() <= 1 / 255


def test_what_is_exported_is_read_back_with_all_that_its_card_says(trained, packed, tmp_path):
    tiles = np.random.default_rng(0).normal(size=(1, 3, 64, 96)).astype(np.float32)
    own, card = export.export_model(trained, "openvino"), model.load_card(trained)
    expected = backends.load(own, "openvino", "fp32", tiles.shape)(tiles)
    shutil.unpack_archive(packed, tmp_path / "folder")
    for path in (packed, tmp_path / "folder", export_model(packed, tmp_path / "net.onnx")):
        file = model_file(Predict(model=str(path)))
        other = model.load_card(file)
        for name in ("name", "use", "sections", "heads", "voxel_size_nm", "decode", "scores", "multiple", "told_heads"):
            assert getattr(other, name) == getattr(card, name), name
        made = backends.load(export.export_model(file, "openvino"), "openvino", "fp32", tiles.shape)(tiles)
        np.testing.assert_allclose(made, expected, atol=1e-4)
    described = yaml.safe_load((tmp_path / "folder" / "rdf.yaml").read_text())
    assert [(axis["scale"], axis["unit"]) for axis in described["inputs"][0]["axes"][2:]] == [(5.0, "nanometer")] * 2
    assert (described["license"], described["authors"][0]["name"]) == ("MIT", "A. Lovelace")
    assert "em: {'iou': 0.5}" in (tmp_path / "folder" / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "kind", "standard"),
    [
        ({}, "zero_mean_unit_variance", (4.5, 99**0.5 / 12**0.5)),
        ({"decode": {"predict": {"normalize": "model"}}}, "fixed_zero_mean_unit_variance", (100.0, 20.0)),
        ({"graph": {"origin": "", "heads": ["mask"], "percentiles": [0, 50]}}, "scale_range", (0.0, 4.5)),
    ],
)
def test_the_package_standardizes_as_a_run_does(changes, kind, standard):
    step, mean, std = package._preprocessing(CARD.changed(**changes), np.arange(10.0))
    assert step.id == kind
    assert (mean, std) == pytest.approx(standard)


def test_a_network_of_others_goes_into_a_folder_that_is_not_replaced(tmp_path):
    out, path = tmp_path / "folder", onnx_network(tmp_path / "net.onnx", inputs=3)
    out.mkdir()
    with pytest.raises(UserError, match="exists; give another name, or --overwrite"):
        export_model(path, out)
    em = write_volume(str(tmp_path / "em.zarr"), np.ones((3, 60, 200), np.uint8))
    with pytest.raises(UserError, match="smaller than the 3 x 128 x 128 voxels that the test takes"):
        export_model(path, out, image=em, overwrite=True)
    em = write_volume(str(tmp_path / "large.zarr"), synth(Box.from_shape((5, 130, 140)), seed=4)[0])
    made = export_model(path, out, image=em, overwrite=True)
    assert sorted(file.name for file in made.iterdir()) == [
        "README.md", "image.npy", "model.onnx", "probability.npy", "rdf.yaml",
    ]  # fmt: skip
