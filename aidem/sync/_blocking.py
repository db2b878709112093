"""A call from blocking code: the body in the calling thread, the persistence layer on the background loop.

The flows of the async fronts serve here, too: a `BlockingCall` looks like any call, but its coroutines never suspend,
for the thread waits within them. Such a flow is driven to its end by one `send`.

Whatever interrupts a call, such as Ctrl-C, releases its claim: the `try` that does so is entered before the claim is
asked for, and what interrupts a thread that waits for a step is held up until the step has cleaned up.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect

# The public one raises where there is none, which costs more than all the rest of asking.
from asyncio import _get_running_loop as running_loop  # pyright: ignore[reportPrivateUsage]
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeVar, cast

from aidem._api import execution
from aidem._api.execution import EncodedResult, outcome_of, replayed_value, running
from aidem._engine.call import Call, Phase, WhoseOutcome
from aidem._engine.failures import COMMIT_UNKNOWN, EFFECT_HAPPENED, FAILED, NOTHING_RUN, RUNNING
from aidem._engine.plan import CallFactory
from aidem._rules import lifecycle
from aidem._runtime import background_loop
from aidem._runtime.threads import has_caller_ended
from aidem.exceptions import IdempotencyUsageError
from aidem.hooks import SILENT

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from aidem._engine.plan import CallKey, Plan
    from aidem._rules.record import DataRecord, OutcomeKind
    from aidem.config import IdempotencyConfig, ResponseHook
    from aidem.hooks import IdempotencyEvent

T = TypeVar("T")


class Execution(execution.Execution):
    """What `aidem.current_execution()` answers in the body of a blocking call."""

    __slots__ = ()

    def ensure_owned(self) -> None:  # type: ignore[override] # blocking code cannot await it
        """Renew the claim at the store, as the async one does, and wait for it."""
        drive(super().ensure_owned)

    def complete(self, result: T, *, transaction: object) -> T:  # type: ignore[override]
        """Write the result in an open transaction of yours, as the async one does, and return it as a replay will."""
        return drive(partial(super().complete, result, transaction=transaction))

    def completion_item(self, result: object) -> dict[str, Any] | None:  # type: ignore[override]
        """Return the `Update` that stores the result, for your own `transact_write_items`, as the async one does."""
        return drive(partial(super().completion_item, result))


class BlockingCall(Call):
    """A call whose steps run on the background loop, while the thread that takes them waits.

    Its coroutines never suspend in such a thread, so that one flow serves async and blocking code.
    """

    __slots__ = ("_has_caller_ended",)
    is_blocking = True

    def __init__(self, plan: Plan, key: CallKey, *, bypassed: bool = False) -> None:
        super().__init__(plan, key, bypassed=bypassed)
        self._has_caller_ended = has_caller_ended()

    def watch_body(self) -> Callable[[], bool]:
        """Return what tells whether the thread or greenlet that runs the body is gone: it made the call, too."""
        return self._has_caller_ended

    async def begin(self) -> None:
        """Claim the key or find its outcome; one in the local cache is found without the background loop."""
        cached = None
        if self.phase is Phase.NEW and self.plan.config.use_local_cache:
            cached = self.plan.shared.cache.get(self.key.text, now=self.plan.clock())
        if cached is None or lifecycle.differs(cached, self.key.payload_hash):
            await self._step(super().begin, NOTHING_RUN)
        else:
            self._replay(cached)

    async def ensure_owned(self) -> None:
        """Renew the claim at the store."""
        await self._step(super().ensure_owned, RUNNING)

    async def complete(self, text: str, outcome: OutcomeKind | None = None) -> WhoseOutcome:
        """Record the outcome."""
        return await self._step(partial(super().complete, text, outcome), EFFECT_HAPPENED)

    async def confirm_commit(self) -> None:
        """Look whether the transaction that completes the call was committed."""
        await self._step(super().confirm_commit, COMMIT_UNKNOWN)

    async def _begin_completion(self) -> None:
        await self._step(super()._begin_completion, RUNNING)

    async def _resume_renewal(self) -> None:
        await self._step(super()._resume_renewal, RUNNING)

    async def _explain_refusal(self, earlier: Phase) -> NoReturn:
        await self._step(partial(super()._explain_refusal, earlier), RUNNING)

    async def fail(self, error: BaseException) -> WhoseOutcome:
        """Release the claim, or store the exception if it is an outcome."""
        if not self.holds_claim:
            return WhoseOutcome.OURS
        try:
            return await self._step(partial(super().fail, error), FAILED)
        except IdempotencyUsageError as closed:
            self._note(error, closed)
            return WhoseOutcome.OURS

    async def _step(self, step: Callable[[], Coroutine[Any, Any, T]], effect: str) -> T:
        """Take a step on the background loop, unless it asks nothing there, or is part of one that runs there."""
        is_at_store = self.phase is Phase.NEW or self.holds_claim
        if not is_at_store or running_loop() is not None:
            return await step()
        closed = f"{background_loop.CLOSED}; {effect}"
        if self.reporter is SILENT:
            return background_loop.run(step, closed=closed)
        events: list[IdempotencyEvent] = []
        self.reporter.redirect = events.append
        try:
            return background_loop.run(step, closed=closed)
        finally:
            self.reporter.redirect = None
            for event in events:
                self.reporter.tell(event)


class BlockingCalls(CallFactory):
    """Makes the calls of one decorated function."""

    __slots__ = ()
    call_type: ClassVar[type[Call]] = BlockingCall

    def config(self) -> IdempotencyConfig:
        """Return the settings of a call that starts now."""
        return with_blocking_hook(super().config())


def execute(call: Call, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a function under a call, or hand out what it returned before."""
    return settled(call, lambda: _run(call, function, args, kwargs))


