"""One bounded loop for all blockwise work on a cluster: items in, their results and failures out."""

from __future__ import annotations

import asyncio
import os
import platform
import time
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import wait
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from math import inf
from typing import Any

from distributed import Client, Future, as_completed, get_worker

from volseg.engine.cluster import TASKS_IN_FLIGHT, cause_of_death, threads
from volseg.engine.elastic import Silence, call_on_workers
from volseg.engine.local import DEVICE, HOST
from volseg.errors import OutOfMemoryError, UserError
from volseg.system import trim_memory

SHORT_TASK_S = 0.05  # seconds; items that take less share a task
MAX_BATCHED_ITEMS = 64  # items of one task
RETRY_PAUSE_S = 0.5  # before an item that failed is tried again; four times as long each further time

Item = Hashable  # what names a block's task: its number, or (stage, number)


@dataclass(frozen=True)
class Failure:
    """A block that failed, and why; ``worker`` is where, ``error`` what was raised if it is one of volseg's own.

    ``heavy``: it took more memory than there was, or may have, since its worker died.
    """

    item: Any
    reason: str
    traceback: str = ""
    worker: str = ""
    error: UserError | None = None
    heavy: bool = False


def run(
    client: Client,
    task: Callable[..., Any],
    items: Iterable[Item | None],
    *args: Any,
    device: Iterable[Item | None] = (),
    tries: int = 3,
    window: int = 0,
    done: Callable[[Any, Any], None] = lambda item, result: None,
    stop: Callable[[UserError], bool] = lambda error: False,
    careful: Callable[..., Any] | None = None,
    tell: Callable[[Failure], None] = lambda failure: None,
    give_up: Callable[[Failure], None] = lambda failure: None,
) -> list[Failure]:
    """Calls ``task(*args, item)`` on the workers for every item; ``done(item, result)`` here as each one ends.

    An item that is a tuple gives several arguments. An iterator that gives None has nothing for now: it is asked again
    after the next end, and the loop is over when nothing runs and it has nothing still. Items of ``device`` go to the
    workers that offer the resource `DEVICE`, and the others meanwhile to those that offer `HOST`. Where there are no such
    items or workers, all go to all, ``items`` first.

    At most ``window`` tasks of either kind are known to the scheduler at once, so its memory does not grow with the number
    of items. A task is one item, or several of one stage where they take less than `SHORT_TASK_S`, since a message costs
    more than an empty block. An item that fails is tried ``tries`` times, each time after a longer pause and on another
    worker if there is one; what still fails is returned, and the rest goes on. An error for which ``stop`` is true ends
    all: nothing more is handed out, what is under way ends, and the error is raised here. An item that took a worker's
    memory, or the worker, is tried by itself, while nothing else is under way: by ``careful``, which takes less memory;
    ``tell`` hears of it before; ``give_up`` hears of what is not tried any more.
    """
    call = partial(_each, partial(task, *args))
    call_alone = partial(_each, partial(careful or task, *args))
    queues = [_Queue(client, call, *queue, window=window) for queue in _queues(client, items, device)]
    queue_of: dict[Any, _Queue] = {}
    attempts: dict[Item, int] = {}
    failures: list[Failure] = []
    stopped: list[BaseException] = []
    alone: deque[tuple[_Queue, Failure]] = deque()
    heavy: set[Item] = set()
    solo: set[str] = set()  # the task that runs alone
    loop = as_completed([], loop=client.loop, raise_errors=False)
    silence = Silence(client)

    def refill() -> None:
        while not stopped:
            if alone or solo:
                if not queue_of:
                    queue, failure = alone.popleft()
                    call_on_workers(client, trim_memory)
                    future = queue.submit_alone(failure.item, call_alone)
                    solo.add(future.key)
                    queue_of[future.key] = queue
                    loop.update([future])
                return
            for queue in queues:
                futures = queue.refill()
                queue_of.update((future.key, queue) for future in futures)
                loop.update(futures)
            pause = min((queue.pause() for queue in queues), default=None) if not queue_of else None
            if not pause or pause == inf:
                return
            time.sleep(pause)

    def failed(queue: _Queue, failure: Failure) -> None:
        if failure.error is not None and stop(failure.error):
            stopped.append(failure.error)
            return
        attempts[failure.item] = attempts.get(failure.item, 0) + 1
        if failure.heavy:
            heavy.add(failure.item)
        if attempts[failure.item] < tries and failure.item in heavy:
            tell(failure)
            alone.append((queue, failure))
        elif attempts[failure.item] < tries:
            queue.retry(failure, RETRY_PAUSE_S * 4 ** (attempts[failure.item] - 1))
        else:
            give_up(failure)
            failures.append(failure)

    refill()
    for batch in _batches(loop, silence):
        if not batch:
            for queue in queues:
                queue.widen()
        finished = [future for future in batch if future.status == "finished"]
        for future, (seconds, outcomes) in zip(finished, _gathered(client, finished, silence), strict=True):
            queue = queue_of.pop(future.key)
            solo.discard(future.key)
            for item, outcome in zip(queue.complete(future.key, seconds), outcomes, strict=True):
                if isinstance(outcome, Failure):
                    failed(queue, outcome)
                else:
                    attempts.pop(item, None)
                    done(item, outcome)
        for future in (future for future in batch if future.status != "finished"):
            error, queue = future.exception(), queue_of.pop(future.key)
            solo.discard(future.key)
            cause = cause_of_death(client, error)
            for item in queue.in_flight.pop(future.key):
                failed(queue, Failure(item, cause or _reason(error), heavy=bool(cause)))
        refill()
    if stopped:
        raise stopped[0]
    return sorted(failures, key=lambda failure: failure.item)


