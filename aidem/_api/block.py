"""`async with idempotency(key)`: a block that runs once per key."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, TypeVar, cast

from aidem._api.execution import EncodedResult, Execution, enter, hooked, leave, outcome_of
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

    __slots__ = ("_block",)

    def __init__(self, call: Call, result: BlockResult) -> None:
        super().__init__(call)
        self._block = result

    @property
    def replayed(self) -> bool:
        """Whether this is a replay: the outcome of an earlier execution is returned, and nothing is to be done."""
        self._block.has_looked = True
        return super().replayed

    @property
    def result(self) -> Any:
        """The result: what was recorded before, what the block has set, or after the block what a replay will get.

        Raises:
            IdempotencyResultUnavailableError: The outcome cannot be replayed.
            Exception: The stored exception, if the outcome is one.
            IdempotencyUsageError: Setting it on a replay, or after the block.
        """
        self._block.has_looked = True
        return self._block.get()

    @result.setter
    def result(self, value: Any) -> None:
        self._block.set(value)

    async def run(self, func: Callable[P, Awaitable[R]], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function, or replay its result; leaving the block records it.

        The return annotation of the function says how its result is rebuilt, unless the block has an
        `output_serializer`.

        Raises:
            IdempotencyUsageError: It was called before: a block has one result.
        """
        self._block.start_run(func)
        if self.replayed:
            replayed = self._block.replayed()
            return cast("R", self._block.take(await replayed if inspect.isawaitable(replayed) else replayed))
        result: Any = func(*args, **kwargs)
        # A function may be async although it is not declared so, or not async although it is: it has had its effect.
        return cast("R", self._block.end_run(await result if inspect.isawaitable(result) else result))

    async def complete(self, result: R, *, transaction: object) -> R:
        """Write the result in an open transaction of your own, as `Execution.complete` does; it is the block's result.

        Raises:
            IdempotencyUsageError: Also beside `run` or `execution.result = ...`.
        """
        self._block.start_completion("complete()")
        completed = await super().complete(result, transaction=transaction)
        self._block.end_completion(completed)
        return completed

    async def completion_item(self, result: object) -> dict[str, Any] | None:
        """Return the `Update` that stores the result, as `Execution.completion_item` does; it is the block's result.

        Raises:
            IdempotencyUsageError: Also beside `run` or `execution.result = ...`.
        """
        self._block.start_completion("completion_item()")
        item = await super().completion_item(result)
        self._block.end_completion(self.completed_or(None))
        return item

    def _encoded(self, result: Any) -> tuple[str, Any]:
        return self._block.round_trip(result)


