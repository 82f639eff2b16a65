"""What the dashboard shows of a run is what the run does."""

import asyncio
import base64
import io
import itertools
import json
import re
import shutil
import subprocess
import time
import urllib.request
import zlib

import numpy as np
import pytest
from bokeh.client import pull_session
from PIL import Image
from tornado.websocket import websocket_connect

from tests.helpers import SHAPE, Quiet, markers_of, settings
from volseg.engine import cluster, folder, metrics, monitor, schedule
from volseg.engine.ready import DONE, EMPTY, FAILED, OUT, READY, WAITING
from volseg.engine.receipts import RunStatistics
from volseg.engine.run_view import CELLS, COLORS, STATES, RunView, draw
from volseg.engine.stages import stages_of
from volseg.errors import IncompleteRunError
from volseg.evaluation.view import BROWSERS
from volseg.io import volume
from volseg.planning import prepare

PLAN = {"seconds": {"start": 0.0, "predict": 30.0, "instances": 10.0}, "total_seconds": 40.0, "inferred_voxels": 10,
        "redundancy": 1.0, "worker_bytes": 10**9, "written_bytes": 1}  # fmt: skip


def message(states, now=100.0, began=100.0, voxels=1000, seconds=None, **more):
    """What is told of a run with one stage that infers and one after it."""
    counts = states.shape
    stages = [
        {"name": name, "title": name, "counts": counts, "shape": counts, "voxels": voxels, "infers": name == "predict"}
        for name in ("predict", "fragments")
    ]
    done = int((states >= DONE).sum()) * voxels // states.size
    blocks = {"predict": (done, zlib.compress(states.tobytes()), (0, 0, 0), counts)}
    sums = {"inferred_voxels": 5, "device_share": 0.0, "worker_bytes": 10**8}
    head = {"run": "1", "name": "em.zarr", "began": began, "slots": 1, "plan": PLAN, "ended": ""}
    return {**head, "now": now, "stages": stages, "blocks": blocks, "seconds": seconds or {}, "sums": sums, **more}


def view(*told):
    run = RunView("em.zarr", told[0]["began"], PLAN)
    for one in told:
        run.tell(one)
    return run


# ---------------------------------------------------------------- what follows from what is told


def colors(picture):
    return picture.view(np.uint8).reshape(*picture.shape, 4)[..., :3]


def test_a_block_has_the_color_of_its_state():
    states = np.array([[WAITING, READY, OUT, FAILED, DONE, EMPTY]], np.uint8)
    names = ["waiting", "waiting", "running", "failed", "done", "nothing wanted"]
    np.testing.assert_array_equal(colors(draw(states))[0], [COLORS[name] for name in names])


def test_a_million_blocks_make_a_picture_of_bounded_size_in_which_one_that_failed_shows():
    states = np.full((1000, 1001), DONE, np.uint8)
    states[700, 3] = FAILED
    states[:, 600:] = WAITING
    picture = draw(states)
    assert max(picture.shape) <= CELLS
    failed = np.argwhere((colors(picture) == COLORS["failed"]).all(-1))
    np.testing.assert_array_equal(failed, [[175, 0]])
    assert tuple(colors(picture)[0, 0]) == COLORS["done"]
    assert tuple(colors(picture)[0, -1]) == COLORS["waiting"]


def test_every_block_is_counted_in_one_state():
    states = np.array([WAITING, READY, OUT, FAILED, DONE, EMPTY], np.uint8).reshape(1, 2, 3)
    stages = view(message(states)).stages
    counts = [stages["predict"].blocks()[name] for name in STATES]
    assert dict(zip(STATES, counts, strict=True)) == {
        "waiting": 2, "running": 1, "done": 1, "failed": 1, "nothing wanted": 1,
    }  # fmt: skip
    assert stages["fragments"].blocks()["waiting"] == 6


def test_time_left_is_planned_before_the_first_block_and_measured_after():
    states = np.zeros((1, 1, 4), np.uint8)
    first = message(states)
    assert view(first).outlook() == (0.0, 40.0)
    states[0, 0, :2] = DONE
    run = view(first, message(states, now=130.0, seconds={"predict": 15.0}))
    share, left = run.outlook()  # 15 s of 30 s are done of one stage, and none of the 10 s of the other
    assert share == pytest.approx(15 / 40)
    assert left == pytest.approx(30 * 25 / 15)
    assert run.rates()["predict"] == pytest.approx(500 / 30)
    assert run.rate_lines()["predict"] == ([30.0], [pytest.approx(500 / 30)])


def test_what_was_done_before_this_command_is_no_speed_of_it():
    states = np.zeros((1, 1, 4), np.uint8)
    states[0, 0, :2] = DONE
    run = view(message(states), message(states, now=110.0))
    assert run.rates()["predict"] == 0
    assert run.outlook()[0] == pytest.approx(15 / 40)