def _run(call: Call, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    drive(call.begin)
    if call.phase is Phase.REPLAYED:
        return drive(partial(replayed_value, call))
    try:
        with running(Execution(call)) as execution:
            result = function(*args, **kwargs)
        _refuse_coroutine(result, call)
        if call.phase is Phase.BYPASSED:
            return execution.completed_or(result)
        if call.phase is Phase.COMPLETING:
            drive(call.confirm_commit)
            return outcome_of(call, call.plan.serializer)
        recording = EncodedResult.of(result, call.plan.serializer, function=call.plan.function)
    except BaseException as error:
        if drive(partial(call.fail, error)) is WhoseOutcome.OURS:
            raise
        return drive(partial(replayed_value, call))  # the error would have been the outcome, but another call's counts
    whose = drive(partial(call.complete, recording.text, recording.kind))
    recording.raise_interruption()
    if whose is WhoseOutcome.WINNERS:
        return drive(partial(replayed_value, call))
    recording.warn_if_unavailable(call)
    return recording.value


def settled(call: Call, action: Callable[[], T]) -> T:
    """Do something under a call; what interrupts it between two steps releases the claim, too."""
    try:
        return action()
    except BaseException as error:
        drive(partial(call.fail, error))  # does nothing unless the claim is still held
        raise


def drive(start: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine that does not suspend."""
    try:
        start().send(None)
    except StopIteration as end:
        return cast("T", end.value)
    except RuntimeError as error:
        if str(error) == "coroutine raised StopIteration" and error.__cause__ is not None:
            raise error.__cause__ from None  # the function raised it, and no coroutine lets it pass
        raise
    raise TypeError("the function awaits, so it is an async one; use what aidem has for those instead of aidem.sync")


def _refuse_coroutine(result: object, call: Call) -> None:
    if inspect.iscoroutine(result):
        result.close()
        message = (
            f"{call.plan.function} returned a coroutine, which has not run; write an `async def` that awaits it, and "
            "decorate that with what aidem has for async functions"
        )
        raise TypeError(message)


def refuse_event_loop(instead: str) -> None:
    """Check that no event loop runs on this thread, which would stand still."""
    if running_loop() is not None:
        raise IdempotencyUsageError(f"aidem.sync would block the event loop that runs on this thread; {instead}")


def with_blocking_hook(config: IdempotencyConfig) -> IdempotencyConfig:
    """Return the settings with a response hook that can be called here, if there is one."""
    return config if config.response_hook is None else _with_blocking_hook(config)


@functools.lru_cache
def _with_blocking_hook(config: IdempotencyConfig) -> IdempotencyConfig:
    hook = cast("ResponseHook", config.response_hook)

    def blocking_hook(response: Any, record: DataRecord) -> Any:
        answer = hook(response, record)
        return background_loop.run(partial(_await, answer)) if inspect.isawaitable(answer) else answer

    return dataclasses.replace(config, response_hook=blocking_hook)


async def _await(answer: Awaitable[T]) -> T:
    return await answer
