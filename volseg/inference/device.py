"""Where arrays lie while a network sees them: numpy arrays in this process, or tensors on a device of torch.

Each float32 operation is rounded by itself on both, none is fused with the next, so their bytes are the same. Where
numpy would go over a tile in memory once for each, one loop does them all while the voxel is at hand.
"""

from __future__ import annotations

import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numba import njit

from volseg.errors import OutOfMemoryError
from volseg.system import trim_memory

if TYPE_CHECKING:
    import torch

Call = Callable[[Any], Any]  # of a batch, where it lies
YX = tuple[int, int]
OUT_OF_MEMORY = re.compile(  # the words of libraries: "could not create" is oneDNN, the last one ONNX Runtime
    r"out of memory|can(no|')t allocate memory|not enough memory|bad_alloc|alloc(ation)?_failed"
    r"|unable to find an engine"  # torch, where no kernel of cudnn finds room to work in
    r"|could not create a (memory|primitive(?! desc))|failed to allocate", re.IGNORECASE,
)  # fmt: skip


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory is out: by its type; by its text where a library has no type for that."""
    torch = sys.modules.get("torch")
    if isinstance(error, (MemoryError, OutOfMemoryError, *([torch.OutOfMemoryError] if torch else []))):
        return True
    return not isinstance(error, ImportError) and bool(OUT_OF_MEMORY.search(str(error)))


@contextmanager
def out_of_memory_as(what: str, advice: str = "") -> Iterator[None]:
    """Where memory is out inside, an `OutOfMemoryError` says that it did not hold ``what``, with ``advice``."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise OutOfMemoryError(f"memory does not hold {what} ({reason}){advice}") from None


def is_plain(gray: Any) -> bool:
    """Whether numba knows voxels of that type."""
    return isinstance(gray, np.ndarray) and gray.dtype.isnative and gray.dtype != np.float16