def _batches(loop: as_completed, silence: Silence) -> Iterator[list[Future]]:
    """Futures as they end, many at once; and now and then none, when workers were looked at."""
    while not loop.is_empty():
        if silence.look():
            yield []
        if not loop.has_ready():
            with loop.thread_condition:
                loop.thread_condition.wait(timeout=0.1)
        if batch := loop.next_batch(block=False):
            yield batch


def _gathered(client: Client, finished: list[Future], silence: Silence) -> list:
    """Their results. Where the worker that holds one says nothing any more, it is ended, and another computes it again."""

    async def gather() -> list:
        return await client.gather(finished, asynchronous=True)

    results = asyncio.run_coroutine_threadsafe(gather(), client.loop.asyncio_loop)
    while not wait([results], timeout=1.0).done:
        silence.look()
    return results.result()


def _queues(client: Client, items: Iterable, device: Iterable) -> list[tuple[Iterator, dict, int]]:
    """What is handed out independently: the items, the resources that each of them takes, and the slots for them."""
    slots = {name: _slots(client, name) for name in (DEVICE, HOST)}
    if not slots[DEVICE] or device == ():
        return [(_first_available(iter(items), iter(device)), {}, threads(client))]
    host = ({HOST: 1}, slots[HOST]) if slots[HOST] else ({}, threads(client))
    return [(iter(device), {DEVICE: 1}, slots[DEVICE]), (iter(items), *host)]


def _slots(client: Client, resource: str) -> int:
    """How many tasks at once find that resource."""
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return int(sum(min(worker["nthreads"], worker.get("resources", {}).get(resource, 0)) for worker in workers))


def _first_available(*sources: Iterator[Item | None]) -> Iterator[Item | None]:
    """What the first source has that has something; None where none has."""
    while True:
        yield next((item for source in sources if (item := next(source, None)) is not None), None)


