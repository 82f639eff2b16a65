"""Small tables in a run's folder."""

import threading

import numpy as np
import pytest

from volseg.io import tables


@pytest.mark.parametrize(("table_bytes", "most"), [(8, 32), (tables.READ_AHEAD_BYTES // 4, 4), (1 << 40, 2)])
def test_few_large_tables_are_read_ahead(table_bytes, most):
    """Counted are calls that have begun and whose value nobody has taken yet."""
    lock, count, seen = threading.Lock(), [0], [0]

    def read(key):
        with lock:
            count[0] += 1
            seen[0] = max(seen[0], count[0])
        return {"key": np.broadcast_to(np.uint8(key), table_bytes)}

    keys = []
    for value in tables.read_ahead(read, range(100)):
        keys.append(int(value["key"][0]))
        with lock:
            count[0] -= 1
    assert keys == list(range(100))
    assert seen[0] <= most