class NumpyDevice:
    """Numpy arrays in the memory of this process."""

    sent = fetched = 0  # bytes

    def put(self, array: np.ndarray) -> np.ndarray:
        return array

    def put_sections(self, sections: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        return sections

    def get(self, array: np.ndarray) -> np.ndarray:
        return array

    def zeros(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros(shape, np.float32)

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.empty(shape, np.float32)

    def standardize_into(self, gray: np.ndarray, out: np.ndarray, mean: float, inverse: float) -> None:
        """``out`` (y, x) holds gray voxels, less ``mean`` and times ``inverse``, each step rounded to float32."""
        _standardize_into(
            gray if is_plain(gray) else gray.astype(np.float32), out, np.float32(mean), np.float32(inverse)
        )

    def add(self, total: np.ndarray, to: YX, tile: np.ndarray, of: YX, rows: np.ndarray, columns: np.ndarray) -> None:
        """``total`` (channels, y, x) grows from ``to`` on by a tile from ``of`` on, with weights ``rows`` x ``columns``."""
        _add(total, to, np.ascontiguousarray(tile), of, rows, columns)

    def quantize(self, total: np.ndarray, weight: np.ndarray, out: np.ndarray) -> None:
        """``out``, uint8, is ``total`` (channels, y, x) over ``weight``, 255 for 1, halves round up. ``total`` is 0 then."""
        _quantize(total, weight, out)

    def empty_output(self, out: np.ndarray) -> np.ndarray:
        return out

    def copy_to_host(self, made: np.ndarray, out: np.ndarray) -> None:
        """``out`` is where all was made."""

    def stream(self) -> AbstractContextManager:
        return nullcontext()

    def synchronized(self, call: Call) -> Call:
        return call


@njit(cache=True, nogil=True)
def _standardize_into(gray, out, mean, inverse):
    for y in range(gray.shape[0]):
        for x in range(gray.shape[1]):
            out[y, x] = (np.float32(gray[y, x]) - mean) * inverse


@njit(cache=True, nogil=True)
def _add(total, to, tile, of, rows, columns):
    n = columns.size
    for c in range(total.shape[0]):
        for y in range(
            rows.size
        ):  # rows of whole arrays: their voxels lie side by side, which four times the speed needs
            sums, more, weight = total[c, to[0] + y, to[1] : to[1] + n], tile[c, of[0] + y, of[1] : of[1] + n], rows[y]
            for x in range(n):
                sums[x] += more[x] * (weight * columns[x])


@njit(cache=True, nogil=True, error_model="numpy")
def _quantize(total, weight, out):
    for c in range(total.shape[0]):
        for y in range(total.shape[1]):
            of, by, to = total[c, y], weight[y], out[c, y]
            for x in range(of.size):
                share = min(max(of[x] / by[x], np.float32(0)), np.float32(1))
                to[x] = np.uint8(share * np.float32(255) + np.float32(0.5))
                of[x] = 0


NUMPY = NumpyDevice()
STREAMS_LOCK = threading.Lock()  # held by the thread that makes a GPU's streams


@dataclass
class TorchDevice:
    """Tensors on the device of torch called ``name``: "cpu", "cuda:1". ``sent`` and ``fetched``: bytes over the bus.

    On a GPU all that a process computes is queued on one stream, and done in the order in which it was asked for; copies to
    the GPU have a stream of their own.
    """

    name: str
    sent: int = 0
    fetched: int = 0

    def put(self, array: np.ndarray) -> torch.Tensor:
        """The array's values there. A GPU copies them from page-locked memory while the caller goes on."""
        import torch

        array = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
        self.sent += array.nbytes
        if self.name == "cpu":
            return torch.from_numpy(array)
        work, copies, _ = _streams(self.name)
        with torch.cuda.device(self.name), torch.cuda.stream(copies):
            locked = torch.from_numpy(array).pin_memory()
            tensor = self._allocated(lambda: torch.empty(locked.shape, dtype=locked.dtype, device=self.name))
            tensor.copy_(locked, non_blocking=True)
        work.wait_stream(copies)
        tensor.record_stream(work)
        return tensor

    def put_sections(self, sections: Sequence[np.ndarray]) -> Sequence[torch.Tensor]:
        """Each of some sections there: together they would be held twice."""
        return [self.put(section) for section in sections]

    def get(self, tensor: torch.Tensor) -> np.ndarray:
        """The tensor's values in this process, once they are computed."""
        import torch

        self.fetched += tensor.nbytes
        if self.name == "cpu":
            return tensor.numpy()
        with self.stream():
            locked = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            locked.copy_(tensor, non_blocking=True)
            self._wait()
        return locked.numpy()

    def zeros(self, shape: tuple[int, ...]) -> torch.Tensor:
        """So many zeros, float32."""
        import torch

        return self._allocated(lambda: torch.zeros(shape, device=self.name))

    def empty(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Room for so many voxels, float32."""
        import torch

        return self._allocated(lambda: torch.empty(shape, device=self.name))

    def standardize_into(self, gray: torch.Tensor, out: torch.Tensor, mean: float, inverse: float) -> None:
        """As `NumpyDevice.standardize_into`."""
        out[...] = gray
        out -= mean
        out *= inverse

    def add(self, total: torch.Tensor, to: YX, tile: torch.Tensor, of: YX, rows: Any, columns: Any) -> None:
        """As `NumpyDevice.add`."""
        weight = rows[:, None] * columns[None, :]
        sums, more = (all_[:, y : y + len(rows), x : x + len(columns)] for all_, (y, x) in ((total, to), (tile, of)))
        sums += more * weight

    def quantize(self, total: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        """As `NumpyDevice.quantize`."""
        total /= weight
        blended = total.clip(0, 1)
        blended *= 255
        blended += 0.5
        out[...] = blended
        total[...] = 0

    def empty_output(self, out: np.ndarray) -> torch.Tensor:
        """Zeros that `copy_to_host` brings into ``out``, uint8."""
        import torch

        return self._allocated(lambda: torch.zeros(out.shape, dtype=torch.uint8, device=self.name))

    def copy_to_host(self, made: torch.Tensor, out: np.ndarray) -> None:
        """``out`` holds what was ``made``."""
        out[...] = self.get(made)

    @contextmanager
    def stream(self) -> Iterator[None]:
        """What this thread computes inside is queued on the device's stream, and leaves no trace for gradients."""
        import torch

        with torch.inference_mode():
            if self.name == "cpu":
                yield
                return
            with torch.cuda.device(self.name), torch.cuda.stream(_streams(self.name)[0]):
                yield

    def synchronized(self, call: Call) -> Call:
        """``call`` for any thread, which returns when the device has done what was asked of it."""

        def waited(batch: torch.Tensor) -> torch.Tensor:
            with self.stream():
                made = _retry_after_trim(lambda: call(batch))
                self._wait()
            return made

        return waited

    def _allocated(self, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        return _retry_after_trim(make)

    def _wait(self) -> None:
        """All that was queued before is done; other threads may go on queueing."""
        import torch

        if self.name != "cpu":
            event = torch.cuda.Event(blocking=True)
            event.record()
            event.synchronize()


Device: TypeAlias = NumpyDevice | TorchDevice


def _streams(name: str) -> tuple[torch.cuda.Stream, ...]:
    """The streams of this process on a GPU, the same for all its threads: what computes, what copies, what is captured.

    torch has 32 and gives them out in turn, so that a new one for each network would in the end be one of these.
    """
    with STREAMS_LOCK:
        return _made_streams(name)


@lru_cache
def _made_streams(name: str) -> tuple[torch.cuda.Stream, ...]:
    import torch

    return tuple(torch.cuda.Stream(name) for _ in range(3))


def _retry_after_trim(make: Callable[[], Any]) -> Any:
    """What ``make`` returns. Memory that is out is collected once before it is given up."""
    try:
        return make()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    trim_memory()
    return make()


def as_cuda_graph(call: Call, shape: tuple[int, ...], name: str) -> Call:
    """``call`` for float32 batches of one ``shape`` on a GPU as a CUDA graph: launched at once, not kernel by kernel.

    The graph holds the kernels that the plain call launches: cudnn chooses them by shape, not by timing, so the bits are
    those of the plain call, which takes over where none can be captured. Where memory does not hold what a kernel works in,
    torch takes the next, which may have other bits: that counts as memory that is out.
    """
    import torch

    torch.cuda.synchronize(name)
    refused = _refusals(name)
    aside, graph, made = _streams(name)[2], torch.cuda.CUDAGraph(), None
    with torch.inference_mode(), torch.cuda.device(name), torch.cuda.stream(torch.cuda.current_stream(name)):
        with torch.cuda.stream(aside):
            given = torch.zeros(shape, device=name)
            call(given)  # libraries set themselves up in a first call, which no graph may hold
        aside.synchronize()
        try:
            with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):  # others may copy meanwhile
                made = call(given)
        except RuntimeError as error:
            warnings.warn(f"no CUDA graph of the network, which makes it slower: {error}", stacklevel=2)
    torch.cuda.synchronize(name)
    if _refusals(name) != refused:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory for what cudnn's kernels work in")
    if made is None:
        return call
    lock = threading.Lock()

    def replay(batch: torch.Tensor) -> torch.Tensor:
        with lock:  # the graph reads and writes one place: queued are a copy there, its kernels, a copy from there
            given.copy_(batch)
            graph.replay()
            return made.clone()

    return replay


def _refusals(name: str) -> int:
    """How often a GPU had not the memory that this process asked it for."""
    import torch

    return torch.cuda.memory_stats(name).get("num_ooms", 0)


def row_by_row(make: Callable[[tuple[int, ...]], Call], shape: tuple[int, ...], device: Device) -> Call:
    """What ``make`` makes for batches of ``shape``; for tiles one by one, where the bits of one depend on its row.

    In other blocks a tile has another row, and no library promises that its kernels sum up in the same order in each.
    """
    call = make(shape)
    if shape[0] == 1 or _rows_agree(call, shape, device):
        return call
    alone = make((1, *shape[1:]))

    def each(batch: Any) -> Any:
        rows = [alone(batch[k : k + 1])[0] for k in range(shape[0])]
        made = device.zeros((shape[0], *rows[0].shape))
        for k, row in enumerate(rows):
            made[k] = row
        return made

    return each


def _rows_agree(call: Call, shape: tuple[int, ...], device: Device) -> bool:
    tile = np.random.default_rng(0).standard_normal(shape[1:], np.float32)
    with device.stream():
        made = device.get(call(device.put(np.repeat(tile[None], shape[0], axis=0))))
    return bool((made == made[:1]).all())
