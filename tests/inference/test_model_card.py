"""What a model file says of itself, and what it cannot make this machine do."""

import json
import socket
import subprocess
import sys
import threading
from contextlib import suppress

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers import CARD, SMALL
from volseg.config import Config
from volseg.errors import UserError
from volseg.inference import model
from volseg.inference.model_card import ModelCard, format_card
from volseg.inference.settings import BINNED_TILE, settings_of


def test_a_card_is_written_as_it_was_given():
    plain = {**CARD.to_json(), "motto": ["none"], "mean": 100, "int8": {"versions": {"nncf": "3"}, "held_out": None}}
    text = json.dumps(plain, indent=2)
    card = ModelCard.parse(text)
    assert card.text == text
    assert card.to_json() == plain
    assert list(card.changed(std=3.0).to_json()) == list(plain)


def test_a_card_is_a_value():
    assert ModelCard.from_json(CARD.to_json()) == CARD
    with pytest.raises(ValueError, match="frozen"):
        CARD.mean = 3.0


def test_the_shipped_card_keeps_what_it_was_trained_on():
    """Its record has keys in British spelling, from before the American one was chosen."""
    card = model.load_card(model.shipped())
    plain = card.to_json()
    assert [volume.unlabeled for volume in card.training.data] == [v["unlabelled"] for v in plain["training"]["data"]]
    assert card.training.first.first.steps == plain["training"]["first"]["first"]["steps"]
    assert ModelCard.from_json({**plain, "training": {"data": [{"unlabelled": 7}]}}).training.data[0].unlabeled == 7
    assert ModelCard.from_json({**plain, "training": {"data": [{"unlabeled": 8}]}}).training.data[0].unlabeled == 8


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"encoder": "tu-hf_hub:someone/network"}, "encoder = 'tu-hf_hub:someone/network'"),
        ({"encoder": "tu-hf-hub:someone/network"}, "encoder"),
        ({"encoder": "tu-local-dir:/etc"}, "encoder"),
        ({"encoder": "../network"}, "encoder"),
        ({"encoder": "resnet18\n"}, "encoder"),
        ({"encoder": ""}, "encoder"),
        ({"encoder": ["resnet18"]}, "encoder"),
        ({"decoder": [1 << 30, 16, 8, 8, 8]}, "decoder.0 = 1073741824"),
        ({"decoder": [16, 8, 8]}, "decoder"),
        ({"decoder": [0, 16, 8, 8, 8]}, "decoder.0 = 0"),
        ({"sections": 1001}, "sections = 1001"),
        ({"sections": 2}, "sections = 2: must be odd"),
        ({"binning": 0}, "binning = 0"),
        ({"binning": 1 << 20}, "binning"),
        ({"heads": []}, "heads"),
        ({"heads": ["mask", "mask"]}, "must name each head once"),
        ({"heads": ["\x1b[2J"]}, "heads.0"),
        ({"mean": float("nan")}, "mean"),
        ({"std": 0}, "std = 0"),
        ({"std": float("inf")}, "std"),
        ({"voxel_size_nm": [5, 5]}, "voxel_size_nm"),
        ({"voxel_size_nm": [5, 5, float("nan")]}, "voxel_size_nm.2"),
        ({"voxel_size_nm": [5, 5, -5]}, "voxel_size_nm.2 = -5"),
        ({"decode": [1]}, "decode"),
        ({"training": {"data": 3}}, "training.data = 3"),
        ({"int8": {"held_out": {"sections": "1:2"}}}, "nothing about 'int8.held_out.iou_int8'"),
    ],
)
def test_a_card_that_no_training_writes_is_refused_in_one_line(values, reason, tmp_path):
    path = tmp_path / "odd.safetensors"
    text = json.dumps({**CARD.to_json(), **values})
    save_file({"weight": torch.zeros(3)}, path, metadata={"volseg": text})
    for read in (model.load_card, model.load):
        with pytest.raises(UserError) as caught:
            read(path)
        assert reason in str(caught.value)
        assert str(caught.value).startswith(f"{path} is no volseg model: ")
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("key", ["name", "encoder", "decoder", "sections", "heads", "mean", "std", "decode"])
def test_a_card_without_a_value_that_is_needed_is_refused(key):
    with pytest.raises(UserError, match=f"nothing about '{key}'"):
        ModelCard.from_json({k: v for k, v in CARD.to_json().items() if k != key})


