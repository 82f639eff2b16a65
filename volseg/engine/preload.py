"""What local workers would each do first: imported by the process that they are forked from (`prefork`), so done once."""

from contextlib import suppress

import numpy as np

from volseg.inference.device import NUMPY
from volseg.system import tune_malloc

tune_malloc()

with suppress(Exception):  # a worker will say what is wrong
    NUMPY.standardize_into(
        np.zeros((1, 1), np.uint8), np.zeros((1, 1), np.float32), 0, 1
    )  # the first call sets numba up: half a second
