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
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

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
    task = cast("asyncio.Task[Any]", asyncio.current_task())
    # A task group cancels its own task, and in Python 3.11 does not withdraw it.
    before = task.cancelling()
    batch = _Batch(
        record_handler=record_handler,
        time_reserve_seconds=time_reserve_seconds,
        context=current_lambda_context(default_config()),
        slots=asyncio.Semaphore(max_concurrency),
        is_interrupted=lambda: task.cancelling() > before,
    )
    await batch.run(rows)
    if (not_run := sum(map(len, rows)) - batch.failures) > 0:
        logger.warning(
            "%d of %d records were not run: one before them failed, or the invocation is about to end",
            not_run,
            records,
        )
    # Of a stream, the first record that failed stands for all after it.
    failed = [item for row in rows for item in (row if row and row[0].source == SQS else row[:1])]
    return {"batchItemFailures": [{"itemIdentifier": item.identifier} for item in failed]}


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
        context, reserve = self.context, self.time_reserve_seconds * 1000
        await self.slots.acquire()
        while row and not self.is_interrupted():  # a handler may have swallowed it
            if context is not None and context.get_remaining_time_in_millis() < reserve:
                break
            item = row[0]
            try:
                await self.record_handler(item.record)
            except (asyncio.CancelledError, Exception) as error:
                if isinstance(error, asyncio.CancelledError) and self.is_interrupted():
                    raise  # it is of the batch, not of the record alone or of a task that it awaited
                self.failures += 1  # the record comes again
                # No message and no traceback: they may show the record.
                logger.warning("record %s of %s failed: %s", item.identifier, item.source, type(error).__qualname__)
                break
            del row[0]
        self.slots.release()  # not after an interruption: nothing is to start behind it


# --- The event --------------------------------------------------------------------------------------------------------


def _rows_of(event: object) -> list[list[_Item]]:
    records = _member(event, "Records")
    if not issubclass(type(records), list):
        raise _no_batch("it has no list of `Records`")
    rows: dict[Hashable, list[_Item]] = {}
    for place, record in enumerate(records):
        source = _text_at(record, "eventSource", place=place)
        if source not in IDENTIFIERS:
            raise _no_batch(f"`Records[{place}].eventSource` is none of {', '.join(IDENTIFIERS)}")
        identifier = _text_at(record, *IDENTIFIERS[source], place=place)
        row: Hashable = source  # a stream's event holds records of one shard
        if source == SQS:
            # Messages of a standard queue may have a group as well: there it is for fairness, not for order.
            is_fifo = _text_at(record, "eventSourceARN", place=place).endswith(".fifo")
            row = _text_at(record, "attributes", "MessageGroupId", place=place) if is_fifo else place
        rows.setdefault(row, []).append(_Item(record=record, source=source, identifier=identifier))
    return list(rows.values())


def _text_at(record: Any, *path: str, place: int) -> str:
    found = record
    for name in path:
        found = _member(found, name)
    if not isinstance(found, str) or not found:
        raise _no_batch(f"`Records[{place}].{'.'.join(path)}` is missing")
    return found


def _member(value: Any, name: str) -> Any:
    return cast("Mapping[str, Any]", value).get(name) if isinstance(value, Mapping) else None


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
