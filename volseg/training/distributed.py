"""Several processes that train one network. Alone, every function here gives back what it was given.

With n processes, process r makes the patches r, r + n, r + 2n, ... of each batch, and all step with the mean gradient over
the whole batch. Batch-norm and Dice look at a process's own patches. So the result depends on how many processes there
are, and on nothing else: it is the same again for the same number (bit for bit on CPUs with one thread each).
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist

from volseg.engine import forkserver
from volseg.errors import UserError

LOOPBACK = {"linux": "lo", "darwin": "lo0"}  # elsewhere gloo finds it by itself
EXIT_TIMEOUT_S = 30  # that a process may take to end after its connection is lost
GROUP_TIMEOUT = timedelta(minutes=30)  # for the others: process 0 validates while they wait


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def broadcast(value: float, device: torch.device) -> float:
    """Return process 0's ``value``."""
    if size() == 1:
        return value
    shared = torch.tensor([value], dtype=torch.float64, device=device)
    dist.broadcast(shared, 0)
    return float(shared)


def all_reduce_sum(tensors: list[torch.Tensor]) -> None:
    """Replace each tensor by its sum over the processes, the same bits everywhere; sent as one piece of float32."""
    if size() == 1:
        return
    flat = torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.reshape(tensor.shape))


@contextmanager
def process_group(count: int, work: Callable[..., Any], *args: Any) -> Iterator[None]:
    """Make this process number 0 of ``count`` within the block; the others run ``work(*args)``, and end with the block.

    Raises
    ------
    UserError
        If one of the others ended before its time; it has said why.
    """
    if count == 1:
        yield
        return
    backend = "nccl" if torch.cuda.is_available() and torch.cuda.device_count() >= count else "gloo"
    port, ending = _free_port(), threading.Event()
    context = torch.multiprocessing.get_context("spawn")
    others = [
        context.Process(target=_run_other, args=(r, count, backend, port, work, args), daemon=True)
        for r in range(1, count)
    ]
    with forkserver.deaf_to_interrupts():  # number 0 alone hears Ctrl-C
        for process in others:
            process.start()
    try:
        _join(0, count, backend, port)
        if backend == "nccl":
            threading.Thread(target=_exit_with_failed, args=(others, ending), daemon=True).start()
        yield
        dist.destroy_process_group()  # nccl ends in all processes at once, so before any is waited for
        ending.set()
        for process in others:
            process.join()
    except RuntimeError:  # a connection is lost
        ended = wait([process.sentinel for process in others], timeout=EXIT_TIMEOUT_S)
        for process in (process for process in others if process.sentinel in ended):
            process.join(EXIT_TIMEOUT_S)  # its exit code comes a moment later
        if failed := [r for r, process in enumerate(others, 1) if process.exitcode]:
            raise UserError(f"training process {failed[0]} of {count} ended, as it says above; the same command goes on "
                            "from the last checkpoint") from None  # fmt: skip
        raise
    finally:
        ending.set()
        for process in others:
            process.terminate()
        if dist.is_initialized():
            _abandon_group(backend)


def _abandon_group(backend: str) -> None:
    """This process is of no group; the others may have ended, for whom nccl's own way to end would wait."""
    if backend == "nccl":
        dist.distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()


def _exit_with_failed(others: list, ending: threading.Event, timeout_s: float = EXIT_TIMEOUT_S) -> None:
    """With nccl, a process waits half an hour for one that has failed: number 0 exits soon after one does.

    Not where it comes to its ``ending`` by itself, as when all fail alike.
    """
    running = {process.sentinel: process for process in others}
    while running:
        for sentinel in wait(list(running)):
            process = running.pop(sentinel)
            process.join()
            if process.exitcode and not ending.wait(timeout_s):
                print("volseg: a training process ended, as it says above; the same command goes on from the last checkpoint",
                      file=sys.stderr, flush=True)  # fmt: skip
                sys.stdout.flush()
                os._exit(2)


def _run_other(number: int, count: int, backend: str, port: int, work: Callable, args: tuple) -> None:
    """The life of one of the other processes; each has its share of the cores."""
    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    _join(number, count, backend, port)
    try:
        work(*args)
    except Exception as error:
        print(f"volseg: process {number}: {error}" if isinstance(error, UserError) else traceback.format_exc(),
              file=sys.stderr, flush=True)  # fmt: skip
        os._exit(1)  # at once: the others see that the connection is lost
    dist.destroy_process_group()


def _join(number: int, count: int, backend: str, port: int) -> None:
    """This process is ``number`` of a group of ``count``."""
    if backend == "nccl":
        torch.cuda.set_device(number)
    if sys.platform in LOOPBACK:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK[sys.platform])
    dist.init_process_group(
        backend, init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=count, timeout=GROUP_TIMEOUT
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
