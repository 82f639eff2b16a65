"""What a command shows: tables as plain text."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence


def format_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows under their column names, as plain text; a column of numbers stands to the right, and None is a dash.

    Floats have four digits after the point; give a string for other digits.

    >>> print(format_table(("score", "voxels"), [("iou", 12), ("recall [%]", None)]))
    score       voxels
    iou             12
    recall [%]       -
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = [list(row) for row in rows]
    table = Table(box=None, pad_edge=False, header_style="", padding=(0, 2, 0, 0), collapse_padding=True)
    for i, column in enumerate(columns):
        text = any(isinstance(row[i], str) for row in rows)
        table.add_column(Text(column), justify="left" if text else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row))
    page = io.StringIO()
    Console(file=page, width=10_000, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines())


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
