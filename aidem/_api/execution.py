"""What a body sees of its call, and the one way to run a body under a call."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
import weakref
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from aidem._engine.call import Call, Phase, WhoseOutcome
from aidem._rules.key import derived_key
from aidem._rules.record import OutcomeKind
from aidem.exceptions import (
    IdempotencyKeyError,
    IdempotencyResultUnavailableError,
    IdempotencySerializationError,
    IdempotencyUsageError,
    IdempotencyWarning,
)
from aidem.hooks import EventKind
from aidem.serialization import UNAVAILABLE_TEXT, exception_from_text, result_from_text, round_trip

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from contextvars import Token

    from aidem._rules.record import DataRecord
    from aidem.config import IdempotencyConfig
    from aidem.serialization import OutputSerializer

logger = logging.getLogger("aidem")

T = TypeVar("T")

# Members that every call needs: to look one up on its enum costs as much as a call.
_REPLAYED, _BYPASSED, _COMPLETING = Phase.REPLAYED, Phase.BYPASSED, Phase.COMPLETING
_WINNERS, _UNAVAILABLE = WhoseOutcome.WINNERS, OutcomeKind.UNAVAILABLE
_NOTHING: Final = object()


class Execution:
    """One execution of an idempotent call, as its body sees it."""

    __slots__ = ("__weakref__", "_call", "_completed")

    def __init__(self, call: Call) -> None:
        call.has_body_begun = True  # a front makes the execution right before it
        self._call = call
        self._completed: Any = _NOTHING

    @property
    def key(self) -> str:
        """The idempotency key; `""` where the call has none."""
        return self._call.key.text

    @property
    def replayed(self) -> bool:
        """Whether this is a replay: the outcome of an earlier execution is returned, and nothing is to be done."""
        return self._call.phase is Phase.REPLAYED

    @property
    def record(self) -> DataRecord | None:
        """The claim, or the record that is replayed; None where the call runs without idempotency."""
        return self._call.record

    @property
    def fence(self) -> int:
        """A number that grows with every new claim of the key, for downstream systems that check it.

        0, below every other, where the call runs without idempotency.
        """
        return self._call.fence

    def key_for(self, name: str) -> str:
        """Return a key for a downstream service: the same on every attempt, another for every name.

        Raises:
            IdempotencyKeyError: This call has no key to derive one from.
        """
        if not self.key:
            message = "key_for() derives keys from the idempotency key of the call, and this call has none"
            raise IdempotencyKeyError(message)
        return derived_key(self.key, name)

    async def ensure_owned(self) -> None:
        """Renew the claim at the store: ask this right before an irreversible step.

        A call that runs without idempotency has no claim, and passes.

        Raises:
            IdempotencyLeaseLostError: The claim is not ours any more; another execution may run.
            IdempotencyPersistenceLayerError: The layer failed to answer.
            IdempotencyUsageError: The call replays, or is over.
        """
        await self._call.ensure_owned()

    async def complete(self, result: T, *, transaction: object) -> T:
        """Write the result in an open transaction of your own: your rows and the result are committed together.

        Call it as the last statement before the commit. After the body aidem looks whether the transaction was
        committed. The result of the call is what this returns, whatever the body returns.

        Args:
            result: What later calls get.
            transaction: The connection or session whose transaction it is, on the database that holds the records: one
                of aiosqlite or sqlite3, asyncpg, psycopg 3, or SQLAlchemy on one of them.

        Returns:
            The result as a replay will give it. A call that runs without idempotency writes nothing.

        Raises:
            IdempotencyUsageError: It is no open transaction on that database, the layer cannot complete calls in
                transactions, the call is a replay or is over, or another transaction was used before and was not
                rolled back. Nothing was written.
            IdempotencyLeaseLostError: The claim is not ours any more. Let it roll the transaction back.
            IdempotencySerializationError: The result cannot be stored.
            Exception: What the driver raises, such as a serialization failure; the transaction may be tried again in
                the same body.
        """
        text, value = self._encoded(result)
        await self._call.complete_in(transaction, text)
        self._completed = value
        return cast("T", value)

    async def completion_item(self, result: object) -> dict[str, Any] | None:
        """Return the `Update` that stores the result in DynamoDB, for your own `transact_write_items`.

        Your items and the result are written together or not at all. After the body aidem looks whether they were.
        The result of the call is this one, whatever the body returns.

        Returns:
            The value of `Update`, in the form of the low-level client. None: the call runs without idempotency, so
            there is nothing to store.

        Raises:
            IdempotencyUsageError: The records are not in DynamoDB, or the call is a replay or is over.
            IdempotencySerializationError: The result cannot be stored.
        """
        text, value = self._encoded(result)
        item = await self._call.completion_item(text)
        self._completed = value
        return item

    def _encoded(self, result: Any) -> tuple[str, Any]:
        return round_trip(result, self._call.plan.serializer)

    def completed_or(self, result: Any) -> Any:
        """Return what the body has completed the call with; without that, what it has returned."""
        return result if self._completed is _NOTHING else self._completed


# Weakly: tasks that a body starts copy its context, and must not keep the call alive.
_current: ContextVar[weakref.ref[Execution] | None] = ContextVar("aidem_execution", default=None)


def current_execution() -> Execution:
    """Return the execution whose body is running.

    Raises:
        IdempotencyUsageError: No idempotent body is running in this task or thread.
    """
    reference = _current.get()
    execution = None if reference is None else reference()
    if execution is None:
        message = "current_execution() is for the body of an idempotent call, and none is running here"
        raise IdempotencyUsageError(message)
    return execution


def enter(execution: Execution) -> Token[weakref.ref[Execution] | None]:
    """Make an execution the current one, until `leave` gets the token. It must be kept alive so long."""
    return _current.set(weakref.ref(execution))


def leave(token: Token[weakref.ref[Execution] | None]) -> None:
    """Make the execution the current one that was so before."""
    try:  # noqa: SIM105 - cheaper than contextlib.suppress, for every call
        _current.reset(token)
    except ValueError:
        pass  # a coroutine that is closed from another context never changed the variable there


async def execute(
    call: Call, function: Callable[..., Awaitable[Any]], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Run a function under a call, or replay its outcome."""
    try:
        await call.begin()
        if call.phase is _REPLAYED:
            return await replayed_value(call)
        execution = Execution(call)
        token = enter(execution)
        try:
            result = await function(*args, **kwargs)
        finally:
            leave(token)
        if call.phase is _BYPASSED:
            return execution.completed_or(result)
        if call.phase is _COMPLETING:
            await call.confirm_commit()
            return outcome_of(call, call.plan.serializer)
        recording = EncodedResult.of(result, call.plan.serializer, function=call.plan.function)
    except BaseException as error:
        if await call.fail(error) is WhoseOutcome.OURS:
            raise
        return await replayed_value(call)  # the error would have been the outcome, but another call's counts
    whose = await call.complete(recording.text, recording.kind)
    if recording.interruption is not None:
        raise recording.interruption
    if whose is _WINNERS:
        return await replayed_value(call)
    recording.warn_if_unavailable(call)
    return recording.value


