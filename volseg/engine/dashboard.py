"""The page of runs in the Dask dashboard, ``/volseg``: progress, speeds, a map of blocks, workers, plan against actual."""

from __future__ import annotations

import html
from collections.abc import Callable
from functools import partial
from typing import Any

from bokeh.document import Document
from bokeh.layouts import column, row
from bokeh.models import ColumnDataSource, Range1d
from bokeh.models.widgets import DataTable, Div, NumberFormatter, Select, Slider, TableColumn
from bokeh.plotting import figure
from bokeh.server.tornado import BokehTornado
from distributed import Scheduler
from tornado.ioloop import IOLoop

from volseg.engine.run_view import COLORS, STATES, RunView, StageView, share_by_state
from volseg.progress import duration

NAME = "volseg"
REFRESH_MS = 1000
MAP_PIXELS = 520
LISTED_WORKERS = 500
UNDER_WAY = "under way"  # the choice of a stage that goes with the run
LINES = (
    "#0f766e", "#b45309", "#4338ca", "#be123c", "#4d7c0f", "#0369a1", "#7e22ce", "#57534e", "#a16207", "#155e75",
)  # fmt: skip
PLANNED: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("voxels through the network", "inferred_voxels", lambda n: f"{n / 1e6:,.1f} M"),
    ("memory, largest worker", "worker_bytes", lambda n: f"{n / 1e9:.2f} GB"),
)


def add_page(scheduler: Scheduler, runs: dict[str, RunView]) -> Callable[[], None]:
    """The scheduler's dashboard has the page, and a link to it on each of its pages; the function returned ends it."""
    from distributed.dashboard.core import BokehApplication
    from distributed.dashboard.scheduler import template_variables

    http = getattr(scheduler, "http_application", None)
    served = [app for app in getattr(http, "applications", ()) if isinstance(app, BokehTornado)]
    if not served:
        return lambda: None
    variables = template_variables(scheduler)
    if NAME not in variables["pages"]:
        variables["pages"].append(NAME)  # the list that the other pages have, too
    app = BokehApplication(
        {f"/{NAME}": partial(page, runs)}, scheduler, prefix=served[0].prefix, template_variables=variables
    )
    app.initialize(IOLoop.current())
    http.add_application(app)
    app.start()
    return app.stop


def page(runs: dict[str, RunView], scheduler: Scheduler, variables: dict[str, Any], doc: Document) -> None:
    """Fills a document, which is kept up to date for as long as somebody looks at it."""
    from distributed.dashboard.components.scheduler import BOKEH_THEME, env

    shown = _Page(runs, scheduler)
    shown.update()
    doc.title = "Dask: volseg"
    doc.add_root(shown.root)
    doc.template = env.get_template("simple.html")
    doc.template_variables.update(variables)
    doc.theme = BOKEH_THEME
    doc.add_periodic_callback(shown.update, REFRESH_MS)


class _Page:
    """What one browser looks at: its choice of run, stage and layer."""

    def __init__(self, runs: dict[str, RunView], scheduler: Scheduler) -> None:
        self.runs, self.scheduler = runs, scheduler
        self.run = Select(title="run", options=[], name="run", visible=False)
        self.head = Div(name="head", sizing_mode="stretch_width", stylesheets=[":host .bk-clearfix {width: 100%}"])
        self.rates = _Rates()
        self.map = _Map()
        self.plan = Div(name="plan")
        self.workers = ColumnDataSource(_workers(scheduler), name="workers")
        for choice in (self.run, self.map.stage, self.map.layer):
            choice.on_change("value", lambda attr, old, new: self.update())
        left = column(self.map.root, width=MAP_PIXELS + 60)
        right = column(self.rates.root, self.plan, _workers_table(self.workers), sizing_mode="stretch_width")
        self.root = column(
            self.run, self.head, row(left, right, sizing_mode="stretch_width"), sizing_mode="stretch_width"
        )

    def update(self) -> None:
        """All is as it is now."""
        _set(self.run, options=[(key, run.name) for key, run in self.runs.items()], visible=len(self.runs) > 1)
        self.workers.data = _workers(self.scheduler)
        run = self.runs.get(self.run.value) or next(reversed(self.runs.values()), None)
        if run is None:
            _set(self.head, text="<h2>no run yet</h2>")
            return
        _set(self.head, text=_head(run))
        _set(self.plan, text=_plan(run))
        self.rates.update(run)
        self.map.update(run)


