"""`volseg infer` on real EM, from command to prompt, and its scores on sections that the model never saw."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import report
from volseg.box import Box
from volseg.evaluate import evaluate


def measure(image: str, truth: str, box: str, out: str, workers: int) -> None:
    """One row: wall-clock seconds, peak memory, IoU and instance scores on ``box``."""
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    line = [sys.executable, "-m", "volseg", "infer", image, "--out", out, "--overwrite"]
    start = time.perf_counter()
    subprocess.run(line + ["--workers", str(workers)] * bool(workers), check=True)
    took = time.perf_counter() - start
    facts = json.loads(Path(out, "run.json").read_text())
    scores = evaluate(out, truth, box=Box.parse(box))
    fore, inst = scores["foreground"], scores["instances"]
    report.keep("epfl", [{
        "seconds": round(took, 1),
        "stages": ", ".join(f"{name} {seconds:.0f}" for name, seconds in facts["seconds"].items()),
        "engine": f"{facts['engine']['backend']} {facts['engine']['precision']}",
        "worker GiB": round(facts["peak_bytes"]["worker"] / 2**30, 2),
        "client GiB": round(facts["peak_bytes"]["client"] / 2**30, 2),
        "objects": facts["objects"],
        "box": box,
        "IoU": round(fore["iou"], 4),
        **{name: round(inst[name], 4) for name in ("pq", "sa50", "voi_split", "voi_merge")},
        **{name: inst[name] for name in ("truth_objects", "pred_objects", "split", "merged", "missed", "spurious")},
    }])  # fmt: skip
