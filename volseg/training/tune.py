"""The search for a learning rate and a batch size: short runs, the hopeless ones ended early, the best kept as a config."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from volseg.config import Config, TrainData
from volseg.errors import UserError
from volseg.inference import model
from volseg.progress import format_table
from volseg.system import tune_malloc
from volseg.training.sources import Source, load_sources
from volseg.training.steps import Log, initial_state, train_steps
from volseg.training.train import check_settings
from volseg.training.validate import require_validation_sections, validate

if TYPE_CHECKING:
    import optuna

STUDY_NAME = "volseg"
VALIDATIONS = 5  # of a trial; after each it may be ended
COLUMNS = ("trial", "lr", "batch", "steps", "iou", "state", "seconds")
STATES = {"COMPLETE": "done", "PRUNED": "ended early", "FAIL": "failed"}  # others: stopped


def tune(config: Config, log: Log = print) -> Path:
    """Search the learning rate and batch size with the best held-out IoU.

    Every trial sees the same number of patches, ``tune.share`` of the run's, in one whole cycle of the learning rate, so
    batches are compared at equal work. The study is a journal in ``config.train.out``: the same command goes on with it
    until ``tune.trials`` are done or ``tune.minutes`` have passed.

    Parameters
    ----------
    config
        All settings; ``tune`` says what to try.
    log
        Called with each line of text that the search has to say.

    Returns
    -------
    pathlib.Path
        ``OUT/tuned.toml``, the settings of ``config`` with the best values, for `train`. Beside it are ``tune.csv`` and
        ``tune.png``, the trials as table and picture.

    Raises
    ------
    UserError
        If no section is held out, the study in ``OUT`` is of other settings, or no trial comes to its end; and what
        `train` raises.

    References
    ----------
    Values come from a tree-structured Parzen estimator: Bergstra et al., "Algorithms for hyper-parameter optimization",
    NIPS 2011. A trial ends early where its IoU is below the median of the earlier ones: Golovin et al., "Google Vizier",
    KDD 2017.
    """
    import optuna

    settings, out = config.train, Path(config.train.out)
    check_settings(config)
    tune_malloc()
    sources = load_sources(settings)
    require_validation_sections(sources, "volseg tune")
    out.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = open_study(config, out)
    done, start = sum(trial.state.is_finished() for trial in study.trials), time.monotonic()
    if done:
        log(f"going on with the study in {out}: {done} of {config.tune.trials} trials are done")
    while done < config.tune.trials and not _out_of_time(config, start):
        trial = study.ask()
        value, state = _run_trial(trial, config, sources, start, log)
        study.tell(trial, value, state)
        done += 1
        log(_format_trial(study.trials[trial.number]))
    return _write_results(study, config, out, log)


def open_study(config: Config, out: Path) -> optuna.Study:
    """Return the study in the folder ``out``, new or stored.

    Raises
    ------
    UserError
        If it was begun with other settings, whose values could not be compared.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend

    journal = JournalFileBackend(str(out / "tune.journal"))
    study = optuna.create_study(
        study_name=STUDY_NAME,
        storage=optuna.storages.JournalStorage(journal),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=1),
        direction="maximize",
        load_if_exists=True,
    )
    settings = _shared_settings(config)
    stored = _with_defaults(study.user_attrs.get("settings", settings))
    changed = [key for key, value in settings.items() if stored[key] != value]
    if changed:
        raise UserError(f"the study in {out} was begun with another {', '.join(changed)}; give another train.out")
    study.set_user_attr("settings", settings)
    trials = len(study.trials)  # with the seed alone, a study that goes on would try its first values again
    study.sampler = optuna.samplers.TPESampler(seed=config.train.seed + trials, n_startup_trials=5)
    return study


def _shared_settings(config: Config) -> dict:
    """What all trials of a study share."""
    of_trial = {"lr", "batch", "steps", "minutes", "out", "every", "device"}
    train = {f"train.{key}": value for key, value in config.train.model_dump(mode="json", exclude=of_trial).items()}
    patches = {"patches of a trial": _patches_per_trial(config)}
    return {**train, **patches, "tune.lr": list(config.tune.lr), "tune.batch": list(config.tune.batch)}


def _with_defaults(stored: dict) -> dict:
    """Settings of a study, and the defaults of what was no setting yet when it was begun."""
    settings = {**_shared_settings(Config()), **stored}
    data = [TrainData.model_validate(table).model_dump(mode="json") for table in settings["train.data"]]
    return {**settings, "train.data": data}


def _patches_per_trial(config: Config) -> int:
    return max(1, round(config.tune.share * config.train.batch * config.train.steps))


def _out_of_time(config: Config, start: float) -> bool:
    return bool(config.tune.minutes) and time.monotonic() - start > 60 * config.tune.minutes


