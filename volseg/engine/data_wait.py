"""How long a device waits for data: the time in which a task of this process reads, and none infers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class DataWait:
    """A clock that runs while something reads and nothing infers.

    >>> clock = DataWait()
    >>> with clock.inferring(), clock.reading():
    ...     time.sleep(0.001)
    >>> clock.take()
    0.0
    >>> with clock.reading():
    ...     time.sleep(0.001)
    >>> clock.take() >= 0.001, clock.take()
    (True, 0.0)
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.tasks_reading = self.tasks_inferring = 0
        self.since = self.seconds = 0.0

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, the caller reads what it is to infer."""
        self._change(1, 0)
        try:
            yield
        finally:
            self._change(-1, 0)

    @contextmanager
    def inferring(self) -> Iterator[None]:
        """Inside, the device has something to do."""
        self._change(0, 1)
        try:
            yield
        finally:
            self._change(0, -1)

    def take(self) -> float:
        """Seconds that it ran since this was called last."""
        with self.lock:
            taken, self.seconds = self.seconds, 0.0
        return taken

    def _change(self, reading: int, inferring: int) -> None:
        with self.lock:
            now = time.perf_counter()
            if self.tasks_reading and not self.tasks_inferring:
                self.seconds += now - self.since
            self.since = now
            self.tasks_reading += reading
            self.tasks_inferring += inferring
