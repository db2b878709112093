"""Anything may happen in any order, and the promises are kept: several callers, crashes, lost replies, moving time."""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from aidem import DataRecord
from aidem._rules import lifecycle
from aidem._runtime.cancellation import Immediate
from aidem.exceptions import IdempotencyAlreadyInProgressError
from aidem.persistence import Blocked, Claimed
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.persistence.sqlite import SQLitePersistenceLayer
from aidem.testing import FakeClock
from tests.stateful.model import is_held, is_in_doubt, is_outcome
from tests.stateful.process import Fault, Process
from tests.stateful.world import (
    KEPT_SECONDS,
    LEASE_SECONDS,
    PROCESSES,
    WAIT_SECONDS,
    Caller,
    World,
    config_of,
)

CONFIGS = st.builds(
    config_of, wait=st.booleans(), at_most_once=st.booleans(), renew=st.booleans(), validate=st.booleans()
)
SPANS = st.sampled_from(
    [
        0.001,
        1.0,
        LEASE_SECONDS / 3 + 0.001,
        LEASE_SECONDS - 0.001,
        LEASE_SECONDS,
        LEASE_SECONDS + 0.001,
        LEASE_SECONDS + 1.0,
        WAIT_SECONDS,
        KEPT_SECONDS - 1.0,
        KEPT_SECONDS,
        KEPT_SECONDS + 1.0,
    ]
)
VERDICTS = st.sampled_from(["returned", "returned", "refused", "declined", "confirmed"])
OPERATIONS = st.sampled_from(["acquire", "complete", "renew", "release"])
PROCESS = st.integers(0, PROCESSES - 1)
KEYS = st.sampled_from("aaab")
FAULTS = st.sampled_from([None, None, None, *Fault])
ANY = st.integers(min_value=0, max_value=99)


class Machine(RuleBasedStateMachine):
    """Drives a world at random; every step of it is judged."""

    happened: ClassVar[Counter[str]]
    process_type: ClassVar[type[Process]] = Process

    def make_store(self, clock: FakeClock) -> Any:
        return MemoryPersistenceLayer(clock=clock)

    def __init__(self) -> None:
        super().__init__()
        self.world = World(self.make_store, self.process_type, self.happened)

    @rule(
        process=PROCESS,
        key=KEYS,
        config=CONFIGS,
        amount=st.sampled_from([1, 1, 2]),
        block=st.booleans(),
        fault=FAULTS,
    )
    def call(self, *, process: int, key: str, config: Any, amount: int, block: bool, fault: Fault | None) -> None:
        self.plan(self.world.processes[process], "acquire", fault)
        self.world.call(process, key, config, amount=amount, block=block)
        self.world.settle()

    @rule(key=KEYS, config=CONFIGS)
    def call_everywhere_at_once(self, key: str, config: Any) -> None:
        for process in range(PROCESSES):
            self.world.call(process, key, config)
        self.world.settle()

    @precondition(lambda self: self.world.bodies)
    @rule(which=ANY, verdict=VERDICTS, fault=FAULTS)
    def end_a_body(self, which: int, verdict: str, fault: Fault | None) -> None:
        run = _pick(self.world.bodies, which)
        operation = {"declined": "release", "confirmed": "renew"}.get(verdict, "complete")
        self.plan(self.world.process_of(run), operation, fault)
        self.world.end_body(run, verdict)
        self.world.settle()

    @precondition(lambda self: self.world.running)
    @rule(which=ANY, fault=FAULTS)
    def cancel_a_call(self, which: int, fault: Fault | None) -> None:
        caller = _pick(self.world.running, which)
        self.plan(caller.process, "renew" if caller.seen.is_at_most_once else "release", fault)
        self.world.cancel(caller)
        self.world.settle()

    @precondition(lambda self: self.world.running)
    @rule(process=PROCESS)
    def kill_a_process(self, process: int) -> None:
        self.world.kill(process)
        self.world.settle()

    @rule(process=PROCESS, operation=OPERATIONS, fault=st.sampled_from(Fault))
    def plan_a_fault(self, process: int, operation: str, fault: Fault) -> None:
        self.plan(self.world.processes[process], operation, fault)

    def plan(self, process: Process, operation: str, fault: Fault | None) -> None:
        if fault is not None:
            process.faults[operation] = fault

    @precondition(lambda self: self.world.held)
    @rule(which=ANY, is_lost=st.sampled_from([False, False, True]))
    def end_what_is_held(self, which: int, is_lost: bool) -> None:
        held = _pick(self.world.held, which)
        self.world.drop(held) if is_lost else self.world.deliver(held)
        self.world.settle()

    @rule(seconds=SPANS, is_abrupt=st.booleans())
    def pass_time(self, seconds: float, is_abrupt: bool) -> None:
        self.world.jump(seconds) if is_abrupt else self.world.pass_time(seconds)

    def teardown(self) -> None:
        try:
            if not self.world.judge.broken:
                self.world.finish()
        finally:
            self.world.close()


def _pick(things: list[Any], which: int) -> Any:
    return things[which % len(things)]