@pytest.mark.parametrize("text", ["", "[]", "3", '{"training":' * 5000, '{"first":' * 100_000])
def test_text_that_is_no_card_is_refused(text):
    with pytest.raises(UserError, match=r"\Amodel card: "):
        ModelCard.parse(text)


def test_a_header_of_absurd_depth_or_size_is_no_safetensors(tmp_path):
    for text in (b"[" * 200_000, b" " * (model.MAX_HEADER_BYTES + 1)):
        path = tmp_path / "odd.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(UserError, match="is not a safetensors file"):
            model.load_card(path)


def test_a_card_with_little_in_it_is_printed_too(tmp_path):
    path = tmp_path / "small.safetensors"
    path.write_bytes(b"")
    lines = format_card(path, CARD.changed(decode={})).splitlines()
    assert [line.split()[0] for line in lines] == ["model", "file", "network", "sees", "tells", "int8", "all"]
    assert lines[0] == "model     test: no use is given"


def test_a_card_cannot_move_the_cursor_of_a_terminal():
    card = CARD.changed(name="a\x1b[2J", use="b\nc", versions={"x\r": "1"})
    page = format_card(model.shipped(), card)
    assert all(c.isprintable() or c == "\n" for c in page)
    assert len(page.splitlines()) == len(format_card(model.shipped(), CARD).splitlines()) + 1, "versions, in one line"


@pytest.fixture
def contacted(monkeypatch):
    """Whatever asks a server on the network reaches this one; how each did."""
    found = []
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection, suppress(OSError):
                connection.settimeout(10)
                method, _, target = connection.recv(500).partition(b" ")
                if method == b"CONNECT" or target.startswith(
                    (b"http", b"/own/")
                ):  # other tests may ask at a port of before
                    found.append((method, target[:200]))

    thread = threading.Thread(target=serve)
    thread.start()
    url = f"http://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", f"{url}/own")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, url)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield found
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()


BUILD = """
import sys, warnings
warnings.simplefilter("ignore")
from volseg.errors import UserError
from volseg.inference import model
for encoder in sys.argv[1:]:
    try:
        model.build(encoder, (16, 16, 8, 8, 8), 3)
        print("built")
    except UserError as error:
        print("refused")
"""


def test_nothing_is_fetched_when_a_network_is_built(contacted):
    """Names with weights that smp and timm would fetch, and names that are addresses of files elsewhere."""
    encoders = [
        "tu-resnet18.a1_in1k",
        "resnet18",
        "mobilenet_v2",
        "tu-hf_hub:timm/resnet18.a1_in1k",
        "tu-hf-hub:a/b",
        "x:y",
    ]
    done = subprocess.run([sys.executable, "-c", BUILD, *encoders], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["built"] * 3 + ["refused"] * 3
    assert not contacted
    ask = "import huggingface_hub as h; h.hf_hub_download('a/b', 'c', etag_timeout=1)"
    subprocess.run([sys.executable, "-c", ask], capture_output=True, check=False, timeout=120)
    assert contacted, "what does ask is seen here"


def test_the_hub_stays_as_it_was_for_others():
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    model.build("resnet18", SMALL, 3)
    assert before == constants.HF_HUB_OFFLINE


def test_a_network_that_bins_takes_larger_tiles(tmp_path):
    assert model.load_card(model.shipped()).binning == 2
    assert settings_of().predict.tile == BINNED_TILE
    assert settings_of({"predict": {"tile": 640}}).predict.tile == 640
    assert settings_of(settings=["predict.tile=640"]).predict.tile == 640
    plain = tmp_path / "plain.safetensors"
    model.save(plain, torch.nn.Conv2d(3, 2, 1), CARD)
    assert settings_of(model_path=plain).predict.tile == Config().predict.tile