class BlockResult:
    """The result of a block, on its way from or to the store.

    Attributes:
        has_looked: Whether the block asked for its result, or whether it is a replay.
    """

    __slots__ = (
        "_call",
        "_has_run",
        "_is_decoded",
        "_is_failed",
        "_is_set",
        "_recording",
        "_serializer",
        "_value",
        "has_looked",
    )

    def __init__(self, call: Call) -> None:
        self._call = call
        self._serializer = call.plan.serializer
        self._has_run = False
        self._is_set = False  # by the block itself
        self._is_failed = False  # from the start of the function until it has a result
        self._is_decoded = call.phase is not Phase.REPLAYED
        self._recording: EncodedResult | None = None
        self._value: Any = None
        self.has_looked = False

    def get(self) -> Any:
        """Return the result."""
        if self._is_decoded:
            return self._value
        if self._call.phase is Phase.ENDED:
            return self.take(self.recorded())
        value = self.replayed()
        if inspect.isawaitable(value):
            if inspect.iscoroutine(value):
                value.close()
            message = "the response_hook is async, so its result must be awaited: use `await execution.run(...)`"
            raise IdempotencyUsageError(message, key=self._call.key.text)
        return self.take(value)

    def set(self, value: Any) -> None:
        """Let a value be the result.

        Raises:
            IdempotencyUsageError: The result is recorded.
        """
        if self._call.phase is Phase.REPLAYED:
            message = "this is a replay, and its result is recorded; guard the effect with `if not execution.replayed:`"
            raise IdempotencyUsageError(message, key=self._call.key.text)
        if self._call.phase is Phase.ENDED:
            raise IdempotencyUsageError("the block is over, and its result is recorded", key=self._call.key.text)
        self._refuse_completed("result")
        self._recording = None
        self._is_failed = False
        self._is_set = True
        self._value = value

    def take(self, value: Any) -> Any:
        """Let a recorded value be the result, and return it."""
        self._is_decoded = True
        self._value = value
        return value

    def recorded(self) -> Any:
        """Return the recorded outcome as an object of its own."""
        return outcome_of(self._call, self._serializer)

    def replayed(self) -> Any:
        """Return the recorded outcome by way of the response hook, which may answer an awaitable."""
        return hooked(self._call, self.recorded())

    # --- The function that `run` calls ------------------------------------------------------------------------------

    def start_run(self, func: Callable[..., object]) -> None:
        """Prepare for the function, which is called next unless this is a replay.

        Raises:
            IdempotencyUsageError: There was one before.
        """
        if self._has_run:
            message = "run() was called before: a block has one result"
            raise IdempotencyUsageError(message, key=self._call.key.text)
        self._refuse_completed("run()")
        self._has_run = self.has_looked = True
        if self._call.phase is not Phase.BYPASSED:
            self._serializer = self._call.plan.serializer_for(func)
            self._is_failed = self._call.phase is not Phase.REPLAYED

    def end_run(self, result: Any) -> Any:
        """Keep the result of the function; return the result for its caller."""
        if self._call.phase is Phase.BYPASSED:
            self._value = result
            return result
        recording = self._encoded(result)
        self.set(recording.value)
        self._recording = recording
        recording.raise_interruption()
        return recording.value

    def _encoded(self, result: Any) -> EncodedResult:
        return EncodedResult.of(result, self._serializer, function=self._call.plan.function)

    # --- A transaction that completes the call ----------------------------------------------------------------------

    def start_completion(self, what: str) -> None:
        """Take note that the body completes the call in a transaction, unless this is a replay.

        Raises:
            IdempotencyUsageError: The block has another result.
        """
        self.has_looked = True  # a replay is refused
        if self._has_run or self._is_set:
            other = "run()" if self._has_run else "`execution.result = ...`"
            message = f"{what} was called beside {other}: a block has one result"
            raise IdempotencyUsageError(message, key=self._call.key.text)

    def end_completion(self, result: Any) -> None:
        """Let the result in the transaction be that of the block."""
        self._value = result

    def round_trip(self, result: Any) -> tuple[str, Any]:
        """Return the text of a result, and what a replay will return for it."""
        return round_trip(result, self._serializer)

    def note_commit(self) -> None:
        """Take note that the transaction was committed: its outcome is in the record."""
        self._is_decoded = False

    def _refuse_completed(self, what: str) -> None:
        if self._call.phase is Phase.COMPLETING:
            message = f"{what} was used beside complete() or completion_item(): a block has one result"
            raise IdempotencyUsageError(message, key=self._call.key.text)

    # --- The end of the block ---------------------------------------------------------------------------------------

    def was_interrupted_by(self, exc: BaseException) -> bool:
        """Whether a signal handler raised it after the function: then the block has a result all the same."""
        return self._recording is not None and self._recording.interruption is exc

    def final(self) -> EncodedResult | None:
        """Return the result that is to be recorded; None: the block holds no claim.

        Raises:
            IdempotencyUsageError: The function has failed, and the block swallowed its exception.
        """
        if self._call.phase is not Phase.CLAIMED:
            return None
        if self._is_failed:
            raise IdempotencyUsageError(SWALLOWED, key=self._call.key.text)
        return self._recording or self._encoded(self._value)

    def confirm(self, recording: EncodedResult) -> None:
        """Confirm that the result is recorded."""
        if self._call.held_record().outcome is None:
            self._is_decoded = False  # the object that `run` returned may have changed since
        else:
            recording.warn_if_unavailable(self._call)

    def winners(self, recording: EncodedResult) -> Any:
        """Return the winner's outcome in the place of ours, by way of the response hook.

        Raises:
            IdempotencyLeaseLostError: `run` has returned another outcome, and only an error can take that back.
        """
        record = self._call.held_record()
        if self._has_run and record.response_data != recording.text:
            raise lost_to(record)
        return self.replayed()

    def check_looked(self) -> None:
        """Check that the block asked whether it is a replay.

        Raises:
            IdempotencyUsageError: It did not.
        """
        if not self.has_looked:
            raise IdempotencyUsageError(LOOK_FIRST, key=self._call.key.text)


def lost_to(record: DataRecord) -> IdempotencyLeaseLostError:
    """Return the error of a block whose outcome is not the one that counts."""
    reason = "another call took it over and has another outcome, which a retry will get"
    return IdempotencyLeaseLostError(key=record.idempotency_key, record=record, reason=reason)


class Block(CallFactory):
    """What the context managers behind `idempotency` share: here the async one, the blocking one in `aidem.sync`."""

    execution_type: ClassVar[type[BlockExecution]] = BlockExecution

    __slots__ = ("_call", "_execution", "_is_entered", "_key", "_payload", "_result", "_token")

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

    def started(self) -> BlockExecution:
        """Return the execution of the call, which has begun; it is the current one until the block ends."""
        self._result = BlockResult(self._call)
        self._execution = self.execution_type(self._call, self._result)
        self._token = enter(self._execution)
        return self._execution


class _AsyncBlock(Block):
    """The async context manager behind `idempotency`."""

    __slots__ = ()

    async def __aenter__(self) -> BlockExecution:
        self.prepare()
        try:
            await self._call.begin()
        except BaseException as error:
            await self._call.fail(error)  # of an observer, when the key was claimed already
            raise
        return self.started()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        leave(self._token)
        call, result = self._call, self._result
        if exc is not None and not result.was_interrupted_by(exc):
            if await call.fail(exc) is WhoseOutcome.WINNERS:
                raise lost_to(call.held_record()) from exc
            return
        if call.phase is Phase.COMPLETING:
            await call.confirm_commit()
            result.note_commit()
        try:
            recording = result.final()
        except IdempotencyUsageError as swallowed:
            await call.fail(swallowed)
            raise
        if recording is not None:
            if await call.complete(recording.text, recording.kind) is WhoseOutcome.WINNERS:
                winners = result.winners(recording)
                result.take(await winners if inspect.isawaitable(winners) else winners)
            else:
                result.confirm(recording)
            recording.raise_interruption()
        result.check_looked()
