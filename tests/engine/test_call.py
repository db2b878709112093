"""The steps that a call takes in each phase."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from aidem import IdempotencyConfig
from aidem._engine.call import STEPS, Answer, Call, Phase, WhoseOutcome
from aidem._engine.plan import CallKey, Plan
from aidem.exceptions import IdempotencyUsageError
from aidem.persistence.memory import MemoryPersistenceLayer


async def held_record(call: Call) -> Any:
    return call.held_record()


TAKE: dict[str, Callable[[Call], Awaitable[Any]]] = {
    "begin": Call.begin,
    "ensure_owned": Call.ensure_owned,
    "complete": lambda call: call.complete("null"),
    "fail": lambda call: call.fail(ValueError()),
    "held_record": held_record,
}


async def call_in(phase: Phase) -> Call:
    """Return a call that has come so far by its own steps."""
    plan = Plan(layer=MemoryPersistenceLayer(), config=IdempotencyConfig(), function="app.pay", prefix="pay")
    call = Call(plan, CallKey("pay#1"), bypassed=phase is Phase.BYPASSED)
    if phase is Phase.REPLAYED:
        earlier = Call(plan, CallKey("pay#1"))
        await earlier.begin()
        await earlier.complete("null")
    if phase in {Phase.CLAIMED, Phase.REPLAYED, Phase.ENDED}:
        await call.begin()
    if phase is Phase.ENDED:
        await call.complete("null")
    assert call.phase is phase
    return call


async def answer_of(call: Call, step: str) -> Answer:
    """Return what a call answers to a step that succeeds in at least one phase."""
    phase, record = call.phase, call.record
    try:
        result = await TAKE[step](call)
    except IdempotencyUsageError:
        return Answer.REFUSED
    has_done_nothing = (call.phase, call.record) == (phase, record) and result in {None, WhoseOutcome.OURS}
    return Answer.IGNORED if has_done_nothing else Answer.TAKEN


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("step", STEPS)
async def test_a_call_answers_each_step_as_the_table_says(step: str, phase: Phase) -> None:
    call = await call_in(phase)
    expected = STEPS[step][phase]
    if (step, phase) == ("begin", Phase.BYPASSED) or (step, phase) == ("ensure_owned", Phase.CLAIMED):
        expected = Answer.IGNORED  # nothing of it shows here: hooks are told, and the store is asked
    assert await answer_of(call, step) is expected