def test_a_line_of_speeds_is_smooth_where_blocks_end_in_steps():
    states, told = np.zeros((1, 1, 100), np.uint8), []
    for i in range(41):
        states[0, 0, : i // 4 * 4] = DONE  # four blocks of ten voxels every four seconds
        told.append(message(states, now=100.0 + i))
    times, speeds = view(*told).rate_lines()["predict"]
    assert times[-1] == 40.0
    assert all(6 <= speed <= 14 for speed in speeds[10:])


def test_speeds_of_long_runs_are_thinned():
    states = np.zeros((1, 1, 4), np.uint8)
    run = view(*(message(states, now=100.0 + i) for i in range(1500)))
    assert 300 <= len(run.history) <= 601


def test_a_scheduler_keeps_the_latest_runs_and_one_that_began_anew_once():
    pages, states = monitor.RunPages(), np.full((1, 1, 2), DONE, np.uint8)
    for i in range(6):
        pages.receive(message(states, run=str(i)))
    assert list(pages.runs) == ["2", "3", "4", "5"]
    pages.receive(message(states * 0, run="3", began=200.0, now=200.0))
    assert list(pages.runs) == ["2", "4", "5", "3"]
    assert pages.runs["3"].stages["predict"].done == 0


def test_metrics_name_runs_stages_and_states():
    states = np.array([DONE, OUT], np.uint8).reshape(1, 1, 2)
    found = {metric.name: metric for metric in metrics.run_metrics({"1": view(message(states))})}
    blocks = dict(found["volseg_blocks"].values)
    assert blocks["em.zarr", "predict", "done"] == blocks["em.zarr", "predict", "running"] == 1
    assert blocks["em.zarr", "fragments", "waiting"] == 2
    assert dict(found["volseg_voxels_done"].values)["em.zarr", "predict"] == 500
    assert dict(found["volseg_running"].values) == {("em.zarr",): 1.0}
    assert all(re.fullmatch(r"volseg_[a-z_]+", name) for name in found)
    assert all(len(labels) == len(metric.labels) for metric in found.values() for labels, _ in metric.values)


# ---------------------------------------------------------------- on a real scheduler


@pytest.fixture(scope="module")
def served(image, tmp_path_factory):
    """A client of a local cluster with a dashboard, on which a run has been done whose roi leaves blocks out."""
    out = str(tmp_path_factory.mktemp("served") / "run.volseg.zarr")
    wanted = {"input": {"roi": "0:9,0:150,0:170"}, "blocks": {"shape": (3, 150, 170)}}
    config = settings(**wanted, cluster={"workers": 1, "dashboard": "127.0.0.1:0"})
    run = prepare.from_image(volume.open(image), config, folder.partial_path(out))
    folder.begin(run, overwrite=False)
    with cluster.connect(config.cluster) as client:
        statistics = schedule.run_stages(client, run, markers_of(run), Quiet(), PLAN)
        yield client, run, statistics


def url(client, page):
    return cluster.dashboard(client).removesuffix("status") + page


def opened(client):
    """A session of the page, as a browser has one."""
    urllib.request.urlopen(url(client, "volseg"), timeout=30).read()  # where the page fails, a session waits forever
    return pull_session(url=url(client, "volseg"))


def view_of(client):
    """What the scheduler knows about the run."""
    return client.run_on_scheduler(lambda dask_scheduler: next(iter(dask_scheduler.plugins["volseg"].runs.values())))


def found(session, name):
    return session.document.select_one({"name": name})


def test_the_page_shows_the_run_and_where_nothing_was_wanted(served):
    client, run, statistics = served
    with opened(client) as session:
        head = found(session, "head").text
        assert run.out.removesuffix(".partial") in head
        assert "100.0 %" in head
        assert "done after" in head
        stages = set(found(session, "stage").options)
        assert {"predict", "fragments", "link", "stitch", "relabel"} <= stages
        titles = {line.rsplit(" ", 1)[0] for line in found(session, "rates").data["title"]}
        assert titles <= set(view_of(client).done_by_title())
        assert "million" not in found(session, "plan").text
        assert f"{statistics.inferred_voxels / 1e6:,.1f} M" in found(session, "plan").text
        assert len(found(session, "workers").data["name"]) == 1
        assert found(session, "layer").end == 7


def test_the_map_is_that_of_the_layer_and_stage_that_are_chosen(served):
    client = served[0]
    state = view_of(client)
    counts = state.stages["fragments"].blocks()
    assert counts == {"waiting": 0, "running": 0, "done": 3, "failed": 0, "nothing wanted": 5}
    assert state.stages["fragments"].states.shape == (3, 1, 1)
    np.testing.assert_array_equal(colors(state.stages["fragments"].picture(0))[0, 0], COLORS["done"])
    np.testing.assert_array_equal(colors(state.stages["fragments"].picture(5))[0, 0], COLORS["nothing wanted"])
    with opened(client) as session:
        assert "predict, layer 1 of 8" in found(session, "legend").text
        data = found(session, "map").data
        assert (data["dw"][0], data["dh"][0]) == (SHAPE[2], SHAPE[1])


def test_every_page_of_the_dashboard_has_a_link_to_it(served):
    page = urllib.request.urlopen(url(served[0], "workers"), timeout=30).read().decode()
    assert 'href="volseg"' in page


def test_a_million_blocks_are_on_the_page(served):
    """Whose picture of them is bounded."""
    client = served[0]
    states = np.random.default_rng(0).integers(0, EMPTY + 1, (1, 1000, 1000)).astype(np.uint8)
    client.run_on_scheduler(monitor.receive, message(states, run="large", name="large.zarr"))
    with opened(client) as session:
        assert "large.zarr" in found(session, "head").text
        assert max(found(session, "map").data["image"][0].shape) <= CELLS
        assert f"failed {(states == FAILED).sum():,}" in found(session, "legend").text
    client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.plugins["volseg"].runs.pop("large"))


