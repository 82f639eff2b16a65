"""The search for a learning rate and a batch size: short runs, the hopeless ones ended early, the best kept as a config."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from volseg.config import Config, Train, TrainData
from volseg.errors import UserError
from volseg.inference import model
from volseg.system import tune_malloc
from volseg.training.samples import Source, load_sources
from volseg.training.steps import start, steps
from volseg.training.train import check
from volseg.training.validate import refuse_nothing_held_out, validate

STUDY = "volseg"
CHECKS = 5  # validations of a trial, after each of which it may be ended
COLUMNS = ("trial", "lr", "batch", "steps", "iou", "state", "seconds")

Say = Callable[[str], None]


def tune(config: Config, say: Say = print) -> Path:
    """Path of ``OUT/tuned.toml``: the settings of ``config`` with the best learning rate and batch, for `volseg train`.

    Every trial sees the same number of patches, ``tune.share`` of the run's, in one whole cycle of the learning rate, so
    batches are compared at equal work. Values come from a tree-structured Parzen estimator (Bergstra et al., NIPS 2011);
    a trial ends early where its held-out IoU is below the median of the earlier ones (Golovin et al., KDD 2017). The study
    is a journal in OUT: the same command goes on with it until ``tune.trials`` are done or ``tune.minutes`` have passed.
    """
    import optuna

    knobs, out = config.train, Path(config.train.out)
    check(config)
    tune_malloc()
    sources = load_sources(knobs)
    refuse_nothing_held_out(sources, "volseg tune")
    out.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = _study(config, out)
    ended, began = sum(trial.state.is_finished() for trial in study.trials), time.monotonic()
    if ended:
        say(f"going on with the study in {out}: {ended} of {config.tune.trials} trials are done")
    while ended < config.tune.trials and not _over(config, began):
        trial = study.ask()
        value, state = _trial(trial, config, sources, began, say)
        study.tell(trial, value, state)
        ended += 1
        say(_line(study.trials[trial.number]))
    return _conclude(study, config, out, say)


def _study(config: Config, out: Path):
    """The study in ``out``, new or stored; refuses one of other settings, whose values could not be compared."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    journal = JournalFileBackend(str(out / "tune.journal"))
    study = optuna.create_study(
        study_name=STUDY,
        storage=optuna.storages.JournalStorage(journal),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=1),
        direction="maximize",
        load_if_exists=True,
    )
    settings = _settings(config)
    stored = _complete(study.user_attrs.get("settings", settings))
    changed = [key for key, value in settings.items() if stored[key] != value]
    if changed:
        raise UserError(f"the study in {out} was begun with another {', '.join(changed)}; give another train.out")
    study.set_user_attr("settings", settings)
    begun = len(study.trials)  # with the seed alone, a study that goes on would try its first values again
    study.sampler = optuna.samplers.TPESampler(seed=config.train.seed + begun, n_startup_trials=5)
    return study


def _settings(config: Config) -> dict:
    """What all trials of a study share."""
    own = {"lr", "batch", "steps", "minutes", "out", "every", "device"}
    of_train = {f"train.{key}": value for key, value in config.train.model_dump(mode="json", exclude=own).items()}
    patches = {"patches of a trial": _patches(config)}
    return {**of_train, **patches, "tune.lr": list(config.tune.lr), "tune.batch": list(config.tune.batch)}


def _complete(stored: dict) -> dict:
    """Settings of a study, and the defaults of what was no setting yet when it was begun."""
    found = {**_settings(Config()), **stored}
    data = [TrainData.model_validate(table).model_dump(mode="json") for table in found["train.data"]]
    return {**found, "train.data": data}


def _patches(config: Config) -> int:
    """How many patches a trial sees."""
    return max(1, round(config.tune.share * config.train.batch * config.train.steps))


def _over(config: Config, began: float) -> bool:
    return bool(config.tune.minutes) and time.monotonic() - began > 60 * config.tune.minutes


