"""`process_batch`: every record by itself, and those that failed come again."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import anyio
import pytest

from aidem import IdempotencyConfig, current_execution, idempotent_function, register_lambda_context
from aidem._runtime import lambda_loop
from aidem.awslambda import lambda_handler, process_batch
from aidem.config import reset_lambda_context
from aidem.exceptions import IdempotencyConfigError, IdempotencyUsageError
from aidem.persistence.dynamodb import DynamoDBPersistenceLayer
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.persistence.sqlite import SQLitePersistenceLayer
from tests.support.planned import VIRTUAL_TIME

EVENTS = Path(__file__).parents[1] / "data" / "events"

Act = Callable[[str], Any]


@pytest.fixture(scope="module")
def anyio_backend() -> Any:
    return VIRTUAL_TIME


class PoisonError(Exception):
    pass


class Suspended(BaseException):
    """What a durable function raises to be run on later: no failure."""


@dataclass
class Worker:
    """Handles records by name, in virtual time; what a record is to do is said by name."""

    acts: dict[str, Act] = field(default_factory=dict)
    seconds: float = 1.0
    started: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    running: int = 0
    most_running: int = 0

    async def handle(self, record: dict[str, Any]) -> str:
        name = name_of(record)
        self.started.append(name)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(self.seconds)
            self.acts.get(name, str)(name)
        except asyncio.CancelledError:
            self.cancelled.append(name)
            raise
        finally:
            self.running -= 1
        self.ended.append(name)
        return name


@dataclass
class Invocation:
    """A Lambda context whose time runs with that of the loop."""

    deadline: float

    def get_remaining_time_in_millis(self) -> int:
        return int((self.deadline - asyncio.get_running_loop().time()) * 1000)


def name_of(record: dict[str, Any]) -> str:
    where = record.get("kinesis") or record.get("dynamodb") or {"name": record["messageId"]}
    return where["name"]


def standard(*names: str) -> dict[str, Any]:
    return queue("orders", *((name, "fair") for name in names))


def fifo(*names: str) -> dict[str, Any]:
    """Messages whose group is the first letter of their name."""
    return queue("orders.fifo", *((name, name[0]) for name in names))


def queue(name: str, *messages: tuple[str, str]) -> dict[str, Any]:
    arn = f"arn:aws:sqs:eu-central-1:111122223333:{name}"
    records = [
        {
            "messageId": message,
            "attributes": {"MessageGroupId": group},
            "body": f"secret of {message}",
            "eventSource": "aws:sqs",
            "eventSourceARN": arn,
        }
        for message, group in messages
    ]
    return {"Records": records}


def kinesis(*names: str) -> dict[str, Any]:
    return {
        "Records": [
            {"eventSource": "aws:kinesis", "kinesis": {"sequenceNumber": f"number-{name}", "name": name}}
            for name in names
        ]
    }


def dynamodb(*names: str) -> dict[str, Any]:
    return {
        "Records": [
            {"eventSource": "aws:dynamodb", "dynamodb": {"SequenceNumber": f"number-{name}", "name": name}}
            for name in names
        ]
    }


def failures(*names: str) -> dict[str, Any]:
    return {"batchItemFailures": [{"itemIdentifier": name} for name in names]}


def poison(name: str) -> None:
    raise PoisonError(f"secret of {name}")


def raising(error: BaseException) -> Act:
    def act(name: str) -> None:
        raise error

    return act


@contextlib.contextmanager
def leaving_no_task() -> Iterator[None]:
    before = asyncio.all_tasks()
    yield
    assert asyncio.all_tasks() <= before


# --- Standard queues --------------------------------------------------------------------------------------------------


async def test_each_record_is_handed_to_the_handler_as_it_is_in_the_event() -> None:
    event = standard("a", "b")
    handled: list[Any] = []

    async def handle(record: dict[str, Any]) -> None:
        handled.append(record)

    assert await process_batch(event, handle) == failures()
    assert [id(record) for record in handled] == [id(record) for record in event["Records"]]


async def test_only_the_messages_that_failed_are_reported() -> None:
    worker = Worker({"b": poison, "d": poison})
    assert await process_batch(standard("a", "b", "c", "d"), worker.handle) == failures("b", "d")
    assert worker.ended == ["a", "c"]


async def test_when_all_fail_all_are_reported_and_nothing_is_raised() -> None:
    worker = Worker({"a": poison, "b": poison})
    assert await process_batch(standard("a", "b"), worker.handle) == failures("a", "b")


@pytest.mark.parametrize("result", [False, None, 0, {"batchItemFailures": [{"itemIdentifier": "a"}]}])
async def test_what_the_handler_returns_means_nothing(result: Any) -> None:
    async def handle(record: Any) -> Any:
        return result

    assert await process_batch(standard("a"), handle) == failures()


async def test_messages_run_at_the_same_time_up_to_the_bound() -> None:
    worker = Worker()
    began = asyncio.get_running_loop().time()
    await process_batch(standard(*map(str, range(10))), worker.handle, max_concurrency=4)
    assert worker.most_running == 4
    assert asyncio.get_running_loop().time() - began == pytest.approx(3)
    assert worker.started == list(map(str, range(10)))


async def test_ten_messages_run_at_once_where_no_bound_is_given() -> None:
    worker = Worker()
    await process_batch(standard(*map(str, range(25))), worker.handle)
    assert worker.most_running == 10


async def test_a_group_in_a_standard_queue_is_no_order() -> None:
    """Fair queues: there a group is a tenant, and its messages need not wait for each other."""
    worker = Worker({"a": poison})
    assert await process_batch(standard("a", "b", "c"), worker.handle) == failures("a")
    assert (worker.most_running, worker.ended) == (3, ["b", "c"])


async def test_context_variables_of_a_message_are_not_seen_by_the_next() -> None:
    tenant: ContextVar[str] = ContextVar("tenant", default="nobody")
    seen: list[str] = []

    async def handle(record: dict[str, Any]) -> None:
        seen.append(tenant.get())
        tenant.set(record["messageId"])

    await process_batch(standard("a", "b"), handle, max_concurrency=1)
    assert seen == ["nobody", "nobody"]


async def test_an_empty_batch_has_no_failures() -> None:
    assert await process_batch({"Records": []}, Worker().handle) == failures()


async def test_two_copies_of_a_message_in_one_batch_run_once() -> None:
    layer, worker = MemoryPersistenceLayer(), Worker()
    config = IdempotencyConfig(event_key_jmespath="messageId")
    once = idempotent_function(
        data_keyword_argument="record", persistence_store=layer, config=config, key_prefix="orders"
    )(worker.handle)
    assert await process_batch(standard("a", "a"), once) == failures(
        "a"
    )  # the second copy meets the first, and comes again
    assert await process_batch(standard("a"), once) == failures()
    assert worker.started == ["a"]


async def test_a_batch_that_comes_again_runs_only_what_has_not_succeeded() -> None:
    layer, worker = MemoryPersistenceLayer(), Worker({"b": poison})

    @idempotent_function(
        data_keyword_argument="record",
        persistence_store=layer,
        config=IdempotencyConfig(event_key_jmespath="messageId"),
    )
    async def charge(record: dict[str, Any]) -> str:
        assert current_execution().key
        return await worker.handle(record)

    event = standard("a", "b", "c")
    assert await process_batch(event, charge) == failures("b")
    worker.acts.clear()
    assert await process_batch(event, charge) == failures()
    assert sorted(worker.started) == ["a", "b", "b", "c"]


# --- Order: FIFO queues and streams -----------------------------------------------------------------------------------


async def test_messages_of_a_group_run_one_after_another_and_groups_at_the_same_time() -> None:
    worker = Worker()
    assert await process_batch(fifo("a1", "b1", "a2", "b2", "a3"), worker.handle) == failures()
    assert worker.most_running == 2
    assert worker.started == ["a1", "b1", "a2", "b2", "a3"]
    assert [name for name in worker.ended if name[0] == "a"] == ["a1", "a2", "a3"]


async def test_behind_a_failed_message_the_rest_of_its_group_is_reported_and_not_run() -> None:
    worker = Worker({"a2": poison})
    response = await process_batch(fifo("a1", "a2", "b1", "a3", "b2", "a4"), worker.handle)
    assert response == failures("a2", "a3", "a4")
    assert sorted(worker.started) == ["a1", "a2", "b1", "b2"]


async def test_the_bound_counts_groups() -> None:
    worker = Worker()
    await process_batch(fifo("a1", "b1", "c1", "a2", "b2", "c2"), worker.handle, max_concurrency=2)
    assert worker.most_running == 2
    assert worker.started == ["a1", "b1", "a2", "b2", "c1", "c2"]


@pytest.mark.parametrize("stream", [kinesis, dynamodb])
async def test_of_a_shard_the_first_failure_is_reported_and_nothing_behind_it_runs(stream: Any) -> None:
    worker = Worker({"c": poison})
    assert await process_batch(stream("a", "b", "c", "d", "e"), worker.handle) == failures("number-c")
    assert worker.started == ["a", "b", "c"]
    assert worker.most_running == 1


@pytest.mark.parametrize("stream", [kinesis, dynamodb])
async def test_a_shard_without_failures_has_none_to_report(stream: Any) -> None:
    worker = Worker()
    assert await process_batch(stream("a", "b"), worker.handle) == failures()
    assert worker.ended == ["a", "b"]


@pytest.mark.parametrize(
    ("sample", "identifiers"),
    [
        ("sqs", ["059f36b4-87a3-44ab-83d2-661975830a7d", "2e1424d4-f796-459a-8184-9c92662be6da"]),
        ("sqs_fifo", ["059f36b4-87a3-44ab-83d2-661975830a7d", "2e1424d4-f796-459a-8184-9c92662be6da"]),
        ("kinesis", ["49590338271490256608559692538361571095921575989136588891"]),
        ("dynamodb_stream", ["44215845000000000174504391"]),
    ],
)
async def test_events_as_lambda_delivers_them_are_understood(sample: str, identifiers: list[str]) -> None:
    event = json.loads((EVENTS / f"{sample}.json").read_text())

    async def handle(record: Any) -> None:
        if record in event["Records"][:2]:
            raise PoisonError

    reported = [failure["itemIdentifier"] for failure in (await process_batch(event, handle))["batchItemFailures"]]
    assert set(identifiers) <= set(reported)
    assert reported[0] == identifiers[0]


async def test_an_event_wrapper_is_an_event() -> None:
    worker = Worker()
    assert await process_batch(MappingProxyType(standard("a")), worker.handle) == failures()
    assert worker.ended == ["a"]


# --- The end of the invocation ----------------------------------------------------------------------------------------


async def run_with_time_left(seconds: float, event: Any, worker: Worker, **options: Any) -> Any:
    token = register_lambda_context(Invocation(asyncio.get_running_loop().time() + seconds))
    try:
        return await process_batch(event, worker.handle, **options)
    finally:
        reset_lambda_context(token)


async def test_shortly_before_the_invocation_ends_no_record_is_started() -> None:
    worker = Worker()
    response = await run_with_time_left(3.5, standard("a", "b", "c", "d", "e"), worker, max_concurrency=1)
    assert worker.ended == ["a", "b", "c"]  # with 3.5, 2.5 and 1.5 seconds left
    assert response == failures("d", "e")


async def test_a_record_that_runs_when_time_gets_short_is_not_cut() -> None:
    worker = Worker(seconds=5)
    assert await run_with_time_left(3, standard("a"), worker) == failures()
    assert (worker.ended, worker.cancelled) == (["a"], [])


@pytest.mark.parametrize(("reserve", "ended"), [(0.0, 4), (2.6, 1), (60, 0)])
async def test_how_long_before_is_the_users_choice(reserve: float, ended: int) -> None:
    worker = Worker()
    event = kinesis(*"abcdef")
    response = await run_with_time_left(3.5, event, worker, time_reserve_seconds=reserve)
    assert worker.ended == list("abcdef"[:ended])
    assert response == failures(f"number-{'abcdef'[ended]}")


async def test_without_a_lambda_context_time_does_not_end() -> None:
    worker = Worker(seconds=1000)
    assert await process_batch(kinesis("a", "b"), worker.handle, time_reserve_seconds=10**9) == failures()


# --- What is no failure of a record -----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [Suspended(), BaseExceptionGroup("several", [Suspended()])])
async def test_what_is_no_exception_of_a_record_propagates_as_it_is(error: BaseException) -> None:
    worker = Worker({"b": raising(error)})
    with leaving_no_task(), pytest.raises(type(error)) as caught:
        await process_batch(standard("a", "b", "c"), worker.handle)
    assert caught.value is error
    assert error.__cause__ is None
    assert not isinstance(error.__context__, BaseExceptionGroup)


async def test_it_cancels_the_records_that_run_and_waits_for_them() -> None:
    slow, cleaned_up = asyncio.Event(), list[str]()

    async def handle(record: dict[str, Any]) -> None:
        if record["messageId"] == "a":
            await slow.wait()
            raise Suspended
        try:
            slow.set()
            await asyncio.sleep(1000)
        finally:
            await asyncio.sleep(3)
            cleaned_up.append(record["messageId"])

    with leaving_no_task(), pytest.raises(Suspended):
        await process_batch(standard("a", "b", "c", "d"), handle, max_concurrency=3)
    assert sorted(cleaned_up) == ["b", "c"]  # and d was not started


def test_ctrl_c_ends_the_batch() -> None:
    worker, tasks = Worker({"b": raising(KeyboardInterrupt())}, seconds=0), list[Any]()

    async def main() -> None:
        tasks.append(asyncio.current_task())
        await process_batch(standard("a", "b", "c"), worker.handle)

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    # Were nobody to look at it, asyncio would say so in the middle of some later test.
    assert isinstance(tasks[0].exception(), KeyboardInterrupt)


async def test_a_cancelled_batch_cancels_its_records_and_leaves_nothing_behind() -> None:
    worker = Worker(seconds=1000)
    with leaving_no_task(), pytest.raises(asyncio.CancelledError):
        batch = asyncio.ensure_future(process_batch(standard("a", "b", "c"), worker.handle, max_concurrency=2))
        await asyncio.sleep(1)
        batch.cancel()
        await batch
    assert sorted(worker.cancelled) == ["a", "b"]
    assert worker.started == ["a", "b"]


async def test_behind_a_record_that_swallows_the_cancellation_nothing_is_started() -> None:
    started: list[str] = []

    async def handle(record: dict[str, Any]) -> None:
        started.append(record["messageId"])
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(1000)

    with leaving_no_task(), pytest.raises(TimeoutError):
        async with asyncio.timeout(5):
            await process_batch(fifo("a1", "a2", "b1", "b2"), handle, max_concurrency=1)
    assert started == ["a1"]


async def test_nor_where_another_record_ends_the_batch() -> None:
    started: list[str] = []

    async def handle(record: dict[str, Any]) -> None:
        started.append(record["messageId"])
        if record["messageId"] == "b1":
            raise Suspended
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(1000)

    with leaving_no_task(), pytest.raises(Suspended):
        await process_batch(fifo("a1", "b1", "a2", "b2", "c1"), handle, max_concurrency=2)
    assert started == ["a1", "b1"]


async def test_an_asyncio_timeout_around_a_batch_holds() -> None:
    worker = Worker(seconds=1000)
    with leaving_no_task(), pytest.raises(TimeoutError):
        async with asyncio.timeout(5):
            await process_batch(fifo("a1", "a2", "b1"), worker.handle)
    assert sorted(worker.cancelled) == ["a1", "b1"]


async def test_a_cancelled_anyio_scope_around_a_batch_holds() -> None:
    worker = Worker(seconds=1000)
    with leaving_no_task(), anyio.move_on_after(5) as scope:
        await process_batch(kinesis("a", "b"), worker.handle)
    assert scope.cancelled_caught
    assert worker.cancelled == ["a"]


async def test_a_cancellation_of_something_that_a_record_waited_for_is_a_failure_of_this_record() -> None:
    async def handle(record: dict[str, Any]) -> None:
        if record["messageId"] == "b":
            other = asyncio.ensure_future(asyncio.sleep(1000))
            asyncio.get_running_loop().call_later(1, other.cancel)
            await other

    assert await process_batch(standard("a", "b", "c"), handle) == failures("b")


def cancel_this_task() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()


async def test_a_record_that_is_cancelled_alone_fails_and_the_others_run() -> None:
    """By a watchdog of the user's, for example; it must not keep its slot either."""
    started: list[str] = []

    async def handle(record: dict[str, Any]) -> None:
        started.append(record["messageId"])
        if record["messageId"] == "a1":
            cancel_this_task()
        await asyncio.sleep(1)

    async with asyncio.timeout(60):
        assert await process_batch(fifo("a1", "a2", "b1", "c1"), handle, max_concurrency=1) == failures("a1", "a2")
    assert started == ["a1", "b1", "c1"]


