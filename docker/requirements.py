"""Prints what volseg and some of its extras require, a line each: `python requirements.py EXTRA ...` beside pyproject.toml."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]


def lines(extra: str) -> set[str]:
    """What an extra requires; an extra that it names (``volseg[torch]``) stands for what that requires."""
    found = set()
    for line in project["optional-dependencies"][extra]:
        if line.startswith("volseg["):
            found.update(*map(lines, line[len("volseg[") : -1].split(",")))
        else:
            found.add(line)
    return found


print(*sorted({*project["dependencies"]}.union(*map(lines, sys.argv[1:]))), sep="\n")
