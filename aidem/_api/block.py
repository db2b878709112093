"""`async with idempotency(key)`: a block that runs once per key."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, TypeVar, cast

from aidem._api.execution import EncodedResult, Execution, hooked, outcome_of, replayed_value, running
from aidem._engine.call import Phase, WhoseOutcome
from aidem._engine.plan import CallFactory, Plan
from aidem.config import check_call_options
from aidem.exceptions import IdempotencyLeaseLostError, IdempotencyUsageError
from aidem.serialization import round_trip

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType

    from aidem._engine.call import Call
    from aidem._rules.record import DataRecord
    from aidem.config import IdempotencyConfig
    from aidem.persistence import PersistenceLayer
    from aidem.serialization import OutputSerializer

P = ParamSpec("P")
R = TypeVar("R")

LOOK_FIRST = (
    "the block never asked whether it is a replay, so a retry would have repeated its effect; write "
    "`return await execution.run(function, ...)`, or guard the effect with `if not execution.replayed:`"
)


def idempotency(
    key: Any,
    *,
    payload: Any = ...,
    persistence_store: PersistenceLayer | None = None,
    config: IdempotencyConfig | None = None,
    output_serializer: OutputSerializer | None = None,
    key_prefix: str = "aidem",
) -> AbstractAsyncContextManager[BlockExecution]:
    """Run a block once per key; a later block with the same key gets the result of the first.

    Args:
        key: Identifies the block: any value that a payload can be. `event_key_jmespath` is not applied to it.
        payload: A value that must not change under the key; `payload_validation_jmespath` selects a part of it.
            Default: nothing is validated.
        persistence_store: The layer that keeps the records. Default: the layer of `configure`.
        config: The settings. Default: the config of `configure`.
        output_serializer: Turns the result into JSON values and back. Default: chosen by the return annotation of the
            function that `run` calls; without `run`, the result is JSON data.
        key_prefix: Keeps the keys of different blocks apart. Default: `"aidem"`.

    Raises:
        IdempotencyConfigError: At once: an option has a value that cannot work.
        IdempotencyKeyError: On entering: `key` cannot be a key, or is none and `raise_on_no_idempotency_key` is set.
        IdempotencyValidationError: On entering: the key was used before with another payload.
        IdempotencyAlreadyInProgressError: On entering: another execution of the key did not end within
            `wait_timeout_seconds`.
        IdempotencyInDoubtError: On entering: the owner of a claim vanished, and `on_abandoned="raise"`.
        IdempotencyResultUnavailableError: The block ran once, and its result cannot be replayed.
        IdempotencyLeaseLostError: On leaving: another caller took the claim over, and recorded no outcome for it.
        IdempotencyPersistenceLayerError: The store failed; the message says whether the block has run.
        IdempotencyUsageError: On leaving: the block neither called `run` nor read `replayed` or `result`, so a retry
            would repeat its effect.
    """
    check_call_options(
        config=config,
        persistence_store=persistence_store,
        output_serializer=output_serializer,
        key_prefix=key_prefix,
    )
    return _AsyncBlock(
        key,
        payload,
        layer=persistence_store,
        config=config,
        serializer=output_serializer,
        key_prefix=key_prefix,
    )


SWALLOWED = (
    "the function that run() called has failed, and the block swallowed its exception without setting a result; let "
    "the exception out, so that the key is released, or set `execution.result`"
)


class BlockExecution(Execution):
    """The execution of a block: what it sees of its call, and where it leaves its result."""

    __slots__ = (
        "_has_looked",
        "_has_run",
        "_is_decoded",
        "_is_failed",
        "_is_set",
        "_recording",
        "_result",
        "_serializer",
    )

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self._serializer = call.plan.serializer
        self._has_looked = False
        self._has_run = False
        self._is_set = False  # by the block itself
        self._is_failed = False  # from the start of the function until it has a result
        self._is_decoded = call.phase is not Phase.REPLAYED
        self._recording: EncodedResult | None = None
        self._result: Any = None

    @property
    def replayed(self) -> bool:
        """Whether the outcome of an earlier execution is handed out, so that nothing is to be done."""
        self._has_looked = True
        return super().replayed

    @property
    def result(self) -> Any:
        """The result: what was recorded before, what the block has set, or after the block what a replay will get.

        Raises:
            IdempotencyResultUnavailableError: The outcome cannot be handed out again.
            Exception: The stored exception, if the outcome is one.
            IdempotencyUsageError: Setting it on a replay, or after the block.
        """
        self._has_looked = True
        if not self._is_decoded:
            self._decoded(self._recorded() if self._call.phase is Phase.ENDED else self._replayed())
        return self._result

    @result.setter
    def result(self, value: Any) -> None:
        if self._call.phase is Phase.REPLAYED:
            message = "this is a replay, and its result is recorded; guard the effect with `if not execution.replayed:`"
            raise IdempotencyUsageError(message, key=self.key)
        if self._call.phase is Phase.ENDED:
            raise IdempotencyUsageError("the block is over, and its result is recorded", key=self.key)
        self._refuse_completed("result")
        self._recording = None
        self._is_failed = False
        self._is_set = True
        self._result = value

    async def run(self, func: Callable[P, Awaitable[R]], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function, or hand out what it returned before; leaving the block records its result.

        The return annotation of the function says how its result is rebuilt, unless the block has an
        `output_serializer`.

        Raises:
            IdempotencyUsageError: It was called before: a block has one result.
        """
        if self._has_run:
            raise IdempotencyUsageError("run() was called before: a block has one result", key=self.key)
        self._refuse_completed("run()")
        self._has_looked = self._has_run = True
        if self._call.phase is Phase.BYPASSED:
            self._result = await _called(func, args, kwargs)
            return cast("R", self._result)
        self._serializer = self._call.plan.serializer_for(func)
        if self._call.phase is Phase.REPLAYED:
            replayed = hooked(self._call, self._recorded())
            return cast("R", self._decoded(await replayed if inspect.isawaitable(replayed) else replayed))
        self._is_failed = True
        recording = self._recording_of(await _called(func, args, kwargs))
        self.result = recording.value
        self._recording = recording
        recording.raise_interruption()
        return cast("R", recording.value)

    async def complete(self, result: R, *, transaction: object) -> R:
        """Write the result in an open transaction of your own, as `Execution.complete` does; it is the block's result.

        Raises:
            IdempotencyUsageError: Also beside `run` or `execution.result = ...`.
        """
        self._refuse_other_result("complete()")
        completed = await super().complete(result, transaction=transaction)
        self._result = completed
        return completed

    async def completion_item(self, result: object) -> dict[str, Any] | None:
        """Return the `Update` that stores the result, as `Execution.completion_item` does; it is the block's result.

        Raises:
            IdempotencyUsageError: Also beside `run` or `execution.result = ...`.
        """
        self._refuse_other_result("completion_item()")
        item = await super().completion_item(result)
        self._result = self.completed_or(None)
        return item

    def _encoded(self, result: Any) -> tuple[str, Any]:
        return round_trip(result, self._serializer)

    def _refuse_other_result(self, what: str) -> None:
        self._has_looked = True  # a replay is refused
        if self._has_run or self._is_set:
            other = "run()" if self._has_run else "`execution.result = ...`"
            raise IdempotencyUsageError(f"{what} was called beside {other}: a block has one result", key=self.key)

    def _refuse_completed(self, what: str) -> None:
        if self._call.phase is Phase.COMPLETING:
            message = f"{what} was used beside complete() or completion_item(): a block has one result"
            raise IdempotencyUsageError(message, key=self.key)

    def _recording_of(self, result: Any) -> EncodedResult:
        return EncodedResult.of(result, self._serializer, function=self._call.plan.function)

    def _recorded(self) -> Any:
        return outcome_of(self._call, self._serializer)

    def _replayed(self) -> Any:
        value = hooked(self._call, self._recorded())
        if inspect.isawaitable(value):
            if inspect.iscoroutine(value):
                value.close()
            message = "the response_hook is async, so its result must be awaited: use `await execution.run(...)`"
            raise IdempotencyUsageError(message, key=self.key)
        return value

    def _decoded(self, value: Any) -> Any:
        self._is_decoded = True
        self._result = value
        return value

    def has_result(self, exc: BaseException | None) -> bool:
        """Whether the block leaves a result: also where a signal handler's exception struck after the function."""
        return exc is None or (self._recording is not None and self._recording.interruption is exc)

    async def record_result(self) -> None:
        """Record what the block leaves."""
        call = self._call
        if self._is_failed and call.phase is Phase.CLAIMED:
            swallowed = IdempotencyUsageError(SWALLOWED, key=self.key)
            await call.fail(swallowed)
            raise swallowed
        if call.phase is Phase.COMPLETING:
            await call.confirm_commit()
            self._is_decoded = False
        if call.phase is Phase.CLAIMED:
            recording = self._recording or self._recording_of(self._result)
            if await call.complete(recording.text, recording.kind) is WhoseOutcome.WINNERS:
                await self._adopt(call.held_record(), recording)
            elif call.held_record().outcome is None:
                self._is_decoded = False  # what `run` has handed out may have changed since
            else:
                recording.warn_if_unavailable(call)
            recording.raise_interruption()
        if not self._has_looked:
            raise IdempotencyUsageError(LOOK_FIRST, key=self.key)

    async def _adopt(self, record: DataRecord, recording: EncodedResult) -> None:
        """Take the winner's outcome; if `run` has handed out another, only an error can take that back."""
        if self._has_run and record.response_data != recording.text:
            reason = "another call took it over and has another outcome, which a retry will get"
            raise IdempotencyLeaseLostError(key=self.key, record=record, reason=reason)
        self._decoded(await replayed_value(self._call, self._serializer))


