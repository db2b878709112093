"""A call from blocking code: the body in the calling thread, the persistence layer on the background loop.

Three steps of a call ask the layer: begin, complete and fail. They run on the background loop, and the thread waits for
each of them. The rest is done in the thread, by functions that the async fronts call, too.

An interrupt of a call, such as Ctrl-C, releases its claim: the `try` that does so is entered before the claim is asked
for, and an interrupt of a thread that waits for a step is raised when the step has cleaned up.
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
from aidem._api.execution import EncodedResult, enter, hooked, leave, outcome_of
from aidem._engine.call import Call, Phase, WhoseOutcome
from aidem._engine.failures import COMMIT_UNKNOWN, EFFECT_HAPPENED, FAILED, NOTHING_RUN, RUNNING
from aidem._engine.plan import CallFactory
from aidem._rules import lifecycle
from aidem._runtime import background_loop
from aidem._runtime.threads import has_caller_ended
from aidem.exceptions import IdempotencyUsageError
from aidem.hooks import SILENT, EventKind

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from aidem._engine.plan import CallKey, Plan
    from aidem._rules.abandoned import AbandonedExecution, Check
    from aidem._rules.record import DataRecord
    from aidem.config import IdempotencyConfig, ResponseHook

T = TypeVar("T")


# --- The steps --------------------------------------------------------------------------------------------------------


def begin(call: Call) -> None:
    """Claim the key or find its outcome; one in the local cache is found without the background loop."""
    if call.phase is Phase.BYPASSED:
        call.report(EventKind.BYPASSED)
        return
    cached = None
    if call.plan.config.use_local_cache:
        cached = call.plan.shared.cache.get(call.key.text, now=call.plan.clock())
    if cached is None or lifecycle.differs(cached, call.key.payload_hash):
        _wait_for(call, call.begin, NOTHING_RUN)
    else:
        call.replay(cached)


def ensure_owned(call: Call) -> None:
    """Renew the claim at the store."""
    if call.takes("ensure_owned"):
        _wait_for(call, call.ensure_owned, RUNNING)


def complete(call: Call, recording: EncodedResult) -> WhoseOutcome:
    """Record the outcome."""
    return _wait_for(call, partial(call.complete, recording.text, recording.kind), EFFECT_HAPPENED)


def confirm_commit(call: Call) -> None:
    """Look whether the transaction that completes the call was committed."""
    _wait_for(call, call.confirm_commit, COMMIT_UNKNOWN)


def fail(call: Call, error: BaseException) -> WhoseOutcome:
    """Release the claim, or store the exception if it is an outcome."""
    if not call.takes("fail"):
        call.reporter.tell_held_back()  # an interrupt may have come before that
        return WhoseOutcome.OURS
    try:
        return _wait_for(call, partial(call.fail, error), FAILED)
    except IdempotencyUsageError as closed:
        call.note_failure(error, closed)
        return WhoseOutcome.OURS


def _wait_for(call: Call, step: Callable[[], Coroutine[Any, Any, T]], effect: str) -> T:
    """Take a step on the background loop; what happens there is told to the hooks afterwards, in this thread.

    Args:
        call: The call.
        step: Starts the step.
        effect: What an error says of the function if the loop is closed meanwhile.
    """
    closed = f"{background_loop.CLOSED}; {effect}"
    if call.reporter is SILENT:
        return background_loop.run(step, closed=closed)
    call.reporter.hold_back()
    try:
        return background_loop.run(step, closed=closed)
    finally:
        call.reporter.tell_held_back()


# --- The call ---------------------------------------------------------------------------------------------------------


class BlockingCall(Call):
    """A call that is made by the thread or greenlet which runs its body, and which no event loop knows.

    The statement that completes it in a transaction is executed in that thread; `drive` runs the coroutine around it.
    """

    __slots__ = ("_has_caller_ended",)
    is_blocking = True

    def __init__(self, plan: Plan, key: CallKey, *, bypassed: bool = False) -> None:
        super().__init__(plan, key, bypassed=bypassed)
        self._has_caller_ended = has_caller_ended()

    def watch_body(self) -> Callable[[], bool]:
        """Return a function that tells whether the thread or greenlet that runs the body has ended."""
        return self._has_caller_ended

    async def ask_check(self, abandoned: AbandonedExecution) -> Any:
        """Ask the check: a plain one in the thread that makes the call, an async one on the background loop."""
        check = cast("Check", self.plan.check)
        if inspect.iscoroutinefunction(check):
            return await check(abandoned)
        answer = await background_loop.in_waiting_thread(partial(check, abandoned))
        return await answer if inspect.isawaitable(answer) else answer

    async def _begin_completion(self) -> None:
        _wait_for(self, super()._begin_completion, RUNNING)

    async def _resume_renewal(self) -> None:
        _wait_for(self, super()._resume_renewal, RUNNING)

    async def _explain_refusal(self, earlier: Phase) -> None:
        _wait_for(self, partial(super()._explain_refusal, earlier), RUNNING)


def drive(start: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine of a layer that executes a statement with a blocking driver, so that it does not suspend."""
    try:
        start().send(None)
    except StopIteration as end:
        return cast("T", end.value)
    raise TypeError("the persistence layer awaits although the driver of the transaction is a blocking one")


