"""What every benchmark does with its rows: print them, and keep them with where they were measured."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from volseg.inference import hardware

RESULTS = Path(__file__).parent / "results"


def machine() -> dict:
    """Machine, versions, commit and date of a measurement."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    packages = ("volseg", "torch", "openvino", "zarr", "dask", "numba")
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "cpu": _cpu(),
        "gpu": hardware.gpu_name(0) if hardware.gpu_count() else "",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
    }


def _cpu() -> str:
    """The processor's name, and the wide multiplications it has."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    name = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "?")
    has = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag}" in text]
    return f"{name} ({', '.join(has)})"


def keep(name: str, rows: list[dict]) -> None:
    """Prints ``rows`` (all with the same columns) as a Markdown table and writes them to ``results/NAME.json``."""
    columns = list(rows[0])
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(row[column]) for column in columns) + " |")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({**machine(), "rows": rows}, indent=1) + "\n")
