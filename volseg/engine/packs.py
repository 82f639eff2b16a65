"""Markers of many blocks in one file: the receipts column by column, since a million read one by one take minutes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from volseg.engine.receipt import Receipt, slim_receipt

SPECIAL = {"seconds", "files", "filled"}  # what is not a number for each block
NUMBERS = {field.name: field.default for field in fields(Receipt) if field.name not in SPECIAL}
HELD = ("kept", "edges", "basins", "objects", "components", "rows", "layer")  # of the numbers, what `Receipt.slim` has


class Pack:
    """The receipts of some blocks of a stage.

    blocks          their numbers
    columns         by name, a number for each block; what each block has by default is left out
    seconds         by phase, for each block, or None where it has no such phase
    filled          by the block's place among ``blocks``
    counts, keys, marks  how many files each block wrote; of all these, one after the other, the keys and fingerprints
    """

    def __init__(self, plain: dict[str, Any]) -> None:
        self.blocks: list[int] = plain["blocks"]
        self.columns: dict[str, list] = plain["columns"]
        self.seconds: dict[str, list] = plain["seconds"]
        self.filled: dict[str, list] = plain["filled"]
        self.counts: list[int] = plain["counts"]
        self.keys: list[str] = plain["keys"]
        self.marks: list[list] = plain["marks"]

    @classmethod
    def of(cls, receipts: dict[int, Receipt]) -> Pack:
        """The receipts of blocks, by number."""
        each = list(receipts.values())
        columns = {name: [getattr(receipt, name) for receipt in each] for name in NUMBERS}
        phases = dict.fromkeys(name for receipt in each for name in receipt.seconds)
        return cls({
            "blocks": list(receipts),
            "columns": {name: column for name, column in columns.items() if set(column) != {NUMBERS[name]}},
            "seconds": {name: [receipt.seconds.get(name) for receipt in each] for name in phases},
            "filled": {str(k): receipt.filled for k, receipt in enumerate(each) if receipt.filled},
            "counts": [len(receipt.files) for receipt in each],
            "keys": [key for receipt in each for key in receipt.files],
            "marks": [mark for receipt in each for mark in receipt.files.values()],
        })  # fmt: skip

    def to_json(self) -> dict:
        return vars(self)

    @classmethod
    def from_json(cls, plain: dict) -> Pack:
        """Raises `KeyError`, `TypeError` or `ValueError` for what `to_json` never gave."""
        pack = cls(plain)
        many = len(pack.blocks)
        numbers = [pack.blocks, pack.counts, *pack.columns.values()]
        right = (
            all(len(column) == many and np.asarray(column).dtype.kind in "biuf" for column in numbers if many)
            and all(len(column) == many for column in pack.seconds.values())
            and len(pack.keys) == len(pack.marks) == sum(pack.counts)
            and set(pack.columns) <= set(NUMBERS)
        )
        if not right:
            raise TypeError("not receipts of blocks")
        return pack

    def slim(self) -> dict[int, Receipt]:
        """What is held of each block: see `Receipt.slim`. Most blocks share one."""
        held = [self.columns.get(name) for name in HELD]
        if not any(held) and not self.filled:
            return dict.fromkeys(self.blocks, slim_receipt(*(NUMBERS[name] for name in HELD), ()))
        columns = (column or [NUMBERS[name]] * len(self.blocks) for name, column in zip(HELD, held, strict=True))
        return {
            i: slim_receipt(*row, _pairs(self.filled.get(str(k), ())))
            for k, (i, *row) in enumerate(zip(self.blocks, *columns, strict=True))
        }

    def receipts(self) -> Iterator[tuple[int, Receipt]]:
        """The whole receipt of each block."""
        ends = pairwise(accumulate(self.counts, initial=0))
        for k, (i, (start, stop)) in enumerate(zip(self.blocks, ends, strict=True)):
            yield (
                i,
                Receipt(
                    **{**NUMBERS, **{name: column[k] for name, column in self.columns.items()}},
                    seconds={name: column[k] for name, column in self.seconds.items() if column[k] is not None},
                    files=dict(zip(self.keys[start:stop], self.marks[start:stop], strict=True)),
                    filled=_pairs(self.filled.get(str(k), ())),
                ),
            )

    def makers(self, keys: Iterable[str]) -> set[int]:
        """The blocks that wrote any of these files."""
        wanted = set(keys)
        if wanted.isdisjoint(self.keys):
            return set()
        maker = np.repeat(self.blocks, self.counts)
        return {int(i) for i, key in zip(maker, self.keys, strict=True) if key in wanted}


def _pairs(filled: Iterable) -> tuple[tuple[str, str], ...]:
    return tuple((where, text) for where, text in filled)
