"""Blocked cross-validation: each fold holds out consecutive sections, a model of the others segments them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from benchmarks import report, trial

COUNTS = ("true_positive_voxels", "false_positive_voxels", "false_negative_voxels")


def measure(
    data: tuple[str, str],
    folds: int,
    voxel_size_nm: list[float],
    recipe: str,
    out: str,
    train_sets: tuple[str, ...],
    infer_sets: tuple[str, ...],
    name: str = "",
) -> None:
    """A row for each fold, and the foreground IoU of all held-out sections together."""  # fmt: skip
    first, stop = trial.span(data[0], "")
    edges = [first + (stop - first) * i // folds for i in range(folds + 1)]
    rows, counts = [], dict.fromkeys(COUNTS, 0)
    for fold, (low, high) in enumerate(pairwise(edges)):
        rest = [part for part in (f"{first}:{low}", f"{high}:{stop}") if part.split(":")[0] != part.split(":")[1]]
        table = {"image": data[0], "label": data[1], "voxel_size_nm": voxel_size_nm, "train": rest}
        folder = Path(out) / f"fold{fold}"
        model, card = trial.trained(trial.settings(recipe, table, folder, 0, train_sets))
        image, label, box = trial.cut(*data, f"{low}:{high}", Path(out) / "test")
        size = f"input.voxel_size_nm={voxel_size_nm}"
        _, scores = trial.scored(model, image, label, box, (size, *infer_sets))
        rows.append({"held out": f"{low}:{high}", **trial.row(card, scores)})
        counts = {name: counts[name] + getattr(scores.foreground, name) for name in COUNTS}
        report.keep("folds" + f"-{name}" * bool(name), [*rows, _all(rows, counts)])


def _all(rows: list[dict], counts: dict) -> dict:
    """The row of all folds: IoU of the voxels together, means and sums of the rest."""
    means = {name: round(sum(row[name] for row in rows) / len(rows), 3) for name in ("threshold", "PQ", "SA50")}
    sums = {
        name: round(sum(row[name] for row in rows), 1) for name in ("minutes", "split", "merged", "missed", "spurious")
    }
    iou = counts["true_positive_voxels"] / max(1, sum(counts.values()))
    return {"held out": "all", "steps": rows[0]["steps"], **{**means, **sums}, "IoU": round(iou, 4)}