async def _called(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function that is async as declared, or against its declaration is not: its effect has happened then."""
    result = func(*args, **kwargs)
    return await result if inspect.isawaitable(result) else result


class Block(CallFactory):
    """What the context managers behind `idempotency` share: here the async one, the blocking one in `aidem.sync`."""

    execution_type: ClassVar[type[BlockExecution]] = BlockExecution

    __slots__ = ("_call", "_execution", "_is_entered", "_key", "_payload", "_running")

    def __init__(
        self,
        key: Any,
        payload: Any,
        *,
        layer: PersistenceLayer | None,
        config: IdempotencyConfig | None,
        serializer: OutputSerializer | None,
        key_prefix: str,
    ) -> None:
        super().__init__(
            function=f"the block {key_prefix!r}",
            prefix=lambda: key_prefix,
            layer=layer,
            config=config,
            output_serializer=serializer,
        )
        self._key = key
        self._payload = payload
        self._is_entered = False

    def prepare(self) -> None:
        """Make the call; its key is fixed now."""
        if self._is_entered:
            raise IdempotencyUsageError("this block was entered before; call idempotency(...) for every block anew")
        self._is_entered = True
        self._call: Call = self.make(Plan.key_of_block, self._key, self._payload)

    async def enter(self) -> BlockExecution:
        """Begin the call."""
        try:
            await self._call.begin()
        except BaseException as error:
            await self._call.fail(error)  # of an observer, when the key was claimed already
            raise
        self._execution = self.execution_type(self._call)
        self._running = running(self._execution)
        self._running.__enter__()
        return self._execution

    async def leave(self, exc: BaseException | None) -> None:
        """Record what the block leaves, or release the claim."""
        self._running.__exit__()
        if self._execution.has_result(exc):
            await self._execution.record_result()
        elif exc is not None and await self._call.fail(exc) is WhoseOutcome.WINNERS:
            record = self._call.held_record()
            reason = "another call took it over and has another outcome, which a retry will get"
            raise IdempotencyLeaseLostError(key=record.idempotency_key, record=record, reason=reason) from exc


class _AsyncBlock(Block):
    """The async context manager behind `idempotency`."""

    __slots__ = ()

    async def __aenter__(self) -> BlockExecution:
        self.prepare()
        return await self.enter()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.leave(exc)