async def test_a_record_that_is_cancelled_as_it_ends_is_done() -> None:
    async def handle(record: dict[str, Any]) -> None:
        await asyncio.sleep(1)
        cancel_this_task()

    assert await process_batch(standard("a", "b"), handle) == failures()


async def test_a_record_that_was_cancelled_before_it_began_comes_again() -> None:
    async def handle(record: dict[str, Any]) -> None:
        for task in asyncio.all_tasks() - tasks:
            task.cancel()
        await asyncio.sleep(1)

    tasks = asyncio.all_tasks()
    response = await process_batch(standard("a", "b", "c"), handle, max_concurrency=1)
    assert response == failures("a", "b", "c")


async def test_a_cancellation_before_the_batch_is_none_of_the_batch() -> None:
    """In Python 3.11 a task group whose error was handled leaves one behind."""
    with contextlib.suppress(asyncio.CancelledError):
        cancel_this_task()
        await asyncio.sleep(1)
    assert await process_batch(kinesis("a", "b"), Worker({"b": raising(asyncio.CancelledError())}).handle) == failures(
        "number-b"
    )


# --- Under lambda_handler ---------------------------------------------------------------------------------------------


@dataclass
class Minute:
    """A Lambda context with a minute left by the clock of the machine."""

    deadline: float = field(default_factory=lambda: time.time() + 60)

    def get_remaining_time_in_millis(self) -> int:
        return int((self.deadline - time.time()) * 1000)


