"""Batches that Lambda delivers: each record is processed by itself, and Lambda redelivers those that failed.

With `ReportBatchItemFailures` in its event source mapping, each source expects these records in the answer:

- SQS, standard queue: each message that failed.
- SQS, FIFO queue: each message that failed, and all after it in its message group, so that none overtakes it.
- Kinesis and DynamoDB streams: the first record that failed; it and all later ones are delivered again.

So the records of an event are sorted into rows. Rows run concurrently, the records of a row in order, and a row ends at
its first failure. A standard queue has a row for each message, a FIFO queue one for each group, and a shard is one row.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeGuard, cast

from aidem._checks import kind_of, refused
from aidem.config import current_lambda_context, default_config
from aidem.exceptions import IdempotencyUsageError

if TYPE_CHECKING:
    from collections.abc import Hashable

    from aidem.config import LambdaContext

logger = logging.getLogger("aidem")

Record: TypeAlias = dict[str, Any]
RecordHandler: TypeAlias = Callable[[Record], Awaitable[object]]
BatchResponse: TypeAlias = dict[str, list[dict[str, str]]]

SQS: Final = "aws:sqs"

# https://docs.aws.amazon.com/lambda/latest/dg/services-sqs-errorhandling.html and its siblings for the streams.
IDENTIFIERS: Final = {
    SQS: ("messageId",),
    "aws:kinesis": ("kinesis", "sequenceNumber"),
    "aws:dynamodb": ("dynamodb", "SequenceNumber"),
}


async def process_batch(
    event: Mapping[str, Any],
    record_handler: RecordHandler,
    *,
    max_concurrency: int = 10,
    time_reserve_seconds: float = 1.0,
) -> BatchResponse:
    """Run a handler for each record of an SQS, Kinesis or DynamoDB stream event, and report the records that failed.

    An `Exception` of the handler fails its record, and so does a cancellation of this record alone: type and identifier
    are logged, and the other records go on. In a FIFO message group and in a shard, records run in order, and none runs
    after one that failed. If the handler raises anything else, or the batch is cancelled, the running records are
    cancelled and awaited, and the exception propagates unchanged.

    Args:
        event: The event as Lambda delivered it.
        record_handler: An async function of one record, as it is in the event; its return value is ignored.
        max_concurrency: Maximum number of messages, or message groups, that run at once. Default: 10.
        time_reserve_seconds: If less than this is left of the registered Lambda context's time, no further record is
            started, and the rest is reported. Default: 1.

    Returns:
        `{"batchItemFailures": [{"itemIdentifier": ...}, ...]}`, to be returned by the Lambda handler.

    Raises:
        IdempotencyUsageError: The event is not such a batch. No record has run.
        IdempotencyConfigError: An option has a value that cannot work.
        TypeError: The handler is not an async function of one record.
    """
    _check(record_handler, max_concurrency=max_concurrency, time_reserve_seconds=time_reserve_seconds)
    rows = _rows_of(event)
    records = sum(map(len, rows))
    batch = _Batch(
        record_handler=record_handler,
        time_reserve_seconds=time_reserve_seconds,
        context=current_lambda_context(default_config()),
        slots=asyncio.Semaphore(max_concurrency),
        is_interrupted=_cancellation_of_this_task(),
    )
    await batch.run(rows)
    if (not_run := sum(map(len, rows)) - batch.failures) > 0:
        logger.warning(
            "%d of %d records were not run: one before them failed, or the invocation is about to end",
            not_run,
            records,
        )
    return {"batchItemFailures": [{"itemIdentifier": name} for row in rows for name in _reported(row)]}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Item:
    """A record, and its identifier in the response."""

    record: Record
    source: str
    identifier: str


@dataclass(slots=True, kw_only=True)
class _Batch:
    """One run of a handler over the records of an event."""

    record_handler: RecordHandler
    time_reserve_seconds: float
    context: LambdaContext | None
    slots: asyncio.Semaphore
    is_interrupted: Callable[[], bool]
    failures: int = field(default=0, init=False)

    async def run(self, rows: list[list[_Item]]) -> None:
        """Run the rows, and remove the records that succeed; the record that failed and those after it are left."""
        try:
            async with asyncio.TaskGroup() as group:
                for row in rows:
                    group.create_task(self._run_in_order(row))
        except BaseExceptionGroup as errors:
            interruption = errors.exceptions[0]
        else:
            return
        raise interruption  # alone: handlers do not expect a group

    async def _run_in_order(self, row: list[_Item]) -> None:
        await self.slots.acquire()
        while row and self._may_start() and await self._succeeds(row[0]):
            del row[0]
        self.slots.release()  # not after an interruption: nothing is to start behind it

    async def _succeeds(self, item: _Item) -> bool:
        try:
            await self.record_handler(item.record)
        except asyncio.CancelledError as error:
            if self.is_interrupted():
                raise
            self._note_failure(item, error)  # of the record, or of a task that it awaited: not of the batch
            return False
        except Exception as error:  # noqa: BLE001 - each of them fails the record, which comes again
            self._note_failure(item, error)
            return False
        return True

    def _note_failure(self, item: _Item, error: BaseException) -> None:
        self.failures += 1
        # No message and no traceback: they may show the record.
        logger.warning("record %s of %s failed: %s", item.identifier, item.source, type(error).__qualname__)

    def _may_start(self) -> bool:
        if self.is_interrupted():  # the record before has swallowed it
            return False
        context = self.context
        return context is None or context.get_remaining_time_in_millis() >= self.time_reserve_seconds * 1000


def _cancellation_of_this_task() -> Callable[[], bool]:
    """Return a function that tells whether this task was cancelled since; a task group also cancels its own task."""
    task = cast("asyncio.Task[Any]", asyncio.current_task())
    before = task.cancelling()  # a request that was not withdrawn, as those of earlier task groups are in Python 3.11
    return lambda: task.cancelling() > before


def _reported(row: list[_Item]) -> list[str]:
    """Return the identifiers that report the rest of a row."""
    names = [item.identifier for item in row]
    return names if row and row[0].source == SQS else names[:1]


# --- The event --------------------------------------------------------------------------------------------------------


def _rows_of(event: object) -> list[list[_Item]]:
    records = _member(event, "Records")
    if not _is_list(records):
        raise _no_batch("it has no list of `Records`")
    rows: dict[Hashable, list[_Item]] = {}
    for place, record in enumerate(records):
        source = _text_at(record, "eventSource", place=place)
        if source not in IDENTIFIERS:
            raise _no_batch(f"`Records[{place}].eventSource` is none of {', '.join(IDENTIFIERS)}")
        identifier = _text_at(record, *IDENTIFIERS[source], place=place)
        row = rows.setdefault(_row_of(record, source, place), [])
        row.append(_Item(record=record, source=source, identifier=identifier))
    return list(rows.values())


def _row_of(record: Record, source: str, place: int) -> Hashable:
    if source != SQS:
        return source  # an event holds records of one shard
    # Messages of a standard queue may have a group as well: there it is for fairness, not for order.
    if _text_at(record, "eventSourceARN", place=place).endswith(".fifo"):
        return _text_at(record, "attributes", "MessageGroupId", place=place)
    return place


def _text_at(record: Any, *path: str, place: int) -> str:
    found = record
    for name in path:
        found = _member(found, name)
    if not isinstance(found, str) or not found:
        raise _no_batch(f"`Records[{place}].{'.'.join(path)}` is missing")
    return found


def _member(value: Any, name: str) -> Any:
    return cast("Mapping[str, Any]", value).get(name) if isinstance(value, Mapping) else None


def _is_list(value: object) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def _no_batch(reason: str) -> IdempotencyUsageError:
    message = f"process_batch takes an event of SQS, Kinesis or DynamoDB streams as Lambda delivers it, but {reason}"
    return IdempotencyUsageError(message)


# --- The options ------------------------------------------------------------------------------------------------------


def _check(record_handler: Any, *, max_concurrency: Any, time_reserve_seconds: Any) -> None:
    is_async = inspect.iscoroutinefunction(record_handler) or inspect.iscoroutinefunction(type(record_handler).__call__)
    if not is_async:
        message = f"record_handler={kind_of(record_handler)} is not async; write `async def record_handler(record)`"
        raise TypeError(message)
    try:
        inspect.signature(record_handler).bind(None)
    except TypeError as error:
        raise TypeError(f"record_handler={kind_of(record_handler)} is not of one record: {error}") from None
    if type(max_concurrency) is not int or max_concurrency < 1:
        raise refused("max_concurrency", repr(max_concurrency), "a positive whole number")
    if type(time_reserve_seconds) not in {int, float} or not 0 <= time_reserve_seconds < math.inf:
        raise refused("time_reserve_seconds", repr(time_reserve_seconds), "a number of seconds that is not negative")