def run(machine: type[Machine], **options: Any) -> Counter[str]:
    """Run a machine; to see a failure made small, run it with `Phase.shrink` and more time."""
    machine.happened = Counter()
    chosen = settings(
        stateful_step_count=40,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        **options,
    )
    # A function: of a class hypothesis parses the source, which CPython 3.11.7 at times fails to do (gh-106905).
    factory: Any = lambda: machine()  # noqa: E731, PLW0108
    run_state_machine_as_test(factory, settings=chosen)
    return machine.happened


# --- The promises hold ------------------------------------------------------------------------------------------------


class SQLiteMachine(Machine):
    def make_store(self, clock: FakeClock) -> Any:
        self.directory = tempfile.TemporaryDirectory()
        return SQLitePersistenceLayer(Path(self.directory.name, "records.sqlite3"), clock=clock)

    def teardown(self) -> None:
        super().teardown()
        self.directory.cleanup()


@pytest.mark.parametrize(("machine", "examples"), [(Machine, 60), (SQLiteMachine, 25)])
def test_whatever_happens_the_promises_are_kept(machine: type[Machine], examples: int) -> None:
    happened = run(machine, max_examples=examples)
    for fault in Fault:
        assert happened[fault] >= examples / 5
    for event in ("killed in the body", "cancelled in the body", "replay", "IdempotencyInDoubtError", "body returned"):
        assert happened[event] >= examples / 10


# --- Every kind of fault, once and on purpose -------------------------------------------------------------------------


@pytest.fixture
def world() -> Iterator[World]:
    world = World(lambda clock: MemoryPersistenceLayer(clock=clock))
    yield world
    world.close()


def strike(world: World, operation: str, fault: Fault, **options: Any) -> Caller:
    """Make a call, let the fault strike one of its operations, and let what it held come through late."""
    front = world.processes[0]
    front.faults[operation] = fault
    caller = world.call(0, "a", config_of(**options))
    world.settle()
    if operation == "renew":
        world.pass_time(LEASE_SECONDS / 2)
    for run in world.bodies:
        world.end_body(run, "declined" if operation == "release" else "returned")
    world.settle()
    world.pass_time(LEASE_SECONDS + 1)
    assert world.happened[f"{fault} of {operation}"] == 1
    return caller


@pytest.mark.parametrize("at_most_once", [False, True])
@pytest.mark.parametrize("fault", Fault)
@pytest.mark.parametrize("operation", ["acquire", "complete", "renew", "release"])
def test_a_fault_of_the_store_leaves_no_key_stuck(
    world: World, operation: str, fault: Fault, at_most_once: bool
) -> None:
    strike(world, operation, fault, at_most_once=at_most_once)
    held = len(world.held)
    assert held == (fault in {Fault.HOLD_REQUEST, Fault.HOLD_REPLY})
    world.finish()


def test_a_late_owner_changes_nothing_and_hands_out_the_winners_outcome(world: World) -> None:
    late = world.call(0, "a", config_of(renew=False))
    world.pass_time(LEASE_SECONDS + 1)
    winner = world.call(1, "a", config_of())
    world.settle()
    first, second = world.bodies
    world.end_body(second, "returned")
    world.settle()
    world.end_body(first, "returned")
    world.settle()
    assert late.task.result() == winner.task.result() == second.number


def test_a_completion_that_arrives_after_another_took_over_changes_nothing(world: World) -> None:
    world.processes[0].faults["complete"] = Fault.HOLD_REQUEST
    world.call(0, "a", config_of(renew=False))
    world.settle()
    world.end_body(world.bodies[0], "returned")
    world.settle()
    world.kill(0)  # or it would send the completion once more
    world.pass_time(LEASE_SECONDS + 1)
    winner = world.call(1, "a", config_of())
    world.settle()
    [body] = world.bodies
    world.deliver(world.held[0])
    world.settle()
    world.end_body(body, "returned")
    world.settle()
    assert winner.task.result() == body.number == 2
    world.finish()


def test_a_claim_that_is_answered_after_its_lease_starts_no_body_beside_its_successors(world: World) -> None:
    late = strike(world, "acquire", Fault.HOLD_REPLY)
    world.call(1, "a", config_of())
    world.settle()
    world.deliver(world.held[0])
    world.settle()
    assert not late.seen.runs
    assert len(world.bodies) == 1


@pytest.mark.parametrize("at_most_once", [False, True])
def test_a_process_that_is_killed_in_the_body_is_taken_over_or_in_doubt(world: World, at_most_once: bool) -> None:
    world.call(0, "a", config_of(at_most_once=at_most_once))
    world.settle()
    world.kill(0)
    waiter = world.call(1, "a", config_of(wait=True))
    world.pass_time(LEASE_SECONDS + 2)
    assert world.happened["killed in the body"] == 1
    assert len(waiter.seen.runs) == (not at_most_once)
    world.finish()
    assert world.happened["in doubt at the end"] == at_most_once