@pytest.fixture
def _no_loop_is_left() -> Iterator[None]:
    yield
    lambda_loop.close()


def deliver_twice(layer: Any) -> None:
    """Deliver thirty messages of which three are poison, and then all of them again."""
    poisoned, charged, leases = {"3", "5", "29"}, list[str](), list[int]()

    @idempotent_function(
        data_keyword_argument="record",
        persistence_store=layer,
        config=IdempotencyConfig(event_key_jmespath="messageId"),
    )
    async def charge(record: dict[str, Any]) -> None:
        if record["messageId"] in poisoned:
            raise PoisonError
        charged.append(record["messageId"])
        record_of_claim = current_execution().record
        assert record_of_claim is not None
        leases.append(record_of_claim.in_progress_expiry_timestamp or 0)

    @lambda_handler
    async def handler(event: Any, context: Any) -> Any:
        return await process_batch(event, charge)

    context = Minute()
    event = standard(*map(str, range(30)))
    assert handler(event, context) == failures("3", "5", "29")
    poisoned.clear()
    assert handler(event, context) == failures()
    assert sorted(charged) == sorted(map(str, range(30)))
    assert all(abs(lease / 1000 - context.deadline) < 10 for lease in leases)  # of every record, that of the invocation


@pytest.mark.usefixtures("_no_loop_is_left")
def test_under_lambda_handler_each_record_runs_once_and_is_held_until_the_deadline(tmp_path: Path) -> None:
    deliver_twice(SQLitePersistenceLayer(tmp_path / "records.sqlite3"))