class _Queue:
    """Items on their way through the scheduler, at most ``window`` tasks of them at once."""

    def __init__(
        self, client: Client, call: Callable, items: Iterator[Item | None], resources: dict, slots: int, window: int
    ) -> None:
        self.client, self.call, self.items, self.resources = client, call, items, resources
        self.fixed, self.window = window, window or TASKS_IN_FLIGHT * max(1, slots)
        self.retries: deque[Item] = deque()  # at once
        self.later: list[tuple[float, Failure]] = []  # at a time, on another worker
        self.in_flight: dict[str, list[Item]] = {}
        self.sizers: dict[str, _BatchSizer] = {}

    def refill(self) -> list[Future]:
        """Futures of new tasks, once half the window is empty, and of those to be tried again by now."""
        due = [failure for when, failure in self.later if when <= time.monotonic()]
        self.later = [(when, failure) for when, failure in self.later if failure not in due]
        return [*map(self._again, due), *self._more()]

    def widen(self) -> None:
        """Workers that have joined have something to do, too."""
        slots = _slots(self.client, next(iter(self.resources))) if self.resources else threads(self.client)
        self.window = max(self.window, 0 if self.fixed else TASKS_IN_FLIGHT * slots)

    def retry(self, failure: Failure, pause: float) -> None:
        """The item of ``failure`` is tried again after ``pause`` seconds."""
        self.later.append((time.monotonic() + pause, failure))

    def pause(self) -> float:
        """Seconds until something is to be tried again; infinite where nothing is."""
        return max(0.001, min((when for when, _ in self.later), default=inf) - time.monotonic())

    def _again(self, failure: Failure) -> Future:
        """The future of an item that failed, by itself, on another worker if there is one."""
        workers = [
            address for address in self.client.scheduler_info(n_workers=-1)["workers"] if address != failure.worker
        ]
        key = f"{_key(failure.item)}-{uuid.uuid4().hex[:8]}"
        self.in_flight[key] = [failure.item]
        return self.client.submit(
            self.call, [failure.item], key=key, pure=False, resources=self.resources or None, workers=workers or None,
            allow_other_workers=bool(workers),
        )  # fmt: skip

    def submit_alone(self, item: Item, call: Callable) -> Future:
        """The future of an item by itself on any worker of this queue's, by another ``call``."""
        key = f"{_key(item)}-{uuid.uuid4().hex[:8]}"
        self.in_flight[key] = [item]
        return self.client.submit(call, [item], key=key, pure=False, resources=self.resources or None)

    def _more(self) -> list[Future]:
        if len(self.in_flight) > self.window // 2:
            return []
        bundles = list(takewhile(len, (self._bundle() for _ in range(self.window - len(self.in_flight)))))
        if not bundles:
            return []
        keys = [f"{_key(bundle[0])}-{uuid.uuid4().hex[:8]}" for bundle in bundles]
        self.in_flight.update(zip(keys, bundles, strict=True))
        return self.client.map(self.call, bundles, key=keys, pure=False, resources=self.resources or None)

    def complete(self, key: str, seconds: float) -> list[Item]:
        """The items of a task that took so long."""
        bundle = self.in_flight.pop(key)
        self._sizer(bundle[0]).learn(seconds / len(bundle))
        return bundle

    def _bundle(self) -> list[Item]:
        """Items of one stage for one task."""
        found: list[Item] = []
        while not found or len(found) < self._sizer(found[0]).items:
            item = self.retries.popleft() if self.retries else next(self.items, None)
            if item is None:
                break
            if found and _stage(item) != _stage(found[0]):
                self.retries.appendleft(item)
                break
            found.append(item)
        return found

    def _sizer(self, item: Item) -> _BatchSizer:
        return self.sizers.setdefault(_stage(item), _BatchSizer())


class _BatchSizer:
    """How many items make a task: one, or up to `MAX_BATCHED_ITEMS` that fill `SHORT_TASK_S` at the pace of those before."""

    def __init__(self) -> None:
        self.seconds = SHORT_TASK_S

    def learn(self, seconds: float) -> None:
        self.seconds = max(seconds, 0.5 * self.seconds, SHORT_TASK_S / MAX_BATCHED_ITEMS)

    @property
    def items(self) -> int:
        return max(1, int(SHORT_TASK_S / self.seconds))


def _each(call: Callable[..., Any], items: list[Item]) -> tuple[float, list[Any]]:
    """On a worker: seconds, and for each item what ``call`` returned, or its `Failure`."""
    start = time.perf_counter()
    outcomes = []
    for item in items:
        try:
            outcomes.append(call(*item) if isinstance(item, tuple) else call(item))
        except Exception as error:
            own = error if isinstance(error, UserError) else None
            heavy = isinstance(error, MemoryError | OutOfMemoryError)
            outcomes.append(Failure(item, _reason(error), traceback.format_exc(), _address(), own, heavy))
    return time.perf_counter() - start, outcomes


def _address() -> str:
    """Of this worker; where this is none, this machine's name and process."""
    try:
        return get_worker().address
    except ValueError:
        return f"{platform.node()}, process {os.getpid()}"


def _reason(error: BaseException) -> str:
    return f"{error}" if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _stage(item: Item) -> str:
    return item[0] if isinstance(item, tuple) else ""


def _key(item: Item) -> str:
    """What the dashboard calls an item's task: tasks of one stage share a name and so a color."""
    return "-".join(str(part) for part in item) if isinstance(item, tuple) else f"block-{item}"
