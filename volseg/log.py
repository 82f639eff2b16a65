"""What a command says, as lines with their time: for ``--log-file``, ``-v`` and the log in a run's folder.

All goes through the logger ``volseg`` too, so a program that calls volseg may send it wherever its own lines go.
"""

from __future__ import annotations

import logging
import re
from datetime import datetime

from volseg.errors import printable

LOGGER = logging.getLogger("volseg")
LOGGER.addHandler(logging.NullHandler())
_PASSWORD = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def line(text: str, level: int = logging.INFO, when: float | None = None) -> str:
    """``text`` as it stands in a log: time, level, control characters written out, further lines set in, no passwords.

    >>> line("a\\x1b[31m\\ns3://key:secret@host/em", when=0.0).partition(" INFO ")[2].split("\\n")
    ['a\\\\x1b[31m', '    s3://***@host/em']
    """
    moment = datetime.now() if when is None else datetime.fromtimestamp(when)
    body = "\n    ".join(printable(part) for part in _PASSWORD.sub("***", text).split("\n"))
    return f"{moment.astimezone().isoformat(timespec='milliseconds')} {logging.getLevelName(level)} {body}"


class LineFormatter(logging.Formatter):
    """Records as `line` has them, with the traceback of an error that belongs to one."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return line(text, record.levelno, record.created)
