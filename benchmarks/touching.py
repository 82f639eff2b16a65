"""Synthetic volumes that no model learnt from: how many of the objects that touch come apart, and how many are split."""

from __future__ import annotations

from pathlib import Path

from benchmarks import report
from benchmarks.trial import volseg
from volseg.evaluate import evaluate

SUMS = ("pairs", "separated", "objects", "split", "merged", "missed", "spurious")


def measure(seeds: tuple[int, ...], shape: str, config: str, model: str, sets: tuple[str, ...], out: str) -> None:
    """A row for each volume, and one for all: pairs of touching objects, those told apart, and objects in pieces."""
    rows = [_row(seed, shape, config, model, sets, Path(out)) for seed in seeds]
    total = {name: sum(row[name] for row in rows) for name in SUMS}
    report.keep("touching", [_shares(row) for row in [*rows, {"seed": "all", **total}]])


def _row(seed: int, shape: str, config: str, model: str, sets: tuple[str, ...], out: Path) -> dict:
    """The counts of one volume, made if need be and segmented anew."""
    image, run = out / f"{seed}-{shape.replace(',', '-')}.zarr", out / f"{seed}.volseg.zarr"
    out.mkdir(parents=True, exist_ok=True)
    if not image.exists():
        volseg("synth", str(image), "--shape", shape, "--seed", str(seed))
    options = ["--config", config, *(["--model", model] if model else []), *(part for text in sets for part in ("--set", text))]
    volseg("infer", str(image), "--out", str(run), "--overwrite", *options)
    scores = evaluate(str(run), str(image / "labels/truth"))
    found, told = scores["instances"], scores["touching"]
    return {"seed": seed, "pairs": told["pairs"], "separated": told["separated"], "objects": found["truth_objects"],
            **{name: found[name] for name in SUMS[3:]}}  # fmt: skip


def _shares(row: dict) -> dict:
    return {**row, "pair recall": round(row["separated"] / max(1, row["pairs"]), 3),
            "split share": round(row["split"] / max(1, row["objects"]), 4)}  # fmt: skip
