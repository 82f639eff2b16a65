"""What local workers would each do first: imported by the process that they are forked from (`prefork`), so done once."""

from contextlib import suppress

import numpy as np

from volseg.inference.device import HOST
from volseg.system import keep_memory

keep_memory()

with suppress(Exception):  # a worker will say what is wrong
    HOST.lay(
        np.zeros((1, 1), np.uint8), np.zeros((1, 1), np.float32), 0, 1
    )  # the first call sets numba up: half a second