def _trial(trial, config: Config, sources: list[Source], began: float, say: Say):
    """The held-out IoU that a trial reached, and how it ended."""
    import optuna

    done, pruned, failed = (getattr(optuna.trial.TrialState, name) for name in ("COMPLETE", "PRUNED", "FAIL"))
    lr = trial.suggest_float("lr", *config.tune.lr, log=True)
    size = trial.suggest_categorical("batch", config.tune.batch)
    count = max(CHECKS, _patches(config) // size)
    changes = {"lr": lr, "batch": size, "steps": count, "minutes": 0.0, "processes": 1}
    trial.set_user_attr("steps", count)
    try:
        return _run(trial, config.train.model_copy(update=changes), sources, lambda: _over(config, began), say), done
    except optuna.TrialPruned:
        return None, pruned
    except UserError as error:
        say(f"trial {trial.number}: {error}")
        return None, failed


def _run(trial, knobs: Train, sources: list[Source], over: Callable[[], bool], say: Say) -> float:
    """The held-out IoU after one short run of ``knobs``; raises ``TrialPruned`` when it is ended before."""
    import optuna

    device = torch.device("cuda" if knobs.device != "cpu" and torch.cuda.is_available() else "cpu")
    state = start(knobs, device)
    value = 0.0
    for _ in steps(state, sources, knobs, lambda text: say(f"trial {trial.number}: {text}")):
        if over():
            raise optuna.TrialPruned
        check_before, check_now = (CHECKS * n // knobs.steps for n in (state.step - 1, state.step))
        if check_now > check_before:
            value = validate(state.averaged, sources, knobs)["all"]["iou"]
            trial.report(value, check_now)
            if check_now < CHECKS and trial.should_prune():
                raise optuna.TrialPruned
    return value


def _row(trial) -> dict:
    """A finished trial as values under `COLUMNS`; ``iou`` is the last one that it reached."""
    last = trial.intermediate_values[max(trial.intermediate_values)] if trial.intermediate_values else math.nan
    took = (trial.datetime_complete - trial.datetime_start).total_seconds() if trial.datetime_complete else math.nan
    kind = {"complete": "done", "pruned": "ended early", "fail": "failed"}.get(trial.state.name.lower(), "stopped")
    return {
        "trial": trial.number,
        "lr": trial.params.get("lr", math.nan),
        "batch": trial.params.get("batch", ""),
        "steps": trial.user_attrs.get("steps", ""),
        "iou": last,
        "state": kind,
        "seconds": round(took, 1),
    }


def _line(trial) -> str:
    row = _row(trial)
    return f"trial {row['trial']}: lr {row['lr']:.2e} batch {row['batch']}: IoU {row['iou']:.3f} ({row['state']})"


def table(rows: list[dict]) -> str:
    """Trials as text, the best first."""
    shown = [{**row, "lr": f"{row['lr']:.2e}", "iou": f"{row['iou']:.4f}"} for row in rows]
    return "\n".join("  ".join(f"{cell!s:>11}" for cell in cells) for cells in [COLUMNS, *(r.values() for r in shown)])


def _conclude(study, config: Config, out: Path, say: Say) -> Path:
    """The table, the picture and the config of a study are written."""
    rows = [_row(trial) for trial in study.trials if trial.state.is_finished()]
    rows.sort(key=lambda row: (row["state"] != "done", -row["iou"] if row["iou"] == row["iou"] else math.inf))
    if not rows or rows[0]["state"] != "done":
        raise UserError(
            "no trial came to its end; allow more tune.minutes, or shorten trials with a smaller tune.share"
        )
    model.write_whole(out / "tune.csv", _csv(rows))
    model.write_whole(out / "tune.png", picture(rows))
    best = rows[0]
    path = out / "tuned.toml"
    model.write_whole(path, tuned(config, best).encode())
    say(table(rows))
    say(f"best     train.lr = {best['lr']:.3g}, train.batch = {best['batch']}: held-out IoU {best['iou']:.3f}")
    say(
        f"config   {path}, for volseg train; the trials' table and picture are {out / 'tune.csv'} and {out / 'tune.png'}"
    )
    return path


def _csv(rows: list[dict]) -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def picture(rows: list[dict]) -> bytes:
    """A PNG of held-out IoU over learning rate, a color for each batch; trials that ended early are small."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for size in sorted({row["batch"] for row in rows}):
        own = [row for row in rows if row["batch"] == size]
        areas = [45 if row["state"] == "done" else 12 for row in own]
        axes.scatter([r["lr"] for r in own], [r["iou"] for r in own], s=areas, label=f"batch {size}")
    axes.set(xscale="log", xlabel="train.lr", ylabel="IoU on held-out sections", title=f"{len(rows)} trials")
    axes.grid(alpha=0.3)
    axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def tuned(config: Config, best: dict) -> str:
    """The TOML of ``config`` with the best values; as many patches as before, in a folder of its own."""
    knobs = config.train
    count = max(1, round(knobs.steps * knobs.batch / best["batch"]))
    changes = {"lr": float(f"{best['lr']:.3g}"), "batch": best["batch"], "steps": count, "out": f"{knobs.out}/tuned"}
    given = config.model_dump(mode="json", exclude_defaults=True, exclude={"tune"})
    train = {**given.get("train", {}), **changes}
    data = train.pop("data")
    lines = [f"# Made by volseg tune: the best of its trials reached IoU {best['iou']:.3f} on the held-out sections."]
    for name, values in {**given, "train": train}.items():
        lines += ["", f"[{name}]", *_pairs(values)]
    for volume in data:
        lines += ["", "[[train.data]]", *_pairs(volume)]
    return "\n".join([*lines, ""])


def _pairs(values: dict) -> list[str]:
    """``key = value`` of plain values; what JSON writes of these is TOML, too."""
    return [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items() if value is not None]
