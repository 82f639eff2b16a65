"""Which section of a volume each file of a folder belongs to, by the numbers in their names."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from volseg.errors import UserError

MAX_DIGITS = 18  # of a number that counts sections
SET_FIRST = (
    "set first_number (volseg init --first-number) to the number that the image's first section has in these names, such as "
    "0 or 1"
)


def numbers(names: Sequence[str], place: str) -> list[int]:
    """The number of the section in each name.

    It is the only number of the name or, among names that are else alike, the only one that varies.

    Parameters
    ----------
    names
        Names of files.
    place
        The folder, in messages.

    Raises
    ------
    UserError
        A name has no number, or nothing tells which of several counts sections; or two names have one number.

    Examples
    --------
    >>> numbers(["s010_v2.png", "s020_v2.png"], "labels"), numbers(["mito 7.tif", "12.tif"], "labels")
    ([10, 20], [7, 12])
    """
    parts = [re.split(r"(\d+)", os.path.splitext(name)[0]) for name in names]
    for name, split in zip(names, parts, strict=True):
        if len(split) < 3 or max(map(len, split[1::2])) > MAX_DIGITS:
            raise UserError(
                f"{os.path.join(place, name)} has no number of a section in its name; name it by its section, such as "
                "s012.png, or move it away"
            )
    fields = [tuple(map(int, split[1::2])) for split in parts]
    column = 0
    if max(map(len, fields)) > 1:
        alike = len({tuple(split[::2]) for split in parts}) == 1
        varying = [i for i in range(len(fields[0])) if len({field[i] for field in fields}) > 1] if alike else []
        if len(varying) != 1:
            odd = next(name for name, field in zip(names, fields, strict=True) if len(field) > 1)
            raise UserError(
                f"{os.path.join(place, odd)} has several numbers in its name, and nothing tells which is its section's; "
                "rename the files so that it is the only one"
            )
        (column,) = varying
    found = [field[column] for field in fields]
    seen: dict[int, str] = {}
    for name, number in zip(names, found, strict=True):
        if number in seen:
            raise UserError(
                f"folder {place} has two files of number {number}, {seen[number]} and {name}; keep one of them"
            )
        seen[number] = name
    return found


def sections(
    names: Sequence[str],
    place: str,
    depth: int,
    *,
    image_names: Sequence[str] = (),
    first_number: int | None = None,
) -> tuple[list[int], str]:
    """The section (from 0) that each file belongs to, and how that was decided.

    Parameters
    ----------
    names
        Names of the files, one or more.
    place
        Their folder, in messages.
    depth
        Sections of the image.
    image_names
        Names of the image's slices, in order, where it is a folder of them.
    first_number
        Number of the image's first section; None where it is to be decided: by ``image_names``, else by whether the numbers
        leave only 0 or only 1.

    Raises
    ------
    UserError
        The numbers do not fit the image, or both 0 and 1 fit.

    Examples
    --------
    >>> sections(["s5.png", "s20.png"], "labels", 20)
    ([4, 19], 'their numbers count from 1: 20 is that of the last of 20 sections')
    >>> sections(["7_mask.png"], "labels", 2, image_names=["em 6.tif", "em 7.tif"])
    ([1], 'their numbers are those of the slices of the image')
    """
    if image_names and first_number is None:
        stems = {os.path.splitext(name)[0]: i for i, name in enumerate(image_names)}
        own = [os.path.splitext(name)[0] for name in names]
        if all(stem in stems for stem in own) and len(set(own)) == len(own):
            return [stems[stem] for stem in own], "their names are those of the slices of the image"
    found = numbers(names, place)
    low, high = min(found), max(found)
    if first_number is not None:
        if low < first_number or high >= first_number + depth:
            odd = low if low < first_number else high
            raise UserError(
                f"folder {place} has number {odd}, but from first_number = {first_number} on the image's {depth} sections have "
                f"{first_number} to {first_number + depth - 1}; correct first_number, or move the file away"
            )
        return [n - first_number for n in found], f"their numbers count from {first_number}, as first_number says"
    if image_names and (index := _index_of(image_names)):
        if strangers := [n for n in found if n not in index]:
            raise UserError(
                f"folder {place} has number {strangers[0]}, but no slice of the image has it (they go from {min(index)} to "
                f"{max(index)}); {SET_FIRST}"
            )
        return [index[n] for n in found], "their numbers are those of the slices of the image"
    if low < 0 or high > depth:
        raise UserError(f"folder {place} has number {high}, but the image has {depth} sections; {SET_FIRST}")
    if low == 0 and high == depth:
        raise UserError(
            f"folder {place} has numbers from 0 to {depth}, one more than the image has sections; move away what does not "
            "belong to it"
        )
    if low == 0:
        return found, f"their numbers count from 0, which is that of the first of {depth} sections"
    if high == depth:
        return [n - 1 for n in found], f"their numbers count from 1: {high} is that of the last of {depth} sections"
    raise UserError(
        f"folder {place} has numbers from {low} to {high}, which fit {depth} sections counted from 0 and from 1; set "
        "first_number = 0 or 1 (volseg init --first-number), the number of the image's first section"
    )


def _index_of(image_names: Sequence[str]) -> dict[int, int]:
    """The section of each number in the names of an image's slices; empty where they have none that counts them."""
    try:
        found = numbers(image_names, "")
    except UserError:
        return {}
    return {number: i for i, number in enumerate(found)}
