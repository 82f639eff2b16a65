"""A run in Neuroglancer, from its Python package: nothing is fetched from elsewhere, and only this machine may look.

One server holds the page and the voxels, so one port is enough to look from another machine through ssh.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from volseg import system
from volseg.box import Box
from volseg.engine.export import LABELS, columns_of, frame_of, levels_of
from volseg.engine.finished import FinishedRun, open_run
from volseg.errors import UserError
from volseg.evaluation.review import Decision, open_reviewed
from volseg.evaluation.served import Served
from volseg.io import files, volume

IMAGE = "image"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
SCREENSHOT_S = 90  # until a page has to be drawn
PATCH = 256  # voxels along y and x of the part by which contrast is chosen
SHOWN_VOXELS = 500  # of a section that a panel shows
RED = "#uicontrol invlerp normalized\nvoid main() { emitRGBA(vec4(1.0, 0.3, 0.1, 0.6 * normalized())); }"
SCREENSHOT_PIXELS = (1200, 900)  # along x and y
SORTED = ">volume_um3 |length_nm |mean_probability"  # of the list of segments: the largest first, two columns more
READ_FAILED = 500  # HTTP status


@dataclass(frozen=True)
class Look:
    """Where to look: a voxel z y x of the labels from 0, the objects picked out there, and how many voxels to show."""

    center: tuple[float, float, float]
    objects: tuple[int, ...] = ()
    voxels: float = SHOWN_VOXELS
    decision: Decision | None = None


class View:
    """A run that is being shown at ``url`` until it is closed."""

    def __init__(self, run: FinishedRun, layers: dict[str, Served], look: Look, port: int) -> None:
        import neuroglancer

        self.run, self.layers, self.look = run, layers, look
        self.first = frame_of(run, layers[LABELS].levels[0]).first  # of the labels' voxels in the viewer, z y x
        if not neuroglancer.is_server_running():  # one server shows all runs of a process
            neuroglancer.set_server_bind_address("127.0.0.1", port)
        try:
            self.viewer = neuroglancer.Viewer()
        except OSError as error:
            raise UserError(f"port {port} is not free ({error.strerror}); give another --port, or none") from None
        self.server = neuroglancer.server.global_server
        self.root = f"{self.server.server_url}/volseg/{self.viewer.token}"
        _serve(self.server, self.viewer.token, layers)
        with self.viewer.txn() as state:
            _describe(state, run, layers, look, self.root)

    @property
    def url(self) -> str:
        """Where a browser on this machine finds it."""
        return str(self.viewer)

    def close(self) -> None:
        """The page and its voxels are served no longer."""
        import neuroglancer

        self.layers.clear()
        self.server.viewers.pop(self.viewer.token, None)
        if not self.server.viewers and neuroglancer.server.global_server is self.server:
            neuroglancer.stop()

    def __enter__(self) -> View:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def screenshot(self, path: str | os.PathLike, size: tuple[int, int] = SCREENSHOT_PIXELS) -> None:
        """A picture (PNG) of the panels, once all of them are drawn; by a browser without a window.

        Raises
        ------
        UserError
            Where there is no browser, or it draws nothing.
        """
        done, replies = threading.Event(), []

        def take(reply: Any) -> None:
            replies.append(reply.screenshot.image)
            done.set()

        with self.viewer.txn() as shown:
            shown.selected_layer.visible = False
            shown.cross_section_scale = 2 * self.look.voxels / min(size)
        with self.viewer.config_state.txn() as state:
            state.show_ui_controls, state.show_panel_borders, state.viewer_size = False, False, list(size)
        with _browser(self.url, size) as process:
            self.viewer.async_screenshot(take)
            end = time.monotonic() + SCREENSHOT_S
            while not done.wait(0.1):
                if process.poll() is not None or time.monotonic() > end:
                    raise UserError("the browser drew nothing; it needs WebGL 2, in software at least")
        files.write_bytes(str(Path(path).parent), Path(path).name, replies[0])


def view(
    run: str | os.PathLike | FinishedRun,
    *,
    object: int | None = None,
    review: int | None = None,
    image: str | os.PathLike | None = None,
    port: int = 0,
) -> View:
    """Show a finished run in Neuroglancer, on this machine.

    Layers are the volume, the probabilities (hidden at first) and the labels, with the object table as list of segments and,
    where zmesh is installed, meshes of the objects that are picked out.

    Parameters
    ----------
    run : path or FinishedRun
        A finished run.
    object : int, optional
        The label of an object to go to.
    review : int, optional
        The number, from 1, of an uncertain decision to go to: see `volseg.review`.
    image : path, optional
        The volume to show below the labels, where the run's own has moved or, of a run of probabilities, is not known.
    port : int
        On which to serve; any free one by default.

    Returns
    -------
    View
        With ``url``, ``screenshot(path)`` and ``close()``; it ends with the ``with`` block.

    Raises
    ------
    UserError
        Where there is no such run, object or decision, or the package is missing.

    Examples
    --------
    >>> with view("em.volseg.zarr", object=12) as shown:  # doctest: +SKIP
    ...     shown.screenshot("object.png")
    """
    system.require("neuroglancer", extra="view")
    opened = run if isinstance(run, FinishedRun) else open_run(os.fspath(run))
    layers = layers_of(opened, image)
    return View(opened, layers, _look(opened, layers[LABELS], object, review), port)


def napari_command(path: str) -> list[str]:
    """What shows the run at ``path`` in napari, which reads a run as the OME-Zarr image that it is; its labels alone where it
    keeps no probabilities."""
    run = open_run(path)
    return ["napari", "--plugin", "napari-ome-zarr", run.layout.labels_path if run.run.drops else path]


def layers_of(run: FinishedRun, image: str | os.PathLike | None = None) -> dict[str, Served]:
    """What is shown of a run, by name, from below."""
    columns, layers = columns_of(run), {}
    source = volume.open(os.fspath(image)) if image else _own_image(run)
    if source is not None:
        layers[IMAGE] = Served(IMAGE, _sized(volume.levels(source), run.voxel_size_nm))
    for head in () if run.run.drops else run.run.heads:
        layers[head] = Served(head, levels_of(run, head))
    meshed = system.installed("zmesh")
    layers[LABELS] = Served(LABELS, levels_of(run, LABELS), columns, meshed)
    return layers


def _sized(levels: tuple[volume.Volume, ...], size: tuple[float, float, float]) -> tuple[volume.Volume, ...]:
    """The levels with a voxel size: a source that tells none has that of the run."""
    return tuple(level if level.voxel_size_nm else replace(level, voxel_size_nm=size) for level in levels)


def _own_image(run: FinishedRun) -> volume.Volume | None:
    """The volume that the run was made of; None where it is gone, or the run was made of probabilities."""
    source = run.run.given or run.run.source
    if run.run.channels:
        return None
    try:
        source.read(Box((0, 0, 0), (1, 1, 1)))
    except (UserError, OSError):
        return None
    return source


# ---------------------------------------------------------------- where to look


def _look(run: FinishedRun, labels: Served, label: int | None, review: int | None) -> Look:
    if label is not None and review is not None:
        raise UserError("--object and --review go to two places; give one of them")
    if label is not None:
        return _look_at_object(run, labels, label)
    if review is not None:
        return _look_at_decision(run, review)
    z, y, x = (n / 2 for n in run.shape)
    return Look((z, y, x), voxels=max(run.shape[1:]))


def _look_at_object(run: FinishedRun, labels: Served, label: int) -> Look:
    found = labels.object(label)
    if found is None:
        raise UserError(f"the run has no object {label}; its object table lists them: {run.layout.objects_path}")
    row = int(np.searchsorted(labels.columns["id"], label))
    size = labels.levels[0].voxel_size_nm
    center = [
        float(labels.columns[f"centroid_{axis}_nm"][row]) / nm + 0.5 for axis, nm in zip("zyx", size, strict=True)
    ]
    return Look(_inside(labels, found.box, label, center), (label,), 2 * max(found.box.shape[1:]))


def _inside(labels: Served, box: Box, label: int, center: list[float]) -> tuple[float, float, float]:
    """A voxel of the object near its centroid, which may lie beside a bent one: in the section of the centroid, if any."""
    z = min(max(int(center[0]), box.start[0]), box.stop[0] - 1)
    section = labels.levels[0].read(Box((z, *box.start[1:]), (z + 1, *box.stop[1:])))[0]
    y, x = np.nonzero(section == label)
    if not y.size:
        return center[0], center[1], center[2]
    distance = (y + box.start[1] + 0.5 - center[1]) ** 2 + (x + box.start[2] + 0.5 - center[2]) ** 2
    nearest = int(distance.argmin())
    return z + 0.5, float(y[nearest]) + box.start[1] + 0.5, float(x[nearest]) + box.start[2] + 0.5


def _look_at_decision(run: FinishedRun, number: int) -> Look:
    decisions = open_reviewed(run.path).decisions
    if not 1 <= number <= len(decisions):
        raise UserError(f"the run has {len(decisions)} decisions to review, and no number {number}")
    decision = decisions[number - 1]
    both = tuple(dict.fromkeys((decision.label_a, decision.label_b)))
    return Look((decision.z + 0.5, decision.y + 0.5, decision.x + 0.5), both, 200, decision)


# ---------------------------------------------------------------- what Neuroglancer is told


def _describe(state: Any, run: FinishedRun, layers: dict[str, Served], look: Look, root: str) -> None:
    """The state of the viewer."""
    import neuroglancer

    size, first = run.voxel_size_nm, frame_of(run, layers[LABELS].levels[0]).first
    state.dimensions = _space(size)
    state.position = [n + a for n, a in zip(look.center[::-1], first[::-1], strict=True)]
    state.cross_section_scale = max(look.voxels / SHOWN_VOXELS, 0.05)
    state.projection_scale = 1.5 * look.voxels
    state.layout = "4panel"
    for name, served in layers.items():
        source: Any = f"precomputed://{root}/{name}"
        if any(begin := _begin_nm(run, layers[LABELS].levels[0], served.levels[0])):
            source = neuroglancer.LayerDataSource(url=source, transform=_moved(served.levels[0].voxel_size_nm, begin))
        if name == LABELS:
            state.layers[name] = neuroglancer.SegmentationLayer(source=source, segments=list(look.objects))
            layer = state.layers[name]
            layer.selected_alpha, layer.not_selected_alpha, layer.tab = 0.3, 0.15 if look.objects else 0.0, "segments"
            layer.segment_query = SORTED
        elif name == IMAGE:
            low, high = _contrast(served)
            controls = {"normalized": {"range": [low, high]}}
            state.layers[name] = neuroglancer.ImageLayer(source=source, shader_controls=controls)
        else:
            state.layers[name] = neuroglancer.ImageLayer(source=source, shader=RED)
            state.layers[name].visible = False
    if look.decision is not None:
        saddle = neuroglancer.PointAnnotation(id="saddle", point=state.position, description=str(look.decision))
        state.layers["review"] = neuroglancer.LocalAnnotationLayer(state.dimensions, annotations=[saddle])
    state.selected_layer.layer, state.selected_layer.visible = LABELS, True


def _space(size: tuple[float, ...]) -> Any:
    import neuroglancer

    return neuroglancer.CoordinateSpace(names=["x", "y", "z"], units="nm", scales=list(size[::-1]))


def _moved(size: Any, begin: tuple[float, ...]) -> Any:
    """What moves voxels of ``size`` so that the outer corner of the first one lies at ``begin`` (nm, z y x)."""
    import neuroglancer

    row = np.array([n / length for n, length in zip(begin, size, strict=True)])[::-1]
    matrix = np.concatenate([np.eye(3), row[:, None]], axis=1)
    return neuroglancer.CoordinateSpaceTransform(output_dimensions=_space(size), matrix=matrix)


def _begin_nm(run: FinishedRun, labels: volume.Volume, level: volume.Volume) -> tuple[float, ...]:
    """The outer corner of a layer's first voxel (nm, z y x), in a world where the labels begin with a whole voxel.

    What covers as much space as the labels lies where they do, whatever it says; any other volume where it says.
    """
    begin, sizes = np.array(frame_of(run, labels).begin_nm), np.array([labels.voxel_size_nm, level.voxel_size_nm])
    extents = sizes * [labels.shape, level.shape]
    if (np.abs(extents[1] - extents[0]) > sizes.max(0)).any():
        corners = np.array([labels.origin_nm, level.origin_nm]) - sizes / 2
        begin += corners[1] - corners[0]
    return tuple(begin.tolist())


def _contrast(served: Served) -> tuple[float, float]:
    """Gray values that are shown black and white: percentiles of a part in the middle of the coarsest level."""
    level = served.levels[-1]
    start = [max(0, (n - edge) // 2) for n, edge in zip(level.shape, (1, PATCH, PATCH), strict=True)]
    stop = [min(n, a + edge) for n, a, edge in zip(level.shape, start, (1, PATCH, PATCH), strict=True)]
    low, high = np.percentile(level.read(Box(tuple(start), tuple(stop))), [0.5, 99.5]).tolist()
    return (low, high) if high > low else (low, low + 1)


def _serve(server: Any, token: str, layers: dict[str, Served]) -> None:
    """The server of the page answers for the layers, too."""
    from tornado.ioloop import IOLoop
    from tornado.web import RequestHandler

    class Layers(RequestHandler):
        async def get(self, name: str, path: str) -> None:
            served = layers.get(name)
            try:
                found = await IOLoop.current().run_in_executor(server.executor, served.answer, path) if served else None
            except (UserError, OSError) as error:  # a source that is damaged, or gone since
                self.set_status(READ_FAILED, " ".join(str(error).split())[:200].encode("ascii", "replace").decode())
                return
            if found is None:
                self.set_status(404)
                return
            data, kind = found
            self.set_header("Content-Type", kind)
            self.finish(data)

    added = threading.Event()

    def add() -> None:
        server.app.add_handlers(r".*", [(rf"/volseg/{token}/([^/]+)/(.+)", Layers)])
        added.set()

    server.loop.call_soon_threadsafe(add)
    added.wait()


# ---------------------------------------------------------------- browsers


@contextmanager
def _browser(url: str, size: tuple[int, int]) -> Iterator[subprocess.Popen]:
    """A browser without a window that shows the page, drawing in software where there is no GPU."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise UserError(
            "--screenshot needs Chromium or Chrome on the PATH (apt-get install chromium); without it, open the URL"
        )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = [
            "--headless=new", f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}", "--no-first-run",
            "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--disable-dev-shm-usage", "--mute-audio",
            *(["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []),
        ]  # fmt: skip
        process = subprocess.Popen([found, *options, url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
