"""The end of a run: every key answers once the faults are over, and nothing is left of what happened."""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING

from aidem.exceptions import (
    IdempotencyAlreadyInProgressError,
    IdempotencyInDoubtError,
    IdempotencyResultUnavailableError,
    IdempotencyValidationError,
)
from tests.simulation.call import Call, Front, StoredError
from tests.simulation.cancellation import Way
from tests.simulation.internals import (
    CLEANUP_SECONDS,
    forget_loops_of,
    forget_writes_of,
    left_of_calls,
    objects_of_calls,
    writes_of,
)
from tests.simulation.process import Process
from tests.simulation.rules import Rule

if TYPE_CHECKING:
    from collections import Counter

    from tests.simulation.world import World


def judge_end(world: World) -> None:
    """Let nothing go wrong any more, and look at every key and every process."""
    conditions = world.conditions
    world.is_calm = True
    world.run_until(world.now + max(conditions.longest_late, CLEANUP_SECONDS) + 1.0)
    if conditions.is_at_most_once:  # until the last lease has passed
        world.run_until(world.now + conditions.lease_or(0) + conditions.max_clock_skew + 2 * conditions.skew + 1.0)
    prober = Process(world, len(world.processes))
    world.processes.append(prober)
    for key in range(conditions.keys):
        _probe(world, prober, key)
    world.run_until(world.now + 30.0)
    world.judge.claims_have_ended()
    for process in world.processes:
        if not process.is_dead:
            _judge_leftovers(world, process)


def _probe(world: World, prober: Process, key: int) -> None:
    """Call for a key once more."""
    conditions = world.conditions
    has_other_payloads = any(call.amount != 1 for call in world.calls if call.key == key)
    call = Call(world, prober, key)
    call.way, call.front, call.wait, call.amount, call.is_brief = Way.NONE, Front.FUNCTION, 600.0, 1, True
    if conditions.is_at_most_once or conditions.lease is None:
        call.wait = 0.0
    task = prober.loop.create_task(call.run())
    limit = conditions.lease_or(30) + conditions.max_clock_skew + 2 * conditions.skew + 3.0
    if not conditions.has_long_window:
        limit += 2.0
    world.run_until(world.now + limit)
    expected: list[type[BaseException]] = [StoredError, IdempotencyResultUnavailableError]
    if has_other_payloads:
        expected.append(IdempotencyValidationError)
    if conditions.policy == "raise":
        expected.append(IdempotencyInDoubtError)
    if conditions.lease is None:
        expected.append(IdempotencyAlreadyInProgressError)  # it holds until it expires
    if not task.done() or (call.outcome != "value" and type(call.error) not in expected):
        found = world.store.records.get(world.key_text(call))
        world.violate(Rule.H12, f"k{key} is stuck: {call.outcome} {call.error!r} {found}")


def _judge_leftovers(world: World, process: Process) -> None:
    tasks = [task for task in asyncio.all_tasks(process.loop) if not task.done()]
    for left in [*tasks, *writes_of(process.loop), *left_of_calls(process.layer)]:
        world.violate(Rule.H7, f"this is left in p{process.number}: {left}")


def dispose(world: World, *, left_by_others: Counter[str]) -> None:
    """Drop everything; what crashed is only now collected, and must not talk to the store."""
    is_whole = not world.violations and not any(process.is_dead for process in world.processes)
    for process in world.processes:
        process.is_disposed = True
    for call in world.calls:  # their tracebacks hold frames
        call.error = call.body_error = call.value = None
    if is_whole and objects_of_calls() - left_by_others:
        gc.collect()
        if left := objects_of_calls() - left_by_others:
            world.violate(Rule.H7, f"objects are left in memory: {dict(left)}")
    for process in world.processes:
        if process.is_dead or world.violations:
            forget_loops_of(process.layer)  # what they share would hold the layer
        process.loop.dispose()
        forget_writes_of(process.loop)  # of a process that crashed
    world.events.clear()
