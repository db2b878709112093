"""A call: what it asks of aidem, what its body does, and what was seen of it."""

from __future__ import annotations

import asyncio
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from aidem import Execution, current_execution, idempotency, idempotent_function
from tests.simulation.cancellation import TASK_CANCELS, Way, bounded
from tests.simulation.network import CURRENT
from tests.simulation.rules import Rule

if TYPE_CHECKING:
    from aidem import BlockExecution
    from tests.simulation.process import Process
    from tests.simulation.world import World

PREFIX = "simulation"


class OrdinaryError(Exception):
    """What a body raises that has failed; its key is given back."""


class StoredError(Exception):
    """What a body raises as an outcome."""


class OddError(BaseException):
    """What a body raises that is no `Exception`."""


class Front(StrEnum):
    """By which part of the interface a call is made."""

    FUNCTION = "function"
    RUN = "run"
    GUARD = "guard"
    GENERATOR = "generator"


class End(StrEnum):
    """How a body ended."""

    VALUE = "value"
    STORED = "stored"
    ORDINARY = "ordinary"
    ODD = "odd"
    CANCELLED = "cancelled"
    CLOSED = "closed"


ENDS: dict[type[BaseException], End] = {
    asyncio.CancelledError: End.CANCELLED,
    GeneratorExit: End.CLOSED,
    StoredError: End.STORED,
    OddError: End.ODD,
}


