"""A partition of a run's basins, made elsewhere, in place of the rules that join them; and the graph that it is made of."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from volseg.engine.correction_check import checked_corrections
from volseg.engine.keys import basins_id, basins_key
from volseg.engine.run import Run
from volseg.errors import DamagedFileError, UserError
from volseg.io.corrections import Corrections
from volseg.io.corrections import read as read_corrections
from volseg.io.export import graph
from volseg.segmentation.constraints import Constraints
from volseg.segmentation.holes import Holes
from volseg.segmentation.partition import Partition, graph_tables
from volseg.segmentation.rules import label_basins
from volseg.segmentation.stitch import Basins

NONE = "none"  # takes a run's partition back

Given = str | os.PathLike | Mapping[str, Any] | None


@dataclass(frozen=True)
class ByHand:
    """What decides about objects beside a run's rules.

    corrections  of what the rules make; None for none
    partition    the name of the one that makes objects in their place; None for none
    table        what is new of it
    lines        what a user is told
    """

    corrections: Corrections | None = None
    partition: str | None = None
    table: Partition | None = None
    lines: tuple[str, ...] = ()


def by_hand(corrections: Given, partition: Given, old: Run | None, run: Run | None) -> ByHand:
    """What a run is to be decided anew by, looked at before anything is written.

    Parameters
    ----------
    corrections
        A file, or what it holds; None keeps those of the run, `NONE` takes them back.
    partition
        Parquet or CSV, or columns; None keeps that of the run, `NONE` takes it back.
    old, run
        The run as it lies there, and as it is to be decided; None where nobody can tell.

    Raises
    ------
    UserError
        For what does not fit the run.
    """
    file = None if corrections in (None, NONE) else read_corrections(corrections)
    if not (old and run):
        return ByHand()
    wanted = None if corrections == NONE else checked_corrections(file, old, run)
    name, table = _wanted_partition(partition, old, replace(run, corrections=wanted))
    if old.fills_holes != replace(run, partition=name).fills_holes:
        old.require_probabilities("a partition where stitch.fill_holes_voxels is set")
    lines = [f"corrections: {wanted or 'none'}, {file.undecided} undecided"] if file else []
    lines += ["objects are those of a partition: [stitch] decides nothing (--partition none)"] if name else []
    return ByHand(wanted, name, table, tuple(lines))


def decided(run: Run, basins: Basins, holes: Holes | None = None, constraints: Constraints | None = None) -> np.ndarray:
    """The label of each basin, and after them of each hole: what the run's partition says, else its rules."""
    if not run.partition:
        return label_basins(basins, run.rules, holes, constraints)
    if (partition := _stored_partition(run)) is None:
        raise UserError(
            f"the partition in {run.out} is damaged: give it again with --partition FILE, or none for rules"
        )
    return partition.labels_of(basins)


def _stored_partition(run: Run) -> Partition | None:
    """The run's partition; None where it is not what was stored."""
    try:
        partition = run.layout.partition.load(run.partition or "")
    except DamagedFileError:
        return None
    return partition if partition.name == run.partition else None


def mend_partition(run: Run) -> None:
    """The partition of a decided run is stored as it was, made of its labels where it is damaged."""
    basins = run.layout.load_basins(basins_key(run))
    if run.partition and basins is not None and _stored_partition(run) is None:
        run.layout.partition.save(Partition.of(basins.first, _label_of_basins(run, basins)), run.partition)


def stored_basins(run: Run, what: str) -> Basins:
    """The basins of a run's whole volume; refuses ``what`` where one process has not gathered them."""
    basins = run.layout.load_basins(basins_key(run))
    if basins is None:
        raise UserError(
            f"{what} needs the basins of {run.out} in one process, which are cleaned or were stitched by a tree: volseg "
            f"segment {run.out} --recompute --set stitch.reduce=flat makes them"
        )
    return basins


def _wanted_partition(given: Given, old: Run, run: Run) -> tuple[str | None, Partition | None]:
    """The name of the partition with which a run is to be decided anew, None for none, and what it says if it is a new one."""
    if (isinstance(given, str) and given == NONE) or (given is None and not old.partition):
        return None, None
    if run.corrections:
        raise UserError(
            "objects are those of a partition, or of rules with corrections: take one back with --partition none or "
            "--corrections none"
        )
    if basins_id(old) != basins_id(run):
        raise UserError(
            f"a partition is of the basins that {old.out} has, and other [fragments] make others: change them with "
            "--partition none, then export the graph anew"
        )
    if given is None:
        return old.partition, None
    name, basin, group, made_of = graph.read_partition(given)
    if made_of and made_of != basins_id(old):
        raise UserError(f"{name} is of the basins of another run, or of other [fragments], than {old.out} has")
    own = np.sort(stored_basins(old, "a partition").first)
    known = np.isin(basin, own)
    if not known.all():
        raise UserError(
            f"{name} names basin {basin[~known][0]}, which {old.out} does not have ({np.count_nonzero(~known)} of "
            f"{basin.size}): make it of the graph that volseg export {old.out} --to graph gives"
        )
    if basin.size < own.size:
        raise UserError(
            f"{name} lacks basin {np.setdiff1d(own, basin)[0]} and {own.size - basin.size - 1} more of {own.size}: give each "
            "an object, 0 for background"
        )
    partition = Partition.of(basin, group)
    return partition.name, partition


def write_graph(run: Run, path: str) -> None:
    """The graph of a finished run's basins is in a folder at ``path``."""
    basins = stored_basins(run, "a graph")
    label = _label_of_basins(run, basins)
    nodes, edges = graph_tables(basins, label, run.config.fragments, run.shape, run.voxel_size_nm)
    shape, size = (" x ".join(f"{n:g}" for n in each) for each in (run.shape, run.voxel_size_nm))
    graph.write(path, basins_id(run), nodes, edges, shape=shape, size=size)


def _label_of_basins(run: Run, basins: Basins) -> np.ndarray:
    """The label that each basin has in a decided run."""
    label = np.zeros(basins.minimum.size, np.int64)
    for labels in run.layout.block_labels.load_each(run.parts.own.numbers, skip=("hole",)):
        label[labels.basin] = labels.label[1 : 1 + labels.basin.size]
    return label