def _run_trial(
    trial: optuna.Trial, config: Config, sources: list[Source], start: float, log: Log
) -> tuple[float | None, optuna.trial.TrialState]:
    """The held-out IoU that a trial reached, and how it ended."""
    import optuna

    lr = trial.suggest_float("lr", *config.tune.lr, log=True)
    size = trial.suggest_categorical("batch", config.tune.batch)
    count = max(VALIDATIONS, _patches_per_trial(config) // size)
    changes = {"lr": lr, "batch": size, "steps": count, "minutes": 0.0, "processes": 1}
    changed = config.model_copy(update={"train": config.train.model_copy(update=changes)})
    trial.set_user_attr("steps", count)
    try:
        value = _short_run(trial, changed, sources, lambda: _out_of_time(config, start), log)
    except optuna.TrialPruned:
        return None, optuna.trial.TrialState.PRUNED
    except UserError as error:
        log(f"trial {trial.number}: {error}")
        return None, optuna.trial.TrialState.FAIL
    return value, optuna.trial.TrialState.COMPLETE


def _short_run(
    trial: optuna.Trial, config: Config, sources: list[Source], out_of_time: Callable[[], bool], log: Log
) -> float:
    """The held-out IoU after one run of ``config``; raises ``TrialPruned`` when it is ended before."""
    import optuna

    settings = config.train
    device = torch.device("cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu")
    state = initial_state(settings, device)
    iou = 0.0
    for _ in train_steps(state, sources, settings, lambda text: log(f"trial {trial.number}: {text}")):
        if out_of_time():
            raise optuna.TrialPruned
        before, now = (VALIDATIONS * n // settings.steps for n in (state.step - 1, state.step))
        if now > before:
            iou = validate(state.averaged, sources, config)["all"]["iou"]
            trial.report(iou, now)
            if now < VALIDATIONS and trial.should_prune():
                raise optuna.TrialPruned
    return iou


# ---------------------------------------------------------------- results


def _row(trial: optuna.trial.FrozenTrial) -> dict:
    """A finished trial as values under `COLUMNS`; ``iou`` is the last one that it reached."""
    iou = trial.intermediate_values[max(trial.intermediate_values)] if trial.intermediate_values else math.nan
    seconds = math.nan
    if trial.datetime_complete and trial.datetime_start:
        seconds = (trial.datetime_complete - trial.datetime_start).total_seconds()
    return {
        "trial": trial.number,
        "lr": trial.params.get("lr", math.nan),
        "batch": trial.params.get("batch", ""),
        "steps": trial.user_attrs.get("steps", ""),
        "iou": iou,
        "state": STATES.get(trial.state.name, "stopped"),
        "seconds": round(seconds, 1),
    }


def _format_trial(trial: optuna.trial.FrozenTrial) -> str:
    row = _row(trial)
    return f"trial {row['trial']}: lr {row['lr']:.2e} batch {row['batch']}: IoU {row['iou']:.3f} ({row['state']})"


def format_trials(rows: list[dict]) -> str:
    """Return trials as a table in plain text, in the order given."""
    return format_table(COLUMNS, [[*{**row, "lr": f"{row['lr']:.2e}"}.values()] for row in rows])


def _write_results(study: optuna.Study, config: Config, out: Path, log: Log) -> Path:
    """The table, the picture and the config of a study are written; the path of the config."""
    rows = [_row(trial) for trial in study.trials if trial.state.is_finished()]
    rows.sort(key=lambda row: (row["state"] != "done", math.inf if math.isnan(row["iou"]) else -row["iou"]))
    if not rows or rows[0]["state"] != "done":
        raise UserError(
            "no trial came to its end; allow more tune.minutes, or shorten trials with a smaller tune.share"
        )
    best, path = rows[0], out / "tuned.toml"
    model.write_whole(out / "tune.csv", _csv(rows))
    model.write_whole(out / "tune.png", plot_trials(rows))
    model.write_whole(path, tuned_config(config, best).encode())
    log(format_trials(rows))
    log(f"best     train.lr = {best['lr']:.3g}, train.batch = {best['batch']}: held-out IoU {best['iou']:.3f}")
    log(
        f"config   {path}, for volseg train; the trials' table and picture are {out / 'tune.csv'} and {out / 'tune.png'}"
    )
    return path


def _csv(rows: list[dict]) -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def plot_trials(rows: list[dict]) -> bytes:
    """Return a PNG of held-out IoU over learning rate, a color for each batch; trials that ended early are small."""
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


def tuned_config(config: Config, best: dict) -> str:
    """Return ``config`` as TOML with the ``lr`` and ``batch`` of a trial.

    The run sees as many patches as before, and has a folder of its own.
    """
    import tomli_w

    settings = config.train
    count = max(1, round(settings.steps * settings.batch / best["batch"]))
    changes = {"lr": float(f"{best['lr']:.3g}"), "batch": best["batch"], "steps": count, "out": f"{settings.out}/tuned"}
    tables = config.model_dump(mode="json", exclude_defaults=True, exclude_none=True, exclude={"tune"})
    tables["train"] = {**tables.get("train", {}), **changes}
    head = f"# Made by volseg tune: the best of its trials reached IoU {best['iou']:.3f} on the held-out sections.\n\n"
    return head + tomli_w.dumps(tables)
