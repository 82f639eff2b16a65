"""How good a model becomes with how many annotated sections: a table, a curve, and a picture of two test sections."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks import report, trial
from volseg.box import Box
from volseg.io import volume
from volseg.io.pictures import grayscale, label_overlay

PICTURED = 12  # annotated sections of the model in the picture, beside the model of all
CALIBRATED = 0.08  # share of the sections, held out at the end, that choose the threshold where all are annotated


def measure(
    train: tuple[str, str],
    test: tuple[str, str],
    counts: list[str],
    seeds: int,
    recipe: str,
    train_on: str,
    test_on: str,
    out: str,
    train_sets: tuple[str, ...],
    infer_sets: tuple[str, ...],
) -> None:
    """Rows of every count and seed, ``labels.png`` with the curve and ``sections.png``, under ``out``."""  # fmt: skip
    folder = Path(out)
    first, stop = trial.span(train[0], train_on)
    image, label, box = trial.cut(*test, test_on, folder / "test")
    rows, runs = [], {}
    for count in sorted({_number(text, stop - first) for text in counts}):
        for seed in range(seeds):
            data = {"image": train[0], "label": train[1], **_sections(first, stop, count)}
            config = trial.settings(recipe, data, folder / f"n{count}-seed{seed}", seed, train_sets)
            model, card = trial.trained(config)
            run, scores = trial.scored(model, image, label, box, infer_sets)
            rows.append({"sections": count, "seed": seed, **trial.row(card, scores)})
            runs.setdefault(count, run)
    report.keep("labels", rows)
    print()
    report.keep("labels-mean", [_mean(count, rows) for count in runs])
    _curve(rows, folder / "labels.png")
    chosen = {n: runs[n] for n in (min(runs, key=lambda n: abs(n - PICTURED)), max(runs))}
    _sections_picture(image, label, box, chosen, folder / "sections.png")
    print(f"\nfigures  {folder / 'labels.png'}  {folder / 'sections.png'}")


def _number(text: str, most: int) -> int:
    return most if text == "all" else min(int(text), most)


def _sections(first: int, stop: int, count: int) -> dict:
    """The sections to learn from: evenly spaced; of all of them the last are held out to choose the threshold."""
    if count < stop - first:
        return {"train": trial.spread(first, stop, count)}
    held = max(1, round(CALIBRATED * count))
    return {"train": [f"{first}:{stop - held}"], "validate_on": [f"{stop - held}:{stop}"]}


def _mean(count: int, rows: list[dict]) -> dict:
    """Means over the seeds of one count."""
    mine = [row for row in rows if row["sections"] == count]
    iou = [row["IoU"] for row in mine]
    return {
        "sections": count,
        "seeds": len(mine),
        "IoU": f"{np.mean(iou):.4f} ± {np.std(iou):.4f}",
        **{name: round(float(np.mean([row[name] for row in mine])), 3) for name in ("PQ", "SA50", "minutes")},
    }


def _curve(rows: list[dict], path: Path) -> None:
    """IoU and PQ over the number of annotated sections, a point for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.subplots()
    counts = sorted({row["sections"] for row in rows})
    for key, color in (("IoU", "tab:blue"), ("PQ", "tab:green")):
        axes.plot(
            [row["sections"] for row in rows], [row[key] for row in rows], "o", color=color, alpha=0.4, markersize=4
        )
        means = [np.mean([row[key] for row in rows if row["sections"] == count]) for count in counts]
        axes.plot(counts, means, color=color, label=key)
    axes.set(xscale="log", xlabel="annotated sections", ylabel="score on the test volume", ylim=(0, 1))
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _sections_picture(image: str, label: str, box: Box, runs: dict[int, str], path: Path) -> None:
    """Two test sections: original, truth, and what the models of ``runs`` (sections -> run) make of them."""
    from matplotlib.figure import Figure
    from skimage.measure import label as components

    depth = box.shape[0]
    figure = Figure(figsize=(4.2 * (2 + len(runs)), 2 * 4.2 * box.shape[1] / box.shape[2] + 0.4), layout="constrained")
    for line, z in zip(figure.subplots(2, 2 + len(runs), squeeze=False), (depth // 3, 2 * depth // 3), strict=True):
        plane = Box((box.start[0] + z, *box.start[1:]), (box.start[0] + z + 1, *box.stop[1:]))
        shown = grayscale(volume.open(image).read(plane)[0])
        truth = volume.open(label).read(plane)[0]
        truth = components(truth > 0) if np.unique(truth).size <= 2 else truth
        panels = {f"original, section {z}": shown, "truth": label_overlay(shown, truth)}
        for count, run in runs.items():
            ids = volume.open(run, dataset="labels/instances/0").read(plane)[0]
            panels[f"{count} annotated section{'s' * (count > 1)}"] = label_overlay(shown, ids)
        for axes, (title, picture) in zip(line, panels.items(), strict=True):
            axes.imshow(picture, cmap="gray", vmin=0, vmax=255)
            axes.set(title=title, xticks=[], yticks=[])
    figure.savefig(path, dpi=80)