def test_scheduler_and_workers_tell_prometheus(served):
    pytest.importorskip("prometheus_client", reason="needs prometheus-client (extra metrics)")
    client, run, _ = served
    text = urllib.request.urlopen(url(client, "metrics"), timeout=30).read().decode()
    assert f'volseg_blocks{{run="{run.out.removesuffix(".partial")}",stage="fragments",state="done"}} 3.0' in text
    ports = client.run(lambda dask_worker: dask_worker.http_server.port)
    for port in ports.values():
        told = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30).read().decode()
        assert 'volseg_worker_voxels_total{stage="fragments"}' in told


async def pictured(browser, profile, address):
    """A picture of a page once it has drawn all that there is, as PNG, and what went wrong in its scripts."""
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--no-first-run",
               "--window-size=1400,1000", "--remote-debugging-port=0", "--remote-allow-origins=*", "about:blank"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end, wrong = time.monotonic() + 60, []
    try:
        while not (found := (profile / "DevToolsActivePort")).exists() or not found.read_text():
            assert time.monotonic() < end
            await asyncio.sleep(0.1)
        port = found.read_text().split()[0]
        tabs = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=30))
        page = next(tab for tab in tabs if tab["type"] == "page")
        socket = await websocket_connect(page["webSocketDebuggerUrl"], max_message_size=1 << 26)

        async def call(method, **params):
            await socket.write_message(
                json.dumps({"id": (number := next(numbers)), "method": method, "params": params})
            )
            while (answer := json.loads(await socket.read_message())).get("id") != number:
                if answer.get("method") == "Runtime.exceptionThrown":
                    wrong.append(answer)
            return answer["result"]

        numbers = itertools.count(1)
        await call("Runtime.enable")
        await call("Page.navigate", url=address)
        drawn = "window.Bokeh !== undefined && Bokeh.documents.length > 0 && Bokeh.documents[0].is_idle"
        while not (await call("Runtime.evaluate", expression=drawn))["result"].get("value"):
            assert time.monotonic() < end
            await asyncio.sleep(0.1)
        picture = (await call("Page.captureScreenshot", format="png"))["data"]
        socket.close()
        return base64.b64decode(picture), wrong
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="needs Chromium or Chrome on the PATH")
def test_a_browser_draws_the_page(served, tmp_path):
    """With blocks of every state on it."""
    browser, client = next(filter(None, map(shutil.which, BROWSERS))), served[0]
    states = np.repeat(np.array([WAITING, OUT, DONE, FAILED, EMPTY], np.uint8), 20).reshape(1, 10, 10)
    client.run_on_scheduler(monitor.receive, message(states, run="drawn"))
    drawn, wrong = asyncio.run(pictured(browser, tmp_path, url(client, "volseg")))
    client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.plugins["volseg"].runs.pop("drawn"))
    assert wrong == []
    pixels = np.asarray(Image.open(io.BytesIO(drawn)).convert("RGB"))
    assert {name: int((pixels == color).all(-1).sum()) > 10_000 for name, color in COLORS.items()} == dict.fromkeys(
        COLORS, True
    )


def test_a_block_that_is_given_up_counts_as_failed(image, tmp_path):
    copy = tmp_path / "em.zarr"
    shutil.copytree(image, copy)
    config = settings(blocks={"shape": (11, 150, 170)}, cluster={"workers": 1, "tries": 1})
    run = prepare.from_image(volume.open(str(copy)), config, str(tmp_path / "run.partial"))
    folder.begin(run, overwrite=False)
    shard = next(copy.glob("0/c/0/1/*"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    statistics = RunStatistics(blocks={})
    stages = [stages_of(run)["predict"]]
    with (
        cluster.connect(config.cluster, light=True) as client,
        pytest.raises(IncompleteRunError, match="predict failed"),
    ):
        schedule._run_together(client, run, stages, markers_of(run), Quiet(), statistics)
    assert FAILED in statistics.blocks["predict"].state