def test_what_a_dead_process_has_sent_may_arrive_and_lapses(world: World) -> None:
    world.processes[0].faults["acquire"] = Fault.HOLD_REQUEST
    world.call(0, "a", config_of())
    world.settle()
    world.kill(0)
    world.deliver(world.held[0])
    world.settle()
    refused = world.call(1, "a", config_of())
    world.settle()
    assert isinstance(refused.task.exception(), IdempotencyAlreadyInProgressError)
    world.finish()
    assert world.happened["body returned"] == 1


# --- The machine finds what is broken on purpose ----------------------------------------------------------------------


class CompletesForAnyone(MemoryPersistenceLayer):
    def complete(self, record: DataRecord, *, now: float) -> Immediate[bool]:
        self._records[record.idempotency_key] = record
        return Immediate(True)


class RenewsForAnyone(MemoryPersistenceLayer):
    def renew(self, record: DataRecord, *, now: float) -> Immediate[DataRecord | None]:
        self._records[record.idempotency_key] = record
        return Immediate(record)


class ReleasesForAnyone(MemoryPersistenceLayer):
    def release(self, record: DataRecord) -> Immediate[bool]:
        return Immediate(self._records.pop(record.idempotency_key, None) is not None)


class LooksThenWrites(MemoryPersistenceLayer):
    """Looks one turn of the loop before it writes, so that all who ask meanwhile are decided by the same look."""

    def acquire(self, record: DataRecord, *, now: float, max_clock_skew_seconds: float = 0.0) -> Any:
        key = record.idempotency_key
        seen = self.looks.setdefault(key, self._records.get(key))
        asyncio.get_running_loop().call_soon(self.looks.pop, key, None)
        answer = lifecycle.acquire(seen, record, now=self.clock(), last_fence=self._last_fence)
        if isinstance(answer, Claimed):
            self._records[key] = answer.record
            self._last_fence = max(self._last_fence, answer.record.fence)
        return Immediate(answer)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.looks: dict[str, DataRecord | None] = {}


class TakesOverWhatIsInDoubt(MemoryPersistenceLayer):
    def acquire(self, record: DataRecord, **options: Any) -> Any:
        if is_in_doubt(self._records.get(record.idempotency_key), self.clock()):
            del self._records[record.idempotency_key]
        return super().acquire(record, **options)


class ForgetsFences(MemoryPersistenceLayer):
    def acquire(self, record: DataRecord, **options: Any) -> Any:
        self._last_fence = 0
        self._records.pop(record.idempotency_key, None) if self._is_lapsed(record) else None
        return super().acquire(record, **options)

    def _is_lapsed(self, record: DataRecord) -> bool:
        found = self._records.get(record.idempotency_key)
        return found is not None and lifecycle.is_lapsed(found, now=self.clock())


class NeverGivesBack(Process):
    async def release(self, record: DataRecord) -> bool:
        return True


class OnlySaysItCompletes(Process):
    async def complete(self, record: DataRecord, *, now: float) -> bool:
        return True


class Starts(Process):
    """Takes what blocks it for a claim of its own."""

    def is_ignored(self, record: DataRecord) -> bool:
        raise NotImplementedError

    async def acquire(self, record: DataRecord, *, now: float, max_clock_skew_seconds: float = 0.0) -> Any:
        answer = super().acquire(record, now=now)
        answer = await answer
        if isinstance(answer, Blocked) and self.is_ignored(answer.record):
            return Claimed(record)
        return answer


class StartsBesideAnother(Starts):
    def is_ignored(self, record: DataRecord) -> bool:
        return record.in_progress_expiry_timestamp is not None and is_held(record, self.clock())


class StartsAfterTheOutcome(Starts):
    def is_ignored(self, record: DataRecord) -> bool:
        return is_outcome(record, self.clock())


class StartsInDoubt(Starts):
    def is_ignored(self, record: DataRecord) -> bool:
        return is_in_doubt(record, self.clock())


def machine_with(broken: type[Any]) -> type[Machine]:
    if issubclass(broken, Process):
        return type("BrokenMachine", (Machine,), {"process_type": broken})
    return type("BrokenMachine", (Machine,), {"make_store": lambda _self, clock: broken(clock=clock)})


@pytest.mark.parametrize(
    ("broken", "promise"),
    [
        (CompletesForAnyone, "a late owner does not complete"),
        (RenewsForAnyone, "a late owner does not renew"),
        (ReleasesForAnyone, "a late owner does not release"),
        (LooksThenWrites, "a lease that is held is not given to another"),
        (TakesOverWhatIsInDoubt, "a lease that is held is not given to another"),
        (ForgetsFences, "fences grow"),
        (NeverGivesBack, "a call that is over gives its key back"),
        (OnlySaysItCompletes, "P1: who gets an outcome"),
        (StartsBesideAnother, "P2: no body starts"),
        (StartsAfterTheOutcome, "P1: no body starts"),
        (StartsInDoubt, "P4: no body starts"),
    ],
)
def test_a_broken_promise_is_found(broken: type[Any], promise: str) -> None:
    with pytest.raises(AssertionError, match=promise):
        run(machine_with(broken), max_examples=300, derandomize=True)