async def replayed_value(call: Call) -> Any:
    """Return the outcome that a call found, by way of the response hook."""
    value = outcome_of(call, call.plan.serializer)
    if call.plan.config.response_hook is None:
        return value
    hooked_value = hooked(call, value)
    return await hooked_value if inspect.isawaitable(hooked_value) else hooked_value


def outcome_of(call: Call, serializer: OutputSerializer) -> Any:
    """Return the outcome that counts for a call, as `value_of` does."""
    record = call.held_record()
    try:
        return value_of(record, call.plan.config, serializer)
    except IdempotencyResultUnavailableError as error:
        call.reporter.report(EventKind.RESULT_UNAVAILABLE, fence=record.fence, error=error)
        raise


def hooked(call: Call, value: Any) -> Any:
    """Pass a replayed value through the response hook, which may answer an awaitable."""
    hook = call.plan.config.response_hook
    return value if hook is None else hook(value, call.held_record())


def value_of(record: DataRecord, config: IdempotencyConfig, serializer: OutputSerializer) -> Any:
    """Return the outcome in a completed record as an object of its own.

    Raises:
        IdempotencyResultUnavailableError: The outcome cannot be replayed.
        Exception: The stored exception, if the outcome is one.
    """
    text = record.response_data
    try:
        if record.outcome is None:
            return None if text is None else result_from_text(text, serializer)
        if record.outcome is OutcomeKind.EXCEPTION and text is not None:
            error = exception_from_text(text, config.stored_exceptions)
        else:
            raise IdempotencyResultUnavailableError(record=record, reason="its result could not be stored")
    except IdempotencySerializationError as exc:
        raise IdempotencyResultUnavailableError(record=record, reason=str(exc)) from exc
    try:
        raise error
    finally:
        del error  # or its traceback would keep this frame, and so the payload, in a cycle


class EncodedResult:
    """A result on its way to the store: the first caller gets what its text says, as every later one does.

    Attributes:
        text: The JSON text that is stored.
        kind: None for a result, `UNAVAILABLE` where it cannot be stored.
        value: What the first caller gets.
        interruption: What a signal handler raised meanwhile, such as Celery's soft time limit. The effect has happened,
            so the result is recorded first.
    """

    __slots__ = ("interruption", "kind", "text", "value")

    def __init__(self, text: str, kind: OutcomeKind | None, value: Any, interruption: Exception | None = None) -> None:
        self.text = text
        self.kind = kind
        self.value = value
        self.interruption = interruption

    @classmethod
    def of(cls, result: Any, serializer: OutputSerializer, *, function: str) -> EncodedResult:
        """Turn a result into text and back; if that fails, its text says that the result is unavailable."""
        interruption, reason = None, ""
        for _ in (1, 2):  # what interrupts does so once
            try:
                text, value = round_trip(result, serializer)
                return cls(text, None, value, interruption)
            except IdempotencySerializationError as fault:
                reason = str(fault)
                break
            except Exception as error:  # noqa: BLE001 - whatever a signal handler raises
                interruption = error
                reason = f"{type(error).__name__} was raised while it was turned into text"
        logger.error("the result of %s cannot be replayed: %s", function, reason)
        return cls(UNAVAILABLE_TEXT, OutcomeKind.UNAVAILABLE, result, interruption)

    def raise_interruption(self) -> None:
        """Raise the interruption, now that the result is recorded."""
        if self.interruption is not None:
            raise self.interruption

    @staticmethod
    def warn_if_unavailable(call: Call) -> None:
        """Say that later callers will not get the result."""
        record = call.record
        if record is not None and record.outcome is _UNAVAILABLE:
            call.reporter.report(EventKind.RESULT_UNAVAILABLE, fence=record.fence)
            message = (
                f"the result of {call.plan.function} could not be stored; its effect will not be repeated, "
                "and later callers get IdempotencyResultUnavailableError"
            )
            with contextlib.suppress(IdempotencyWarning):  # as an error it would replace the value
                warnings.warn(message, IdempotencyWarning, stacklevel=2)
