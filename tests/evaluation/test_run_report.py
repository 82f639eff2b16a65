"""The page about a run: all of it in one file, whatever the run is like."""

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import volseg
from tests.helpers import Quiet, settings
from volseg.errors import UserError
from volseg.evaluation import report_parts
from volseg.evaluation.view import BROWSERS

VOID = {"meta", "img", "br", "input", "link"}


class Page(HTMLParser):
    """Counts tags, and refuses those that do not close."""

    def __init__(self, text):
        super().__init__()
        self.open, self.heads, self.sources, self.text = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] == "h2":
            self.heads.append(data)


@pytest.fixture(scope="module")
def copied(reference, tmp_path_factory):
    """A run of the reference's own that tests may change."""
    place = tmp_path_factory.mktemp("report") / "run.volseg.zarr"
    shutil.copytree(reference, place)
    return place


def test_a_run_has_its_page_when_it_ends(reference):
    text = Path(reference, "report.html").read_text()
    page = Page(text)
    assert not page.open
    assert page.heads == ["Stages over time", "What workers did", "Plan and actual", "Blocks", "Sizes", "Examples",
                          "Least certain", "Settings that are no defaults", "Made with", "Log"]  # fmt: skip
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)  # nothing else is fetched
    assert re.findall(r"https?://", text.replace("http://127.0.0.1", "")) == []
    said = " ".join(page.text)
    assert f"{volseg.open(reference).object_count}" in said
    assert "stitch.min_voxels = 100" in said
    assert "predict    100 %" in said
    assert "report.html" not in json.loads(Path(reference, "manifest.json").read_text())


def test_the_map_holds_how_long_each_block_took(copied):
    volseg.segment(copied, settings=["blocks.shape=[11,75,170]"])
    _, fragments = (
        json.loads(text)
        for text in re.findall(r'type="application/json">(.*?)</script>', (copied / "report.html").read_text())
    )
    assert fragments["grid"] == [2, 2, 1]
    values = np.frombuffer(base64.b64decode(fragments["values"]), np.uint8)
    assert values.size == 4
    assert {values.min(), values.max()} == {2, 255}  # the fastest and the slowest
    assert 0 < fragments["low"] < fragments["high"]


def test_the_map_of_a_region_is_of_its_blocks(image, tmp_path):
    out = tmp_path / "part.volseg.zarr"
    config = settings(blocks={"shape": (4, 50, 60)}, input={"roi": "4:8,50:100,60:170"}, cluster={"workers": 1})
    volseg.infer(image, out, config=config, progress=Quiet())
    predict, fragments = (
        json.loads(text)
        for text in re.findall(r'type="application/json">(.*?)</script>', (out / "report.html").read_text())
    )
    assert fragments["grid"][0] in (1, 2, 3)
    assert fragments["whole"] == [6, 3, 3]
    for axis, edges in enumerate(fragments["edges"]):
        assert len(edges) == fragments["grid"][axis] + 1
        assert edges[0] == fragments["first"][axis] * (4, 50, 60)[axis]
    assert "under the region" in (out / "report.html").read_text()
    assert np.prod(predict["grid"]) <= np.prod(predict["whole"])


def test_of_many_blocks_some_are_read(copied, monkeypatch):
    monkeypatch.setattr(report_parts, "MAPPED_BLOCKS", 2)
    text = Path(volseg.report(copied)).read_text()
    assert "4 blocks, every 2th was read" in text


def test_a_cleaned_run_says_that_blocks_are_not_known(copied):
    volseg.api.clean(str(copied))
    assert "The work folder was cleaned" in Path(volseg.report(copied)).read_text()


def test_names_are_text_and_not_markup(copied, tmp_path):
    place = tmp_path / "<b>run & co.zarr"
    shutil.copytree(copied, place)
    page = Page(Path(volseg.report(place)).read_text())
    assert str(place) in page.text


def test_the_page_goes_where_it_is_asked_for(run, reference, tmp_path):
    code, out, _ = run("report", reference, "--out", tmp_path / "page.html", "--json")
    assert (code, json.loads(out)["page"]) == (0, str(tmp_path / "page.html"))
    assert (tmp_path / "page.html").stat().st_size < 2_000_000
    with pytest.raises(UserError, match="give another --out"):
        volseg.report(reference, tmp_path / "absent" / "page.html")


def test_an_odd_run_is_refused_in_a_line(copied, tmp_path):
    place = tmp_path / "odd.zarr"
    shutil.copytree(copied, place)
    facts = json.loads((place / "run.json").read_text())
    (place / "run.json").write_text(json.dumps({**facts, "worker_seconds": "many"}))
    with pytest.raises(UserError, match=r"run.json is damaged"):
        volseg.report(place)


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="needs Chromium or Chrome")
def test_a_browser_draws_the_map(reference, tmp_path):
    """The script runs: without it the line below a map is empty."""
    page = volseg.report(reference, tmp_path / "page.html")
    browser = next(filter(None, map(shutil.which, BROWSERS)))
    command = [
        browser,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
    ]
    done = subprocess.run([*command, f"file://{page}"], capture_output=True, text=True, timeout=60)
    assert re.search(r"<output[^>]*>layer 1 of 1: z 0 to 22</output>", done.stdout)
