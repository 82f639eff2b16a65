"""What each part of the training recipe is worth: the same run with one thing changed, on the same held-out sections."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks import report, trial

EVERYTHING = ("flip", "affine", "elastic", "gray", "neighbors")
TRAINED = {
    "the recipe": (),
    "loss: BCE + Dice": ('loss = "bce"',),
    "no contour": ("contour_weight = 0",),
    "1 section": ("sections = 1",),
    "5 sections": ("sections = 5",),
    "no ImageNet weights": ("pretrained = false",),
    "no elastic": (f"augment = {[name for name in EVERYTHING if name != 'elastic']}",),
    "flips alone": ('augment = ["flip"]',),
    "self-training": ("self_training = 0.34",),
}  # what is trained anew, and the settings of [train] that differ
NEEDS = {
    "no contour": ("fragments.contour=0",)
}  # what nobody taught says nothing, neither when seeds are chosen nor after
DECODED = {
    "threshold 0.5": ("fragments.threshold=0.5",),
    "not smoothed": ("fragments.smooth=[0,0,0]",),
    "tta = 4": ("predict.tta=4",),
    "xy, xz, yz planes": ('predict.planes=["xy","xz","yz"]',),
}  # other ways to use the recipe's model


def measure(
    pair: tuple[str, str], sections: int, learn: str, hold: str, test: str, seeds: int, recipe: str, only: tuple[str, ...],
    out: str, train_sets: tuple[str, ...], of: str = "",
) -> None:  # fmt: skip
    """A row for each change, mean over ``seeds``; ``sections`` of ``learn`` teach, ``hold`` chooses the threshold."""
    folder, rows = Path(out), []
    image, label, box = trial.cut(*pair, test, folder / "test")
    data = {"image": pair[0], "label": pair[1], "validate_on": [hold]}
    data["train"] = trial.spread(*trial.span(pair[0], learn), sections)
    for name, changes in TRAINED.items():
        if only and name not in only:
            continue
        ways = {name: NEEDS.get(name, ())} | (DECODED if name == "the recipe" else {})
        found: dict[str, list[dict]] = {way: [] for way in ways}
        for seed in range(seeds):
            here = folder / f"{''.join(c if c.isalnum() else '-' for c in name)}-seed{seed}"
            sets = (*train_sets, *(text.replace(" = ", "=", 1) for text in changes))
            model, card = trial.trained(trial.settings(recipe, data, here, seed, sets, NEEDS.get(name, ())))
            for way, decoding in ways.items():
                found[way].append(trial.row(card, trial.scored(model, image, label, box, decoding)[1]))
        rows += [_mean(way, found[way]) for way in ways]
        report.keep(f"ablations-{of}" if of else "ablations", rows)


def _mean(name: str, rows: list[dict]) -> dict:
    """Means over seeds, and the IoU's standard deviation."""
    iou = [row["IoU"] for row in rows]
    return {
        "change": name, "seeds": len(rows), "steps": rows[0]["steps"],
        "IoU": round(float(np.mean(iou)), 4), "deviation": round(float(np.std(iou)), 4),
        **{key: round(float(np.mean([row[key] for row in rows])), 3) for key in ("PQ", "SA50", "minutes")},
    }  # fmt: skip
