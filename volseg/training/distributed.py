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

from volseg.engine import forkserver as prefork
from volseg.errors import UserError

LOOPBACK = {"linux": "lo", "darwin": "lo0"}  # elsewhere gloo finds it by itself
LAST_WORDS = 30  # seconds that a process may take to end after its line is gone
PATIENCE = timedelta(minutes=30)  # for the others: process 0 validates while they wait


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def same(value: float, device: torch.device) -> float:
    """Process 0's ``value``."""
    if size() == 1:
        return value
    shared = torch.tensor([value], dtype=torch.float64, device=device)
    dist.broadcast(shared, 0)
    return float(shared)


def add_up(tensors: list[torch.Tensor]) -> None:
    """Each tensor is the sum of the processes' own, the same bits everywhere; sent as one piece of float32."""
    if size() == 1:
        return
    flat = torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.reshape(tensor.shape))


@contextmanager
def together(count: int, work: Callable[..., Any], *args: Any) -> Iterator[None]:
    """Inside, this process is number 0 of ``count``; the others run ``work(*args)``, and end with the block.

    Raises `UserError` where one of them ended before its time; it has said why.
    """
    if count == 1:
        yield
        return
    kind = "nccl" if torch.cuda.is_available() and torch.cuda.device_count() >= count else "gloo"
    port, ending = _free_port(), threading.Event()
    context = torch.multiprocessing.get_context("spawn")
    others = [
        context.Process(target=_other, args=(r, count, kind, port, work, args), daemon=True) for r in range(1, count)
    ]
    with prefork.deaf_to_interrupts():  # number 0 alone hears Ctrl-C
        for process in others:
            process.start()
    try:
        _join(0, count, kind, port)
        if kind == "nccl":
            threading.Thread(target=_watch, args=(others, ending), daemon=True).start()
        yield
        dist.destroy_process_group()  # nccl ends in all processes at once, so before any is waited for
        ending.set()
        for process in others:
            process.join()
    except RuntimeError:  # an end of the line is gone
        gone = wait([process.sentinel for process in others], timeout=LAST_WORDS)
        for process in (process for process in others if process.sentinel in gone):
            process.join(LAST_WORDS)  # its exit code comes a moment later
        if ended := [r for r, process in enumerate(others, 1) if process.exitcode]:
            raise UserError(f"training process {ended[0]} of {count} ended, as it says above; the same command goes on from "
                            "the last checkpoint") from None  # fmt: skip
        raise
    finally:
        ending.set()
        for process in others:
            process.terminate()
        if dist.is_initialized():
            _leave(kind)


def _leave(kind: str) -> None:
    """This process is of no group; the others may be gone, whom nccl's own way to end would wait for."""
    if kind == "nccl":
        dist.distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()


def _watch(others: list, ending: threading.Event, patience: float = LAST_WORDS) -> None:
    """With nccl, a process waits half an hour for one that has failed: number 0 ends soon after one does.

    Not where it comes to its ``ending`` by itself, as when all fail alike.
    """
    running = {process.sentinel: process for process in others}
    while running:
        for sentinel in wait(list(running)):
            process = running.pop(sentinel)
            process.join()
            if process.exitcode and not ending.wait(patience):
                print("volseg: a training process ended, as it says above; the same command goes on from the last checkpoint",
                      file=sys.stderr, flush=True)  # fmt: skip
                sys.stdout.flush()
                os._exit(2)


def _other(number: int, count: int, kind: str, port: int, work: Callable, args: tuple) -> None:
    """The life of one of the other processes; each has its share of the cores."""
    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    _join(number, count, kind, port)
    try:
        work(*args)
    except Exception as error:
        print(f"volseg: process {number}: {error}" if isinstance(error, UserError) else traceback.format_exc(),
              file=sys.stderr, flush=True)  # fmt: skip
        os._exit(1)  # at once: the others see that the line is gone
    dist.destroy_process_group()


def _join(number: int, count: int, kind: str, port: int) -> None:
    if kind == "nccl":
        torch.cuda.set_device(number)
    if sys.platform in LOOPBACK:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK[sys.platform])
    dist.init_process_group(
        kind, init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=count, timeout=PATIENCE
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