@pytest.mark.server
@pytest.mark.usefixtures("_no_loop_is_left", "database")
def test_the_same_with_records_in_dynamodb(table: str) -> None:
    deliver_twice(DynamoDBPersistenceLayer(table))


# --- What is logged ---------------------------------------------------------------------------------------------------


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    assert {record.name for record in caplog.records} <= {"aidem"}
    assert all(record.levelno == logging.WARNING for record in caplog.records)
    return [logging.Formatter().format(record) for record in caplog.records]


async def test_a_failure_is_logged_by_type_and_identifier_and_shows_nothing_of_the_record(
    caplog: pytest.LogCaptureFixture,
) -> None:
    await process_batch(standard("a", "b"), Worker({"b": poison}).handle)
    assert logged(caplog) == ["record b of aws:sqs failed: PoisonError"]


async def test_records_that_were_not_run_are_logged_by_number(caplog: pytest.LogCaptureFixture) -> None:
    await process_batch(fifo("a1", "a2", "a3", "b1"), Worker({"a1": poison}).handle)
    assert logged(caplog) == [
        "record a1 of aws:sqs failed: PoisonError",
        "2 of 4 records were not run: one before them failed, or the invocation is about to end",
    ]


async def test_success_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    await process_batch(standard("a", "b"), Worker().handle)
    assert logged(caplog) == []


