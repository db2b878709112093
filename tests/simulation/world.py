"""The world of one run: virtual time, the processes in it, their callers, and what disturbs them."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import random
import traceback
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from aidem import DataRecord, IdempotencyConfig
from aidem.exceptions import IdempotencyInDoubtError
from tests.simulation.call import PREFIX, Call, StoredError
from tests.simulation.check import check
from tests.simulation.conditions import Conditions
from tests.simulation.ending import dispose, judge_end
from tests.simulation.internals import key_text, objects_of_calls
from tests.simulation.judge import Judge
from tests.simulation.process import Process
from tests.simulation.rules import Rule, Violation
from tests.simulation.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_STEPS: Final = 300_000
LATEST_END: Final = 2000.0
MOST_VIOLATIONS: Final = 5


class World:
    """Steps the loops of its processes in random order, and lets the time jump when none has anything to do.

    Attributes:
        now: Virtual seconds.
        happened: What happened how often: a run in which a fault did not happen says nothing about it.
        history: What happened in order, if it is to be told.
        is_calm: Whether nothing goes wrong any more.
        resolved: The owners of claims in doubt that an operator has released.
    """

    def __init__(self, seed: int, *, is_verbose: bool = False, make_store: Callable[[World], Store] = Store) -> None:
        self.rng = random.Random(seed)
        self.seed = seed
        self.is_verbose = is_verbose
        self.now = 0.0
        self.steps = 0
        self.happened: Counter[str] = Counter()
        self.history: list[str] = []
        self.violations: list[Violation] = []
        self.events: list[tuple[float, int, Callable[[], object]]] = []
        self.is_calm = False
        self._sequence = itertools.count()
        self._left_by_others = objects_of_calls()  # by processes of earlier runs that crashed
        self._outages: list[tuple[float, float]] = []
        self._configs: dict[tuple[float, bool], IdempotencyConfig] = {}
        self.calls: list[Call] = []
        self.by_owner: dict[str | None, Call] = {}
        self.resolved: set[str | None] = set()
        self.conditions = Conditions(self.rng)
        self._key_texts = [key_text(PREFIX, f"k{number}") for number in range(self.conditions.keys)]
        self.judge = Judge(self)
        self.store = make_store(self)
        self.processes = [Process(self, number) for number in range(self.conditions.processes)]

    # --- Time ---------------------------------------------------------------------------------------------------------

    def at(self, when: float, action: Callable[[], object]) -> None:
        """Let something happen then."""
        heapq.heappush(self.events, (when, next(self._sequence), action))

    def run_until(self, until: float) -> None:
        """Let time pass."""
        while self._turn(until=until):
            if self.steps > MOST_STEPS:
                self.violate(Rule.H11, "it spins")
                return
            if self._has_enough():
                return

    def _turn(self, *, until: float) -> bool:
        """Do one thing; False: nothing is to be done until then."""
        while self.events and self.events[0][0] <= self.now:
            heapq.heappop(self.events)[2]()
        running = [process for process in self.processes if process.is_runnable()]
        due = [process for process in running if process.loop.is_due()]
        if due:
            self.steps += 1
            (due[0] if len(due) == 1 else self.rng.choice(due)).loop.step()
            return True
        moments = [self.events[0][0]] if self.events else []
        moments += [when for process in running if (when := process.loop.next_at()) is not None]
        if not moments or min(moments) > until:
            self.now = max(self.now, until)
            return False
        self.now = max(self.now, min(moments) + 1e-7)  # a timer that fires is due, also to those who compare
        return True

    def _has_enough(self) -> bool:
        return len(self.violations) > MOST_VIOLATIONS

    # --- What everyone asks -------------------------------------------------------------------------------------------

    def violate(self, rule: Rule, text: str) -> None:
        """Note that a rule was broken."""
        self.violations.append(Violation(rule, text, self.now))
        self.tell(f"VIOLATION {rule.name}: {text}")

    def tell(self, text: str) -> None:
        if self.is_verbose:
            self.history.append(f"{self.now:9.4f} {text}")

    def name_of(self, record: DataRecord | None) -> str:
        call = None if record is None else self.by_owner.get(record.owner)
        return "" if call is None else f"[call {call.number} on k{call.key}]"

    def key_text(self, call: Call) -> str:
        return self._key_texts[call.key]

    def is_down(self) -> bool:
        """Whether the store is down."""
        return any(since <= self.now < until for since, until in self._outages)

    def was_down(self, since: float, until: float) -> bool:
        timeout = self.conditions.client_timeout
        return any(a <= until and b + timeout >= since for a, b in self._outages)

    def config(self, *, wait: float, cache: bool) -> IdempotencyConfig:
        """Return how a call is configured."""
        conditions = self.conditions
        if (wait, cache) not in self._configs:
            self._configs[wait, cache] = IdempotencyConfig(
                event_key_jmespath="id",
                payload_validation_jmespath="amount",
                expires_after_seconds=conditions.kept,
                use_local_cache=cache,
                lease_seconds=conditions.lease,
                renew_lease=conditions.renew,
                wait_timeout_seconds=wait,
                on_abandoned=check if conditions.policy == "check" else conditions.policy,
                doubt_kept_seconds=conditions.kept,
                on_persistence_error="run" if conditions.fail_open else "raise",
                stored_exceptions=(StoredError,) if conditions.stores_exceptions else (),
                max_clock_skew_seconds=conditions.max_clock_skew,
                hooks=(self.judge,),
            )
        return self._configs[wait, cache]

    # --- What happens -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Let the callers call until all of them have ended, and judge."""
        self._disturb(horizon=self.rng.choice([1.0, 5.0, 20.0]))
        callers = [
            (process, process.loop.create_task(self._caller(process)))
            for process in self.processes
            for _ in range(self.rng.choice([1, 1, 2, 3]))
        ]
        self._run_until_all_have_ended(callers)
        for _, task in callers:
            if task.done() and not task.cancelled():
                self._is_sound(task)
        callers.clear()
        if not self.violations:
            judge_end(self)
        dispose(self, left_by_others=self._left_by_others)

    def _run_until_all_have_ended(self, callers: list[tuple[Process, asyncio.Task[None]]]) -> None:
        while not all(task.done() or process.is_dead for process, task in callers):
            self.run_until(self.now + 50.0)
            if self.steps > MOST_STEPS or self._has_enough():
                return
            if self.now > LATEST_END:
                stuck = [call for call in self.calls if call.ended_at is None and not call.is_crashed]
                self.violate(Rule.H11, f"these calls do not end: {stuck}")
                return

    async def _caller(self, process: Process) -> None:
        """Make some calls, one after another."""
        rng, conditions = self.rng, self.conditions
        for _ in range(rng.choice([1, 2, 3, 4])):
            pause = rng.uniform(0, 2 * conditions.lease_or(3))
            await asyncio.sleep(rng.choice([0.0, 0.0, rng.uniform(0, 1), pause]))
            call = Call(self, process, rng.randrange(conditions.keys))
            task = process.loop.create_task(call.run())
            await asyncio.wait([task])
            if task.cancelled() or not self._is_sound(task):
                continue
            if isinstance(call.error, IdempotencyInDoubtError) and rng.random() < 0.3:
                await self._resolve(process, call.error.record)

    def _is_sound(self, task: asyncio.Task[Any]) -> bool:
        if (error := task.exception()) is None:
            return True
        self.violate(Rule.H0, "the simulation failed: " + "".join(traceback.format_exception(error)))
        return False

    async def _resolve(self, process: Process, record: DataRecord) -> None:
        """Do what an operator does about a key in doubt."""
        self.resolved |= self.store.owners_before(record.owner)
        self.happened["resolved by hand"] += 1
        with contextlib.suppress(Exception):
            await process.layer.release(record)

    def _disturb(self, *, horizon: float) -> None:
        """Plan pauses, crashes, partitions and outages."""
        if self.conditions.is_gentle:
            return
        rng, lease = self.rng, self.conditions.lease_or(3)
        has_network = self.conditions.style != "settled"
        for process in self.processes:
            self._disturb_process(process, horizon=horizon, has_network=has_network)
        if rng.random() < 0.15 and has_network:
            since = rng.uniform(0, horizon)
            self._outages.append((since, since + rng.uniform(0, 2 * lease)))
            self.happened["store restart"] += 1

    def _disturb_process(self, process: Process, *, horizon: float, has_network: bool) -> None:
        rng, lease = self.rng, self.conditions.lease_or(3)
        for _ in range(rng.choice([0, 0, 1, 2])):
            pause = rng.choice([rng.uniform(0, lease), rng.uniform(lease, 3 * lease), rng.uniform(0, 15)])
            self.at(rng.uniform(0, horizon), partial(process.freeze, pause, is_suspended=rng.random() < 0.2))
        if rng.random() < 0.2:
            self.at(rng.uniform(0, horizon), process.crash)
        if rng.random() < 0.2 and has_network:
            since, seconds = rng.uniform(0, horizon), rng.uniform(0, 3 * lease)
            self.at(since, partial(process.cut_off, seconds))
