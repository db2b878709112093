"""The steps that a call takes in each phase."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from aidem import DataRecord, IdempotencyConfig
from aidem._engine.call import STEPS, Answer, Call, Phase
from aidem._engine.plan import CallKey, Plan
from aidem.exceptions import IdempotencyUsageError
from aidem.hooks import IdempotencyEvent
from aidem.persistence import Immediate
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.testing import FakeClock


async def held_record(call: Call) -> Any:
    return call.held_record()


TAKE: dict[str, Callable[[Call], Awaitable[Any]]] = {
    "begin": Call.begin,
    "ensure_owned": Call.ensure_owned,
    "complete": lambda call: call.complete("null"),
    "fail": lambda call: call.fail(ValueError()),
    "held_record": held_record,
}


class Traces(MemoryPersistenceLayer):
    """What a step leaves behind: what the layer is asked and what the hooks are told."""

    def __init__(self) -> None:
        super().__init__(clock=FakeClock())
        self.seen: list[object] = []

    def renew(self, record: DataRecord, *, now: float) -> Immediate[DataRecord | None]:
        self.seen.append("renew")
        return super().renew(record, now=now)

    def on_event(self, event: IdempotencyEvent) -> None:
        self.seen.append(event.kind)


async def call_in(phase: Phase, traces: Traces) -> Call:
    """Return a call that has come so far by its own steps."""
    plan = Plan(layer=traces, config=IdempotencyConfig(hooks=(traces,)), function="app.pay", prefix="pay")
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


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("step", STEPS)
async def test_a_call_answers_each_step_as_the_table_says(step: str, phase: Phase) -> None:
    traces = Traces()
    call = await call_in(phase, traces)
    record = call.record
    traces.seen.clear()
    try:
        result = await TAKE[step](call)
    except IdempotencyUsageError:
        answer = Answer.REFUSED
    else:
        has_done_something = traces.seen or call.phase is not phase or isinstance(result, DataRecord)
        answer = Answer.TAKEN if has_done_something else Answer.IGNORED
    assert answer is STEPS[step][phase]
    if answer is not Answer.TAKEN:
        assert (call.phase, call.record, traces.seen) == (phase, record, [])