def _set(model: Any, **values: Any) -> None:
    """Only what differs is sent to the browser."""
    changed = {name: value for name, value in values.items() if getattr(model, name) != value}
    if changed:
        model.update(**changed)


# ---------------------------------------------------------------- progress


def _head(run: RunView) -> str:
    """Name, bar, time left, and how many of all blocks are in which state."""
    share, left = run.outlook()
    took = duration(run.now - run.began)
    state = (
        f"{run.ended} after {took}" if run.ended else f"{took} so far" + (f", {duration(left)} left" if left else "")
    )
    shares = share_by_state(run.stages.values())
    bar = "".join(
        f'<i style="display:inline-block;height:14px;width:{100 * part:.2f}%;background:{_css(name)}"></i>'
        for name in ("done", "running", "failed", "waiting", "nothing wanted")
        if (part := shares[name])
    )
    told = ", ".join(f"{100 * part:.3g} % {name}" for name, part in shares.items() if part)
    return (
        f'<h2 style="margin:4px 0">{html.escape(run.name)}</h2><div style="font-size:22px">{100 * share:.1f} % '
        f'<span style="font-size:15px">{state}</span></div><div style="width:100%;white-space:nowrap;font-size:0">{bar}</div>'
        f"<div>blocks of all stages: {told}</div>"
    )


def _css(state: str) -> str:
    return f"rgb{COLORS[state]}"


def _plan(run: RunView) -> str:
    """Plan against actual, as a table."""
    took, left = run.now - run.began, run.outlook()[1]
    rows = []
    if run.plan:
        ends = took if run.ended or left is None else took + left
        rows = [("time of the whole run", duration(run.plan["total_seconds"]), duration(ends))]
        rows += [(name, show(run.plan[key]), show(run.sums[key])) for name, key, show in PLANNED]
    if run.sums.get("device_share"):
        rows.append(("share of inference in which the device computed", "", f"{100 * run.sums['device_share']:.0f} %"))
    cells = ("".join(f"<td style='padding:1px 12px 1px 0'>{html.escape(cell)}</td>" for cell in one) for one in rows)
    body = "".join(f"<tr>{one}</tr>" for one in cells)
    head = "<tr><th></th><th align=left>plan</th><th align=left>actual</th></tr>"
    return f"<table>{head}{body}</table>" if rows else ""


class _Rates:
    """Voxels per second of each stage over time."""

    def __init__(self) -> None:
        self.source = ColumnDataSource({"xs": [], "ys": [], "color": [], "title": []}, name="rates")
        self.root = figure(
            title="voxels/s by stage", height=260, sizing_mode="stretch_width", toolbar_location=None,
            x_axis_label="s since the first stage began", y_axis_label="million voxels/s", tools="",
        )  # fmt: skip
        self.root.multi_line("xs", "ys", color="color", line_width=2, source=self.source, legend_field="title")
        self.root.legend.location = "top_left"

    def update(self, run: RunView) -> None:
        lines, rates = run.rate_lines(), run.rates()
        titles = [title for title, (_, speeds) in lines.items() if any(speeds)]
        self.source.data = {
            "xs": [lines[title][0] for title in titles],
            "ys": [[speed / 1e6 for speed in lines[title][1]] for title in titles],
            "color": [LINES[i % len(LINES)] for i in range(len(titles))],
            "title": [f"{title} {rates.get(title, 0) / 1e6:.2f}" for title in titles],
        }


# ---------------------------------------------------------------- blocks