class Call:
    """One idempotent call.

    Attributes:
        outcome: What its caller got: "value", "error", "cancelled" or "closed"; None: it has not ended.
        owners: The tokens of its claims, one for each attempt.
        owner: The token of the claim under which its body runs.
        has_acted: Whether the effect of its body has happened.
        is_fenced_off: Whether that cannot happen any more, since a check has asked.
        has_found_effect: Whether its check has found that the effect of another call had happened.
        trap: While which operation is under way it is cancelled, or its process paused; None: no such thing.
        renewal_due_at: When it has to ask for its next renewal at the latest; None: not known.
        renewal_asked_at: When it asked for the renewal that is under way; None: none is.
    """

    def __init__(self, world: World, process: Process, key: int, *, depth: int = 0) -> None:
        self.world = world
        self.process = process
        self.key = key
        self.depth = depth
        self.number = len(world.calls)
        world.calls.append(self)
        self._draw()
        # Its claim.
        self.owners: set[str | None] = set()
        self.owner: str | None = None
        self.fence = 0
        self.is_bypassed = False
        self.renewal_due_at: float | None = None
        self.renewal_asked_at: float | None = None
        self.frozen_when_answered = 0.0
        self.has_lost_lease = False
        self.has_looked = False
        # Its body.
        self.bodies = 0
        self.is_running = False
        self.body_end: End | None = None
        self.body_error: BaseException | None = None
        self.body_began_at = self.body_ended_at = 0.0
        self.frozen_when_body_ended = 0.0
        self.has_acted = False
        self.is_fenced_off = False
        self.has_found_effect = False
        self.confirms = False
        self.nests = False
        self.is_brief = False
        # Its caller.
        self.started_at = world.now
        self._task: asyncio.Task[Any] | None = None
        self.ended_at: float | None = None
        self.cancelled_at: float | None = None  # in seconds of the process
        self.is_closed = False
        self.is_crashed = False
        self.outcome: str | None = None
        self.value: Any = None
        self.error: BaseException | None = None

    def _draw(self) -> None:
        rng, conditions = self.world.rng, self.world.conditions
        self.amount = 1 if rng.random() < 0.95 else 2
        self.front = rng.choice([Front.FUNCTION, *Front])
        self.wait = rng.choice([0.0, 0.0, 0.4, 3.0, 20.0, 90.0])
        self.way = Way.NONE if self.depth else rng.choice([Way.NONE] * 3 + list(Way))
        self.trap: str | None = rng.choice(
            [None, None, "acquire", "renew", "renew", "complete", "release", "take_over"]
        )
        self.is_paused_in_trap = rng.random() < 0.3
        if self.trap is not None and rng.random() < 0.4 and not self.depth:
            self.way = rng.choice(list(TASK_CANCELS))
        if conditions.no_cancels:
            self.way = Way.NONE
        if (self.way is Way.CLOSE or self.depth) and self.front is Front.GENERATOR:
            self.front = Front.GUARD  # closing what waits for a generator does not reach into it
        lease = conditions.lease_or(3)
        renewal = lease / 3 + rng.uniform(0, 2.5 * min(conditions.speed, lease / 20))  # about when one is under way
        self.when = rng.choice(
            [
                0.0,
                0.001,
                renewal,
                rng.uniform(0, 0.1),
                rng.uniform(0, lease),
                rng.uniform(0, 3 * lease),
                rng.uniform(0, 8),
            ]
        )

    def __repr__(self) -> str:
        return (
            f"<call {self.number} of p{self.process.number} on k{self.key}: {self.front}, {self.way}, wait {self.wait}>"
        )

    @property
    def is_uninterrupted(self) -> bool:
        """Whether nobody cancelled or closed it."""
        return self.cancelled_at is None and not self.is_closed

    # --- The caller ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Make the call as a task of its own, and tell the judge how it ended."""
        CURRENT.set(self)
        task = self._task = asyncio.current_task()
        assert task is not None
        if self.trap is None:
            self._cancel_after(self.when)
        self.started_at = self.world.now
        try:
            self.value = await bounded(self)
            self.outcome = "value"
        except asyncio.CancelledError as error:
            self.outcome, self.error = "cancelled", error
        except GeneratorExit:
            raise  # of a process that crashed, and is collected
        except BaseException as error:  # noqa: BLE001 - the judge looks at it
            self.outcome, self.error = "error", error
        self.ended_at = self.world.now
        self.world.judge.call_ends(self)
        await self._see_cancellation(task)
        self.error = None if self.error is None else self.error.with_traceback(None)
        self.body_error = self._task = None

    async def _see_cancellation(self, task: asyncio.Task[Any]) -> None:
        """Tell whether the cancellation arrives: once, and only if there was one."""
        seen = self.outcome == "cancelled"
        try:
            for _ in range(3):
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            if self.cancelled_at is None:
                self.world.violate(Rule.H6, f"{self}: a cancellation that nobody has requested, or that was over")
            seen = True
        if self.way in TASK_CANCELS:
            if self.cancelled_at is not None and not seen:
                self.world.violate(
                    Rule.H6, f"{self}: a cancellation was swallowed, outcome {self.outcome} {self.error!r}"
                )
        elif task.cancelling() and self.way is not Way.GROUP:  # Python 3.11 and 3.12 leave one over
            self.world.violate(Rule.H6, f"{self}: {task.cancelling()} requests to cancel are left over")

    def _cancel_after(self, seconds: float) -> None:
        """Cancel its task then, if that is its way, once or several times."""
        for number in range(TASK_CANCELS.get(self.way, 0)):
            after = seconds + self.world.rng.choice([0.0, 0.001, 0.3]) * number
            self.process.loop.call_later(after, self._cancel)

    def _cancel(self) -> None:
        if self.ended_at is None and self._task is not None:
            self.note_cancellation()
            self._task.cancel()

    def spring(self, operation: str) -> None:
        """Let the trap close, if this is the operation that it waits for."""
        world = self.world
        if self.trap != operation or self.ended_at is not None or world.is_calm:
            return
        self.trap = None
        after = world.conditions.delay()
        if self.is_paused_in_trap and not world.conditions.is_gentle:
            world.happened[f"paused while asking to {operation}"] += 1
            seconds = world.rng.uniform(0.5, 1.5) * world.conditions.lease_or(3)
            is_suspended = world.rng.random() < 0.3
            world.at(world.now + after, lambda: self.process.freeze(seconds, is_suspended=is_suspended))
        elif self.way in TASK_CANCELS:
            world.happened[f"cancelled while asking to {operation}"] += 1
            self._cancel_after(after)

    def note_cancellation(self) -> None:
        """Take note that it is being cancelled."""
        if self.ended_at is not None or self.cancelled_at is not None:
            return
        self.cancelled_at = self.process.own_seconds()
        where = "body" if self.is_running else "after the body" if self.bodies else "before the body"
        self.world.happened[f"cancelled {where}: {self.way}"] += 1
        self.world.tell(f"{self} is cancelled")

    async def made(self) -> Any:
        """Make the call by its front."""
        CURRENT.set(self)
        options: dict[str, Any] = {
            "persistence_store": self.process.layer,
            "config": self.world.config(wait=self.wait, cache=self.process.use_cache),
            "key_prefix": PREFIX,
        }
        key = f"k{self.key}"
        if self.front is Front.FUNCTION:

            @idempotent_function(data_keyword_argument="order", **options)
            async def function(*, order: dict[str, Any]) -> dict[str, Any]:
                return await self._body()

            return await function(order={"id": key, "amount": self.amount})
        block = idempotency(key, payload={"amount": self.amount}, **options)
        if self.front is Front.GENERATOR:
            return await self._by_generator(block)
        async with block as execution:
            if self.front is Front.RUN:
                return await execution.run(self._body)
            if not execution.replayed:
                execution.result = await self._body()
        return execution.result

    async def _by_generator(self, block: Any) -> Any:
        async def generate() -> Any:
            execution: BlockExecution
            async with block as execution:
                if not execution.replayed:
                    execution.result = await self._body()
                yield None
            yield execution.result

        generator = generate()
        try:
            await anext(generator)
            if self.world.rng.random() < 0.3:
                self.is_closed = True
                self.world.happened["closed by aclose"] += 1
                raise TimeoutError
            return await anext(generator)
        finally:
            await generator.aclose()

    # --- The body -----------------------------------------------------------------------------------------------------

    async def _body(self) -> dict[str, Any]:
        execution = current_execution()
        self.world.judge.body_begins(self, execution)
        try:
            value = {"call": self.number} if self.is_brief else await self._act(execution)
        except BaseException as error:
            self._body_ends(ENDS.get(type(error), End.ORDINARY), error)
            raise
        self._body_ends(End.VALUE, None)
        return value

    def _body_ends(self, end: End, error: BaseException | None) -> None:
        if self.process.is_disposed:
            return
        self.is_running = False
        might_have = end in {End.ODD, End.CANCELLED, End.CLOSED} and self.world.rng.random() < 0.5
        self.has_acted = not self.is_fenced_off and (end in {End.VALUE, End.STORED} or might_have)
        self.body_end = end
        self.body_error = error
        self.body_ended_at = self.world.now
        self.frozen_when_body_ended = self.process.frozen_total
        self.world.happened[f"body: {end}"] += 1
        self.world.tell(f"{self}: body {end}")

    async def _act(self, execution: Execution) -> dict[str, Any]:
        rng, conditions = self.world.rng, self.world.conditions
        for _ in range(rng.randrange(0, conditions.longest_body)):
            await self._do_something(execution)
        end = rng.random()
        if end < conditions.failure_rate:
            raise OrdinaryError(self.number)
        if end < conditions.failure_rate + 0.08 and conditions.stores_exceptions:
            raise StoredError(self.number)
        if end < conditions.failure_rate + 0.12:
            raise OddError(self.number)
        value: dict[str, Any] = {"call": self.number}
        if rng.random() < 0.03:
            value["object"] = object()  # which cannot be stored
        return value

    async def _do_something(self, execution: Execution) -> None:
        world, rng, conditions = self.world, self.world.rng, self.world.conditions
        lease = conditions.lease_or(3)
        action = rng.random()
        if action < 0.55:
            await asyncio.sleep(
                rng.choice([0.0, rng.uniform(0, 0.2), rng.uniform(0, lease), rng.uniform(0, 2.5 * lease)])
            )
        elif action < 0.7:
            self.confirms = True
            await execution.ensure_owned()
            self.confirms = False
            world.judge.confirmed(self)
        elif action < 0.7 + conditions.block_rate and not conditions.is_gentle and not world.is_calm:
            world.happened["blocked loop"] += 1
            self.process.freeze(rng.uniform(0, 2.5 * lease))  # the body blocks its loop
            await asyncio.sleep(0)
        elif action < 0.95 and self.depth < 2 and self.key + 1 < conditions.keys:
            self.nests = True
            await Call(world, self.process, self.key + 1, depth=self.depth + 1)._run_nested()

    async def _run_nested(self) -> None:
        """Make the call within the body of another, which goes on unless it is cancelled or closed."""
        outer = CURRENT.get()
        try:
            self.value = await self.made()
            self.outcome = "value"
        except asyncio.CancelledError as error:
            self.outcome, self.error = "cancelled", error
            raise
        except GeneratorExit as error:
            self.outcome, self.error, self.is_closed = "closed", error, True
            raise
        except (Exception, OddError) as error:  # noqa: BLE001 - the judge looks at it
            self.outcome, self.error = "error", error
        finally:
            CURRENT.set(outer)
            if not self.process.is_disposed:
                self.ended_at = self.world.now
                self.world.judge.call_ends(self)
