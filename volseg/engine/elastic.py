"""Workers that leave while a run goes on: told to, they finish what they do; where one says nothing, others do its blocks.

What runs on the scheduler is defined inside functions here. Dask then sends it there by value, so a scheduler elsewhere needs
no volseg.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from distributed import Client, SchedulerPlugin

LEAST_SILENCE_S = 30.0  # for which a worker may say nothing, in any case: its machine may be loaded
SILENCE = 10.0  # times as long as any that came back, it may
LOOK_INTERVAL_S = 3.0
ANSWER_S = 10.0  # for which a worker's answer is waited for where the run can do without
RESTART_S = 10.0  # within which a worker that says nothing must have ended, to be started anew


class Silence:
    """How long workers say nothing; one that does so for much longer than any that spoke again loses what it was given.

    A process that is stopped or swapped out holds its blocks for ever: Dask waits for five minutes before it starts the worker
    anew, or forgets one without a nanny.
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        self.longest = 0.0  # that was followed by a word
        self.silent: dict[str, float] = {}
        self.looked = time.monotonic()

    @property
    def allowed(self) -> float:
        """Seconds for which a worker may say nothing, as learnt so far."""
        return max(LEAST_SILENCE_S, SILENCE * self.longest)

    def look(self) -> bool:
        """Looks at all workers, unless it did so just now; whether it did."""
        if time.monotonic() - self.looked < min(LOOK_INTERVAL_S, LEAST_SILENCE_S / 4):
            return False
        self.looked = time.monotonic()

        def silences(dask_scheduler: Any) -> dict[str, float]:
            from distributed.metrics import time

            return {address: time() - worker.last_seen for address, worker in dask_scheduler.workers.items()}

        silent = self.client.run_on_scheduler(silences)
        back = (before for address, before in self.silent.items() if silent.get(address, before) < before)
        self.longest = max((self.longest, *back))
        self.silent = silent
        if any(seconds > self.allowed for seconds in silent.values()):
            _give_to_others(self.client, self.allowed)
        return True


def _give_to_others(client: Client, allowed: float) -> None:
    """Workers that said nothing for so long are started anew, or forgotten; others do what they were to do.

    Where a worker's whole machine is gone, so is who could start it anew: it is forgotten after `RESTART_S`.
    """

    async def restart(dask_scheduler: Any) -> None:
        from contextlib import suppress

        from distributed.metrics import time

        silent = [a for a, worker in dask_scheduler.workers.items() if time() - worker.last_seen > allowed]
        with suppress(TimeoutError):
            await dask_scheduler.restart_workers(
                silent, timeout=RESTART_S, wait_for_workers=False, stimulus_id="volseg-silent"
            )

    client.run_on_scheduler(restart)


def call_on_workers(client: Client, function: Callable[[], Any]) -> None:
    """Every worker calls ``function`` beside its tasks; those that do not answer within `ANSWER_S` are not waited for."""

    def call() -> None:
        with suppress(Exception):  # of a worker that is gone, or of a client that is closed while one says nothing
            client.run(function, on_error="ignore")

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(ANSWER_S)


def let_workers_finish(client: Client) -> None:
    """Workers that are told to retire, by a user, a queue or Dask's scaling, first finish the tasks that they have begun.

    Dask would have these done once more elsewhere.
    """

    class Retirement(SchedulerPlugin):
        name = "volseg-retirement"
        idempotent = True

        async def start(self, scheduler: Any) -> None:
            import asyncio

            from distributed.core import Status
            from distributed.metrics import time

            retire = scheduler.retire_workers

            async def finished(address: str) -> None:
                worker, begin = scheduler.workers.get(address), time()
                if worker:  # it begins nothing new; Dask does the same to it once more in the end
                    told = {"op": "worker-status-change", "status": Status.closing_gracefully.name}
                    scheduler.handle_worker_status_change(Status.closing_gracefully, worker, "volseg-retire")
                    scheduler.stream_comms[address].send({**told, "stimulus_id": "volseg-retire"})
                while (worker := scheduler.workers.get(address)) and (worker.last_seen <= begin or worker.executing):
                    await asyncio.sleep(0.1)

            async def retire_when_idle(
                workers: Any = None, *, names: Any = None, close_workers: bool = False, remove: bool = True,
                stimulus_id: str | None = None, **chosen: Any,
            ) -> Any:  # fmt: skip
                if names is not None:
                    wanted = set(map(str, names))
                    workers = [each.address for each in scheduler.workers.values() if str(each.name) in wanted]
                elif workers is None:
                    workers = scheduler.workers_to_close(**chosen)
                await asyncio.gather(*map(finished, workers))
                return await retire(
                    workers=workers, close_workers=close_workers, remove=remove, stimulus_id=stimulus_id
                )

            scheduler.retire_workers = scheduler.handlers["retire_workers"] = retire_when_idle

    client.register_plugin(Retirement())