class _Map:
    """The blocks of one stage in one layer."""

    def __init__(self) -> None:
        self.stage = Select(title="stage", options=[UNDER_WAY], value=UNDER_WAY, name="stage", width=200)
        self.layer = Slider(title="layer of blocks (z)", start=0, end=1, value=0, step=1, name="layer", width=280)
        self.source = ColumnDataSource({"image": [], "x": [], "y": [], "dw": [], "dh": []}, name="map")
        self.figure = figure(
            width=MAP_PIXELS, height=MAP_PIXELS, x_axis_label="x (voxels)", y_axis_label="y (voxels)", toolbar_location=None,
            x_range=Range1d(0, 1), y_range=Range1d(1, 0), tools="",
        )  # fmt: skip
        self.figure.image_rgba("image", x="x", y="y", dw="dw", dh="dh", source=self.source)
        self.figure.grid.visible = False
        self.legend = Div(name="legend")
        self.root = column(row(self.stage, self.layer), self.figure, self.legend)
        self.drawn: tuple = ()

    def update(self, run: RunView) -> None:
        _set(self.stage, options=[UNDER_WAY, *run.stages])
        name = self.stage.value if self.stage.value in run.stages else _under_way(run)
        stage = run.stages[name]
        _set(self.layer, end=max(1, stage.counts[0] - 1), disabled=stage.counts[0] == 1)
        z = min(int(self.layer.value), stage.counts[0] - 1)
        depth = -(-stage.shape[0] // stage.counts[0])
        counts = stage.blocks()
        keys = "".join(
            f'<span style="margin-right:12px"><i style="display:inline-block;width:12px;height:12px;background:{_css(state)};'
            f'border:1px solid #94a3b8"></i> {state} {counts[state]:,}</span>'
            for state in STATES
        )
        _set(self.legend, text=f"{keys}<br>{name}, layer {z + 1} of {stage.counts[0]}, from section {z * depth} on")
        drawn = (run.began, name, z, id(stage.states))
        if drawn != self.drawn:
            self.drawn = drawn
            self._draw(stage, z)

    def _draw(self, stage: StageView, z: int) -> None:
        _, height, width = stage.shape
        longest = max(height, width)
        self.source.data = {"image": [stage.picture(z)], "x": [0], "y": [0], "dw": [width], "dh": [height]}
        _set(self.figure.x_range, end=longest)
        _set(self.figure.y_range, start=longest)


def _under_way(run: RunView) -> str:
    """The last stage that runs, else the first."""
    running = [name for name, stage in run.stages.items() if stage.blocks()["running"]]
    return running[-1] if running else next(iter(run.stages))


# ---------------------------------------------------------------- workers


def _workers_table(source: ColumnDataSource) -> DataTable:
    number, share = NumberFormatter(format="0.00"), NumberFormatter(format="0 %")
    columns = [
        TableColumn(field="name", title="worker"),
        TableColumn(field="running", title="running"),
        TableColumn(field="queue", title="queue"),
        TableColumn(field="device", title="device", formatter=share),
        TableColumn(field="memory", title="memory (GB)", formatter=number),
        TableColumn(field="voxels", title="million voxels", formatter=number),
    ]
    return DataTable(source=source, columns=columns, index_position=None, height=260, sizing_mode="stretch_width")


def _workers(scheduler: Scheduler) -> dict[str, list]:
    """Of each worker, the first `LISTED_WORKERS`: what it is doing, what it holds, what it has done."""
    workers = sorted(scheduler.workers.values(), key=lambda worker: str(worker.name))[:LISTED_WORKERS]
    metrics = [worker.metrics or {} for worker in workers]
    return {
        "name": [str(worker.name) for worker in workers],
        "running": [len(worker.executing) for worker in workers],
        "queue": [one.get("volseg_queue", 0) for one in metrics],
        "device": [one.get("volseg_device_share", 0.0) for one in metrics],
        "memory": [one.get("memory", 0) / 1e9 for one in metrics],
        "voxels": [one.get("volseg_voxels", 0) / 1e6 for one in metrics],
    }
