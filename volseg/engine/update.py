"""What of a finished run can have changed since: nothing, its labels, or everything."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from volseg.config import Config
from volseg.engine import folder
from volseg.engine.keys import basins_key, probability_key, tally_key
from volseg.engine.layout import Layout
from volseg.engine.receipts import Markers
from volseg.engine.run import Run
from volseg.engine.stages import keys
from volseg.errors import DamagedFileError, UserError
from volseg.io.place import Place

FACTS = {
    "checksum": "the volume's voxels",
    "shape": "the volume's shape",
    "voxel_size_nm": "the voxel size",
    "model_sha256": "the model file",
    "heads": "what the network tells",
    "roi": "the region of interest",
    "mean": "how gray values are standardized",
    "std": "how gray values are standardized",
    "padding": "what counts as padding",
}  # of a run, in words; the volume's own come first, since the others follow from them
UNDECISIVE = {"keep_work"}  # of [output]: decides no byte


@dataclass(frozen=True)
class Change:
    """What a new description of a run makes of the one that is there.

    Attributes
    ----------
    what
        "nothing", "place" (all arrays stay), "labels" (probabilities stay) or "everything".
    why
        What differs, in words; "" for nothing.
    config
        Of the run that is there, with the rules of the new one.
    place
        Where the volume lies now.
    """

    what: Literal["nothing", "place", "labels", "everything"]
    why: str
    config: Config
    place: Place

    def __str__(self) -> str:
        said = {
            "nothing": "is of this volume, model and settings: nothing is done (--overwrite makes it anew)",
            "place": f"{self.why}: so does the run, and nothing is computed",
            "labels": f"{self.why}: labels are decided anew, probabilities stay",
            "everything": f"{self.why}: all blocks are done again",
        }
        return said[self.what]


def needs_probabilities(old: Run, new: Run) -> str:
    """Which change of a run's description cannot be brought about from its tables; "" for none.

    ``new`` has the probabilities of ``old``.
    """
    if not new.drops:
        return "output.probabilities = 'keep'"
    if basins_key(old) != basins_key(new):
        return "another [fragments]" if old.block == new.block else "another blocks.shape"
    if tally_key(old) != tally_key(new):
        return "another output.space" if old.output_shape != new.output_shape else "another stitch.fill_holes_voxels"
    return ""


def refuse_finished(out: str, replaced: bool) -> None:
    """A finished run is neither replaced nor brought up to date unless that was asked for, now or when what is not finished
    beside it was begun.
    """
    if Layout(out).finished and not (replaced or folder.is_being_replaced(out)):
        raise UserError(
            f"output {out} exists; give another --out, --update to bring it up to date, or --overwrite to replace it"
        )


def compare(out: str, run: Run) -> Change:
    """What ``run`` would change of the finished run at ``out``. Where blocks are cut changes nothing."""
    old = folder.peek_run(out)
    plain = Layout(out).load_description() if old else Layout(out).load_summary()
    old = old or Run.from_json({**plain, "out": out})
    cut = {"out": old.out, "predict_block": old.predict_block, "block": old.block}
    new = replace(run, **cut, pass_blocks=old.pass_blocks, cuts=old.cuts) if run.shape == old.shape else run
    stitch = new.config.stitch if old.rule_voxel_nm == new.rule_voxel_nm else new.stitch  # older runs count their own
    new = replace(new, config=new.config.model_copy(update={"stitch": stitch}), rule_voxel_nm=old.rule_voxel_nm)
    rules = {"fragments": new.config.fragments, "stitch": stitch, "output": new.config.output}
    config = old.config.model_copy(update=rules)
    stage = old.probability_stage
    own_key = plain["keys"].get(stage) == keys(old)[stage]  # else another state predicted, in other tiles maybe
    if old.channels or not own_key or probability_key(new) != probability_key(old):
        made = "corrections are" if old.corrections else "partition is"
        lost = f"; its {made} of other probabilities and {made.split()[1]} not kept"
        lost = lost if old.corrections or old.partition else ""
        return Change("everything", _differing_fact(old, new) + lost, config, new.place)
    if old.drops and (what := needs_probabilities(old, new)):
        return Change("everything", f"{what} needs the probabilities, which were dropped", config, new.place)
    before, after = (_decisive(one.config) for one in (old, new))
    changed = [name for name in after if before[name] != after[name]]
    if not changed:
        if new.place != old.place:
            return Change("place", "the volume lies elsewhere now", config, new.place)
        return Change("nothing", "", config, new.place)
    name = min(changed, key=lambda name: name.startswith("output."))
    more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
    return Change("labels", f"{name} = {after[name]!r} was {before[name]!r}{more}", config, new.place)


def _decisive(config: Config) -> dict:
    """The settings that labels follow from, once there are probabilities."""
    tables = config.model_dump(mode="json", include={"fragments", "stitch", "output"})
    tables["output"] = {name: value for name, value in tables["output"].items() if name not in UNDECISIVE}
    tables["stitch"].pop("reduce")
    return {f"{section}.{name}": value for section, table in tables.items() for name, value in table.items()}


def _differing_fact(old: Run, new: Run) -> str:
    """The first thing that probabilities depend on and that is another now, in words."""
    if old.channels:
        return "it was made of probabilities, and now a model is given"
    for name, words in FACTS.items():
        if getattr(old, name) != getattr(new, name):
            return f"{words} changed"
    before, after = old.config.predict.model_dump(), new.config.predict.model_dump()
    for name, value in after.items():
        if before[name] != value:
            return f"predict.{name} = {value!r} was {before[name]!r}"
    if old.engine and new.engine and old.engine.arithmetic != new.engine.arithmetic:
        return f"what computes changed ({old.engine} before, {new.engine} now)"
    if old.config.output.chunk != new.config.output.chunk:
        return "output.chunk changed"
    return "another version of volseg, which may have predicted otherwise, made it"


def is_to_begin(run: Run) -> bool:
    """Whether what lies at the run's unfinished name is of another description, so that the run begins anew."""
    try:
        return run.layout.described and bool(folder.changed(run))
    except DamagedFileError:
        return True


def rewritten(out: str) -> str:
    """How many blocks of labels the last decision wrote, in words; "" where the work folder is gone."""
    run = folder.peek_run(out)
    if run is None:
        return ""
    receipts = Markers(out, keys(run)).receipts("relabel").values()
    again = sum(not receipt.kept for receipt in receipts)
    return f"{again} of {len(receipts)} block(s) of labels were written again"