# --- What is refused --------------------------------------------------------------------------------------------------


def without(event: dict[str, Any], *path: str) -> dict[str, Any]:
    """Leave something out of the second record of an event."""
    event = json.loads(json.dumps(event))
    inner = event["Records"][1]
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    return event


NO_BATCHES: Iterable[tuple[Any, str]] = [
    (None, "it has no list of `Records`"),
    ([], "it has no list of `Records`"),
    ({"body": "secret"}, "it has no list of `Records`"),
    ({"Records": {"secret": 1}}, "it has no list of `Records`"),
    ({"Records": ["secret"]}, "`Records[0].eventSource` is missing"),
    ({"Records": [{"EventSource": "aws:sns"}]}, "`Records[0].eventSource` is missing"),
    ({"Records": [{"eventSource": ["secret"]}]}, "`Records[0].eventSource` is missing"),
    (
        {"Records": [{"eventSource": "secret"}]},
        "`Records[0].eventSource` is none of aws:sqs, aws:kinesis, aws:dynamodb",
    ),
    (standard("a", ""), "`Records[1].messageId` is missing"),
    (without(standard("a", "b"), "messageId"), "`Records[1].messageId` is missing"),
    (without(standard("a", "b"), "eventSourceARN"), "`Records[1].eventSourceARN` is missing"),
    (without(fifo("a", "b"), "attributes"), "`Records[1].attributes.MessageGroupId` is missing"),
    (without(kinesis("a", "b"), "kinesis"), "`Records[1].kinesis.sequenceNumber` is missing"),
    (without(dynamodb("a", "b"), "dynamodb", "SequenceNumber"), "`Records[1].dynamodb.SequenceNumber` is missing"),
]


