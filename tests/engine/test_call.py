"""The steps that a call takes in each phase."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from aidem import IdempotencyConfig
from aidem._engine.call import STEPS, Answer, Call, Phase, WhoseOutcome
from aidem._engine.plan import CallKey, Plan
from aidem.exceptions import IdempotencyUsageError
from aidem.testing import FakeClock
from tests.support.transactional import ItemLayer, MemoryTransaction, TransactionalLayer


async def held_record(call: Call) -> Any:
    return call.held_record()


TAKE: dict[str, Callable[[Call], Awaitable[Any]]] = {
    "begin": Call.begin,
    "ensure_owned": Call.ensure_owned,
    "complete_in": lambda call: call.complete_in(transaction_of(call), "null"),
    "completion_item": lambda call: call.completion_item("null"),
    "complete": lambda call: call.complete("null"),
    "confirm_commit": Call.confirm_commit,
    "fail": lambda call: call.fail(ValueError()),
    "held_record": held_record,
}


class Layer(TransactionalLayer, ItemLayer):
    """Completes calls in every way."""


def transaction_of(call: Call) -> MemoryTransaction:
    """Return an open transaction; an earlier one of the call was rolled back."""
    assert isinstance(call.plan.layer, Layer)
    return call.plan.layer.begin()


async def call_in(phase: Phase, step: str) -> Call:
    """Return a call that has come so far by its own steps, and in which the step can succeed."""
    plan = Plan(layer=Layer(clock=FakeClock()), config=IdempotencyConfig(), function="app.pay", prefix="pay")
    call = Call(plan, CallKey("pay#1"), bypassed=phase is Phase.BYPASSED)
    if phase is Phase.REPLAYED:
        earlier = Call(plan, CallKey("pay#1"))
        await earlier.begin()
        await earlier.complete("null")
    if phase not in {Phase.NEW, Phase.BYPASSED}:
        await call.begin()
    if phase is Phase.COMPLETING:
        transaction = transaction_of(call)
        await call.complete_in(transaction, "null")
        await (transaction.commit() if step == "confirm_commit" else transaction.rollback())
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
    has_done_nothing = (call.phase, call.record) == (phase, record) and (result is None or result is WhoseOutcome.OURS)
    return Answer.IGNORED if has_done_nothing else Answer.TAKEN


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("step", STEPS)
async def test_a_call_answers_each_step_as_the_table_says(step: str, phase: Phase) -> None:
    call = await call_in(phase, step)
    expected = STEPS[step][phase]
    shows_nothing = {  # hooks are told, and the store is asked or written to
        ("begin", Phase.BYPASSED),
        ("ensure_owned", Phase.CLAIMED),
        ("complete_in", Phase.COMPLETING),
    }
    if (step, phase) in shows_nothing:
        expected = Answer.IGNORED
    assert await answer_of(call, step) is expected
