"""What local workers would each do first: imported by the process that they are forked from (`prefork`), so done once."""

import gc
from contextlib import suppress

import numpy as np

from volseg.inference.device import NUMPY
from volseg.system import tune_malloc

tune_malloc()

with suppress(Exception):  # a worker will say what is wrong
    NUMPY.standardize_into(
        np.zeros((1, 1), np.uint8), np.zeros((1, 1), np.float32), 0, 1
    )  # the first call sets numba up: half a second

gc.freeze()  # a worker that looks for garbage then leaves the pages of all that was imported shared: 0.4 s of a processor
