"""A process whose every call is interrupted by its parent once.

`python -m tests.support.sync_interrupted FRONT [CONTROL]`

For every line it reads it makes a call under a fresh key, which takes about 30 ms, and then makes that call again,
undisturbed. It reports where it was when the signal came, what the second call got, and what it had to get. CONTROL
breaks something on purpose.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from aidem import sync
from aidem._rules import lifecycle
from aidem.exceptions import IdempotencyError
from aidem.persistence.memory import MemoryPersistenceLayer
from tests.support.planned import PlannedLayer, real_now
from tests.support.records import clear

OPERATION_SECONDS = 0.004
SIGNAL_PATIENCE_SECONDS = 10.0


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


class Stage:
    """Where the call is."""

    name = "before"
    struck_at = ""
    is_armed = False


class StagedLayer(PlannedLayer):
    """Takes its time before and after it applies anything, and says when."""

    def __init__(self, control: str) -> None:
        super().__init__(inner=MemoryPersistenceLayer(), clock=real_now)
        self.control = control

    async def _do(self, operation: str, apply: Any) -> Any:
        stage = {"acquire": "claim", "complete": "complete"}.get(operation, Stage.name)
        Stage.name = stage
        await asyncio.sleep(OPERATION_SECONDS)
        if self.control == "keeps-claims" and operation == "release":
            return True
        answer = await apply()
        await asyncio.sleep(OPERATION_SECONDS)
        if stage != "before":
            Stage.name = "between"
        return answer


def strike(_signal: int, _frame: object) -> None:
    Stage.struck_at = Stage.name
    if Stage.is_armed:
        raise KeyboardInterrupt


def interrupted(call: Callable[[], object]) -> bool:
    """Make a call; whether it was interrupted. The signal comes in any case, so that none comes later."""
    Stage.name, Stage.struck_at = "before", ""
    try:
        Stage.is_armed = True
        say("going")
        call()
        Stage.name = "after"
        deadline = time.monotonic() + SIGNAL_PATIENCE_SECONDS
        while not Stage.struck_at and time.monotonic() < deadline:
            time.sleep(0.001)
    except KeyboardInterrupt:
        return True
    finally:
        Stage.is_armed = False
    return False


def main(front: str, control: str) -> None:
    layer = StagedLayer(control)
    finished: set[int] = set()

    def body(number: int) -> str:
        Stage.name = "body"
        if control == "completes-early":
            asyncio.run(complete_early(layer))
        time.sleep(2 * OPERATION_SECONDS)
        Stage.name = "between"
        finished.add(number)
        return f"finished {number}"

    decorated = sync.idempotent_function(persistence_store=layer)(body)

    def block(number: int) -> str:
        with sync.idempotency(number, persistence_store=layer) as execution:
            if not execution.replayed:
                execution.result = body(number)
        result: str = execution.result
        return result

    charge = decorated if front == "decorator" else block
    signal.signal(signal.SIGINT, strike)
    for number, _ in zip(itertools.count(), sys.stdin):
        interrupted(lambda: charge(number))  # noqa: B023 - called at once
        struck_at, again = Stage.struck_at, ""
        was_recorded = any(record.status == "COMPLETED" for record in layer.inner.records().values())
        expected = f"finished {number}"
        if was_recorded and number not in finished:
            expected = "no outcome: the body did not end"
        try:
            again = charge(number)
        except IdempotencyError as error:
            again = type(error).__name__
        clear(layer.inner)
        say(json.dumps({"stage": struck_at, "again": again, "expected": expected}))


async def complete_early(layer: StagedLayer) -> None:
    """Do what nobody may: record the outcome of a body that still runs."""
    for record in list(layer.inner.records().values()):
        now = real_now()
        early = lifecycle.completed(record, response_data='"early"', outcome=None, expires_after_seconds=60, now=now)
        await layer.inner.complete(early, now=now)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "")