@pytest.mark.parametrize(("event", "reason"), NO_BATCHES)
async def test_an_event_that_is_no_such_batch_is_refused_before_anything_runs(event: Any, reason: str) -> None:
    worker = Worker()
    with pytest.raises(IdempotencyUsageError) as refusal:
        await process_batch(event, worker.handle)
    assert str(refusal.value).endswith(f", but {reason}")
    assert "secret" not in str(refusal.value)
    assert worker.started == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_concurrency": 0}, "max_concurrency=0 is not allowed: it must be a positive whole number"),
        ({"max_concurrency": 1.5}, "max_concurrency=1.5 is not allowed"),
        ({"max_concurrency": True}, "max_concurrency=True is not allowed"),
        ({"time_reserve_seconds": -1}, "time_reserve_seconds=-1 is not allowed"),
        ({"time_reserve_seconds": float("nan")}, "time_reserve_seconds=nan is not allowed"),
        ({"time_reserve_seconds": float("inf")}, "time_reserve_seconds=inf is not allowed"),
        ({"time_reserve_seconds": True}, "time_reserve_seconds=True is not allowed"),
        ({"time_reserve_seconds": "1"}, "time_reserve_seconds='1' is not allowed"),
    ],
)
async def test_options_that_cannot_work_are_refused_by_name(options: Any, message: str) -> None:
    with pytest.raises(IdempotencyConfigError) as refusal:
        await process_batch(standard("a"), Worker().handle, **options)
    assert message in str(refusal.value)


def plain(record: Any) -> None:
    raise AssertionError


@pytest.mark.parametrize("handler", [plain, None, "handle", functools.partial(plain)])
async def test_a_handler_that_is_not_async_is_refused_before_anything_runs(handler: Any) -> None:
    with pytest.raises(TypeError, match="is not async; write `async def record_handler"):
        await process_batch(standard("a"), handler)


async def of_record_and_context(record: Any, lambda_context: Any) -> None:
    raise AssertionError


async def of_nothing() -> None:
    raise AssertionError


@pytest.mark.parametrize("handler", [of_record_and_context, of_nothing])
async def test_a_handler_that_does_not_take_a_record_alone_is_refused_before_anything_runs(handler: Any) -> None:
    with pytest.raises(TypeError, match=r"record_handler=<function> is not of one record: (missing|too many)"):
        await process_batch(standard("a"), handler)


class Callables:
    def __init__(self) -> None:
        self.handled: list[str] = []

    async def __call__(self, record: dict[str, Any]) -> None:
        self.handled.append(record["messageId"])

    async def handle(self, other: object, record: dict[str, Any]) -> None:
        await self(record)


async def test_async_callables_of_every_kind_are_handlers() -> None:
    handler = Callables()
    await process_batch(standard("a"), handler)
    await process_batch(standard("b"), functools.partial(handler.handle, object()))
    assert handler.handled == ["a", "b"]
