"""`volseg infer` on real EM, from command to prompt, and its scores on sections that the model never saw."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from benchmarks import report
from volseg.box import Box
from volseg.evaluation.evaluate import evaluate


def measure(image: str, truth: str, box: str, models: tuple[str, ...], repeats: int, out: str, workers: int) -> None:
    """A row for each model, all run in turn: median wall-clock seconds; of its last run peak memory, and scores on ``box``."""
    took: dict[str, list[float]] = {file: [] for file in models}
    for _ in range(repeats):
        for file in models:
            took[file].append(_infer(image, file, _place(out, file), workers))
    report.keep("epfl", [_row(truth, box, file, _place(out, file), seconds) for file, seconds in took.items()])


def _place(out: str, file: str) -> str:
    """Where a model's run goes: the shipped one's to ``out``."""
    if not file:
        return out
    name = "-".join(Path(file).with_suffix("").parts[-3:]).strip("/-")
    return out.removesuffix(".volseg.zarr") + f"-{name}.volseg.zarr"


def _infer(image: str, file: str, out: str, workers: int) -> float:
    """Seconds from command to prompt."""
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    line = [sys.executable, "-m", "volseg", "infer", image, "--out", out, "--overwrite"]
    start = time.perf_counter()
    subprocess.run([*line, *["--workers", str(workers)] * bool(workers), *["--model", file] * bool(file)], check=True)
    return time.perf_counter() - start


def _row(truth: str, box: str, file: str, out: str, took: list[float]) -> dict:
    facts = json.loads(Path(out, "run.json").read_text())
    scores = evaluate(out, truth, box=Box.parse(box))
    fore, inst = scores.foreground, scores.instances
    return {
        "model": file or "shipped",
        "seconds": round(median(took), 1),
        "each": ", ".join(f"{seconds:.1f}" for seconds in took),
        "stages": ", ".join(f"{name} {seconds:.0f}" for name, seconds in facts["seconds"].items() if name != "total"),
        "engine": f"{facts['engine']['backend']} {facts['engine']['precision']}",
        "worker GiB": round(facts["peak_bytes"]["worker"] / 2**30, 2),
        "client GiB": round(facts["peak_bytes"]["client"] / 2**30, 2),
        "objects": facts["objects"],
        "box": box,
        "IoU": round(fore.iou, 4),
        **{name: round(getattr(inst, name), 4) for name in ("pq", "sa50", "voi_split", "voi_merge")},
        **{name: getattr(inst, name) for name in ("truth_objects", "pred_objects", "split", "merged", "missed", "spurious")},
    }  # fmt: skip