class BlockingCalls(CallFactory):
    """Makes the calls of one decorated function."""

    __slots__ = ()
    call_type: ClassVar[type[Call]] = BlockingCall

    @staticmethod
    def settled(config: IdempotencyConfig) -> IdempotencyConfig:
        """Return the settings with a response hook that can be called in the thread."""
        return with_blocking_hook(config)


class Execution(execution.Execution):
    """What `aidem.current_execution()` answers in the body of a blocking call."""

    __slots__ = ()

    def ensure_owned(self) -> None:  # type: ignore[override] # blocking code cannot await it
        """Renew the claim at the store, as the async one does, and wait for it."""
        ensure_owned(self._call)

    def complete(self, result: T, *, transaction: object) -> T:  # type: ignore[override]
        """Write the result in an open transaction of yours, as the async one does, and return it as a replay will."""
        return drive(partial(super().complete, result, transaction=transaction))

    def completion_item(self, result: object) -> dict[str, Any] | None:  # type: ignore[override]
        """Return the `Update` that stores the result, for your own `transact_write_items`, as the async one does."""
        return drive(partial(super().completion_item, result))


def execute(call: Call, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a function under a call, or replay its outcome."""
    try:
        return _run(call, function, args, kwargs)
    except BaseException as error:
        fail(call, error)  # of an interrupt between two steps; it does nothing unless the claim is still held
        raise


def _run(call: Call, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    begin(call)
    if call.phase is Phase.REPLAYED:
        return _replayed(call)
    try:
        execution_ = Execution(call)
        token = enter(execution_)
        try:
            result = function(*args, **kwargs)
        finally:
            leave(token)
        if inspect.iscoroutine(result):
            refuse_awaitable(result, call)
        if call.phase is Phase.BYPASSED:
            return execution_.completed_or(result)
        if call.phase is Phase.COMPLETING:
            confirm_commit(call)
            return outcome_of(call, call.plan.serializer)
        recording = EncodedResult.of(result, call.plan.serializer, function=call.plan.function)
    except BaseException as error:
        if fail(call, error) is WhoseOutcome.OURS:
            raise
        return _replayed(call)  # the error would have been the outcome, but another call's counts
    whose = complete(call, recording)
    recording.raise_interruption()
    if whose is WhoseOutcome.WINNERS:
        return _replayed(call)
    recording.warn_if_unavailable(call)
    return recording.value


def _replayed(call: Call) -> Any:
    """Return the outcome that a call found, by way of the response hook, which is a blocking one here."""
    return hooked(call, outcome_of(call, call.plan.serializer))


def refuse_awaitable(result: object, call: Call) -> NoReturn:
    """Raise the error for a function that returned an awaitable, which nothing here awaits."""
    if inspect.iscoroutine(result):
        result.close()
    raise TypeError(
        f"{call.plan.function} returned {'a coroutine' if inspect.iscoroutine(result) else 'an awaitable'}, which has "
        "not run; write an `async def` that awaits it, and decorate that with what aidem has for async functions"
    )


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
