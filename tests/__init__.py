"""Loaded before numpy and torch, and inherited by processes that tests start: arithmetic takes one thread.

``make test`` keeps two cores busy with two processes; threads that wait for a core in a spin would take it from others.
"""

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
