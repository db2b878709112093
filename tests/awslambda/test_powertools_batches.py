"""Batches by the processors of AWS Powertools: their records, our idempotency."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from aws_lambda_powertools.utilities.batch import (
    AsyncBatchProcessor,
    BatchProcessor,
    EventType,
    SqsFifoPartialProcessor,
    async_process_partial_response,
    process_partial_response,
)
from aws_lambda_powertools.utilities.batch.exceptions import BatchProcessingError
from aws_lambda_powertools.utilities.parser.models import SqsRecordModel
from pydantic import BaseModel, Json

from aidem import IdempotencyConfig, idempotent, idempotent_function, register_lambda_context, sync
from aidem._runtime import lambda_loop
from aidem.awslambda import lambda_handler
from aidem.config import current_lambda_context, reset_lambda_context
from aidem.exceptions import IdempotencyUsageError
from aidem.persistence.dynamodb import DynamoDBPersistenceLayer
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.persistence.sqlite import SQLitePersistenceLayer
from tests.support.aws_servers import Database

EVENTS = Path(__file__).parents[1] / "data" / "events"
FIRST, SECOND, THIRD = (record["messageId"] for record in json.loads((EVENTS / "sqs.json").read_text())["Records"])
BY_MESSAGE = IdempotencyConfig(event_key_jmespath="messageId", raise_on_no_idempotency_key=True)


@pytest.fixture(autouse=True)
def _no_loop_is_left() -> Iterator[None]:
    yield
    sync.close()
    lambda_loop.close()


@pytest.fixture
def layer(tmp_path: Path) -> SQLitePersistenceLayer:
    return SQLitePersistenceLayer(tmp_path / "records.sqlite3")


@dataclass
class Till:
    """Charges for orders, except for those that are poison."""

    poison: set[str] = field(default_factory=set)
    charged: list[str] = field(default_factory=list)

    def charge(self, order_id: str) -> str:
        if order_id in self.poison:
            raise ValueError(order_id)
        self.charged.append(order_id)
        return f"receipt for {order_id}"


@dataclass
class Invocation:
    """Lambda's context, as far as it is read."""

    seconds: float = 10.0

    def get_remaining_time_in_millis(self) -> int:
        return int(self.seconds * 1000)


def sample(name: str, *places: int) -> Any:
    """Return a sample event, or some of its records."""
    event = json.loads((EVENTS / f"{name}.json").read_text())
    return {"Records": [event["Records"][place] for place in places]} if places else event


def failures(*names: str) -> Any:
    return {"batchItemFailures": [{"itemIdentifier": name} for name in names]}


def order_of(record: Any) -> str:
    return record.json_body["order_id"]


# --- BatchProcessor and aidem.sync ------------------------------------------------------------------------------------


def plain_handler(layer: Any, till: Till, config: IdempotencyConfig = BY_MESSAGE) -> Any:
    processor = BatchProcessor(event_type=EventType.SQS)

    @sync.idempotent_function(data_keyword_argument="record", persistence_store=layer, config=config)
    def charge(record: Any) -> str:
        return till.charge(order_of(record))

    def handler(event: Any, context: Any) -> Any:
        return process_partial_response(event=event, record_handler=charge, processor=processor, context=context)

    return handler


def async_handler(layer: Any, till: Till, config: IdempotencyConfig = BY_MESSAGE) -> Any:
    processor = AsyncBatchProcessor(event_type=EventType.SQS)

    @idempotent_function(data_keyword_argument="record", persistence_store=layer, config=config)
    async def charge(record: Any) -> str:
        await asyncio.sleep(0)
        return till.charge(order_of(record))

    def handler(event: Any, context: Any) -> Any:
        return async_process_partial_response(event=event, record_handler=charge, processor=processor, context=context)

    return handler


@pytest.fixture
def lambdas_loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[asyncio.AbstractEventLoop]:
    """As in Lambda, where Powertools keeps the loop of the main thread instead of making one for each batch."""
    monkeypatch.setenv("LAMBDA_TASK_ROOT", "/var/task")
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield loop
    asyncio.set_event_loop(None)
    loop.close()


both_processors = pytest.mark.parametrize("make_handler", [plain_handler, async_handler])


def check_that_records_run_once(make_handler: Any, layer: Any) -> None:
    till = Till(poison={"o-2"})
    handler = make_handler(layer, till)
    assert handler(sample("sqs"), None) == failures(SECOND)
    till.poison.clear()
    assert handler(sample("sqs", 2, 1, 0), None) == failures()  # all come again, though one was asked for
    assert handler(sample("sqs", 1), None) == failures()
    assert sorted(till.charged) == ["o-1", "o-2", "o-3"]


@both_processors
def test_each_record_runs_once_whatever_else_its_batch_holds(make_handler: Any, layer: SQLitePersistenceLayer) -> None:
    check_that_records_run_once(make_handler, layer)


def test_each_record_runs_once_on_the_loop_that_powertools_keeps_in_lambda(
    layer: SQLitePersistenceLayer, lambdas_loop: asyncio.AbstractEventLoop
) -> None:
    check_that_records_run_once(async_handler, layer)
    lambdas_loop.run_until_complete(layer.aclose())


@pytest.mark.server
@both_processors
def test_each_record_runs_once_with_records_in_dynamodb(make_handler: Any, table: str, database: Database) -> None:
    check_that_records_run_once(make_handler, DynamoDBPersistenceLayer(table))
    assert [item["status"] for item in database.items(table)] == [{"S": "COMPLETED"}] * 3


@both_processors
def test_a_message_that_is_sent_again_is_known_by_the_number_in_its_body(make_handler: Any) -> None:
    till = Till()
    handler = make_handler(
        MemoryPersistenceLayer(), till, IdempotencyConfig(event_key_jmespath="powertools_json(body).order_id")
    )
    event = sample("sqs", 0)
    handler(event, None)
    event["Records"][0]["messageId"] = "another"
    assert handler(event, None) == failures()
    assert till.charged == ["o-1"]


@both_processors
def test_a_whole_batch_that_fails_is_an_error_of_the_function(make_handler: Any) -> None:
    till = Till(poison={"o-1", "o-2", "o-3"})
    handler = make_handler(MemoryPersistenceLayer(), till)
    with pytest.raises(BatchProcessingError):
        handler(sample("sqs"), None)
    till.poison.clear()
    assert handler(sample("sqs"), None) == failures()
    assert sorted(till.charged) == ["o-1", "o-2", "o-3"]


def test_a_record_that_runs_elsewhere_is_reported_and_comes_again() -> None:
    layer, till = MemoryPersistenceLayer(), Till()
    responses: list[Any] = []

    class SlowTill(Till):
        def charge(self, order_id: str) -> str:
            if not responses:
                responses.append(other(sample("sqs", 0, 1), None))  # a second consumer gets the message meanwhile
            return super().charge(order_id)

    slow = SlowTill()
    handler, other = plain_handler(layer, slow), plain_handler(layer, till)
    assert handler(sample("sqs", 0), None) == failures()
    assert responses == [failures(FIRST)]
    assert other(sample("sqs", 0), None) == failures()
    assert (slow.charged, till.charged) == (["o-1"], ["o-2"])


# --- What the record is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event_type", "name"),
    [(EventType.KinesisDataStreams, "kinesis"), (EventType.DynamoDBStreams, "dynamodb_stream")],
)
def test_records_of_streams_are_known_by_their_event_id(event_type: EventType, name: str) -> None:
    handled: list[str] = []

    @sync.idempotent_function(
        data_keyword_argument="record",
        persistence_store=MemoryPersistenceLayer(),
        config=IdempotencyConfig(event_key_jmespath="eventID", raise_on_no_idempotency_key=True),
    )
    def handle(record: Any) -> None:
        if len(handled) == 1:
            handled.append("poison")
            raise ValueError
        handled.append(record["eventID"])

    processor = BatchProcessor(event_type=event_type)
    response = process_partial_response(event=sample(name), record_handler=handle, processor=processor)
    assert len(response["batchItemFailures"]) == 1
    process_partial_response(event=sample(name), record_handler=handle, processor=processor)
    first, second, third = (record["eventID"] for record in sample(name)["Records"])
    assert handled == [first, "poison", third, second]


class Order(BaseModel):
    order_id: str


class OrderRecord(SqsRecordModel):
    body: Json[Order]


def test_a_model_for_the_record_is_a_payload_whose_fields_the_expression_names() -> None:
    till = Till()

    @sync.idempotent_function(
        data_keyword_argument="record",
        persistence_store=MemoryPersistenceLayer(),
        config=IdempotencyConfig(event_key_jmespath="body.order_id", raise_on_no_idempotency_key=True),
    )
    def charge(record: Any) -> str:
        return till.charge(record.body.order_id)

    processor = BatchProcessor(event_type=EventType.SQS, model=OrderRecord)
    for _ in range(2):
        assert process_partial_response(event=sample("sqs"), record_handler=charge, processor=processor) == failures()
    assert till.charged == ["o-1", "o-2", "o-3"]


def test_in_a_fifo_queue_what_stands_behind_a_failure_is_left_alone() -> None:
    till = Till(poison={"o-2"})

    @sync.idempotent_function(
        data_keyword_argument="record", persistence_store=MemoryPersistenceLayer(), config=BY_MESSAGE
    )
    def charge(record: Any) -> str:
        return till.charge(order_of(record))

    def handle(event: Any) -> Any:
        return process_partial_response(event=event, record_handler=charge, processor=SqsFifoPartialProcessor())

    assert handle(sample("sqs_fifo")) == failures(SECOND, THIRD)
    till.poison.clear()
    assert handle(sample("sqs_fifo")) == failures()
    assert till.charged == ["o-1", "o-2", "o-3"]


# --- The Lambda context -----------------------------------------------------------------------------------------------


@both_processors
def test_a_registered_context_reaches_every_record(make_handler: Any) -> None:
    context, seen = Invocation(), list[Any]()

    class Watching(Till):
        def charge(self, order_id: str) -> str:
            seen.append(current_lambda_context(BY_MESSAGE))
            return super().charge(order_id)

    handler = make_handler(MemoryPersistenceLayer(), Watching())
    token = register_lambda_context(context)
    try:
        handler(sample("sqs"), context)
    finally:
        reset_lambda_context(token)
    assert seen == [context] * 3


def test_powertools_own_context_argument_is_no_part_of_the_key() -> None:
    contexts: list[Any] = []

    @sync.idempotent_function(
        data_keyword_argument="record", persistence_store=MemoryPersistenceLayer(), config=BY_MESSAGE
    )
    def charge(record: Any, lambda_context: Any) -> None:
        contexts.append(lambda_context)

    processor = BatchProcessor(event_type=EventType.SQS)
    first, second = Invocation(1), Invocation(2)
    for context in (first, second):
        process_partial_response(sample("sqs"), charge, processor, cast(Any, context))
    assert contexts == [first] * 3


# --- What does not go together ----------------------------------------------------------------------------------------


def test_a_whole_batch_under_one_key_runs_again_once_it_is_delivered_in_other_company() -> None:
    """Why records are made idempotent, and not the handler."""
    till = Till()
    processor = BatchProcessor(event_type=EventType.SQS)

    @sync.idempotent(
        persistence_store=MemoryPersistenceLayer(), config=IdempotencyConfig(event_key_jmespath="Records[].messageId")
    )
    def handler(event: Any, context: Any) -> Any:
        return process_partial_response(
            event=event, record_handler=lambda record: till.charge(order_of(record)), processor=processor
        )

    handler(sample("sqs", 0, 1), None)
    handler(sample("sqs", 1, 2), None)
    assert till.charged == ["o-1", "o-2", "o-2", "o-3"]


def test_an_idempotent_handler_replays_the_failures_of_its_first_run() -> None:
    """And why an expression that names the first record is worse."""
    till = Till(poison={"o-1"})
    processor = BatchProcessor(event_type=EventType.SQS)

    @sync.idempotent(
        persistence_store=MemoryPersistenceLayer(), config=IdempotencyConfig(event_key_jmespath="Records[0].messageId")
    )
    def handler(event: Any, context: Any) -> Any:
        return process_partial_response(
            event=event, record_handler=lambda record: till.charge(order_of(record)), processor=processor
        )

    assert handler(sample("sqs", 0, 1), None) == failures(FIRST)
    till.poison.clear()
    assert handler(sample("sqs", 0), None) == failures(FIRST)
    assert till.charged == ["o-2"]


def test_a_blocking_processor_in_an_async_handler_is_refused_for_each_record() -> None:
    till = Till()
    handler = plain_handler(MemoryPersistenceLayer(), till)

    @lambda_handler
    async def async_lambda(event: Any, context: Any) -> Any:
        return handler(event, context)

    with pytest.raises(BatchProcessingError) as refusal:
        async_lambda(sample("sqs"), None)
    assert {kind for kind, _, _ in refusal.value.child_exceptions} == {IdempotencyUsageError}
    assert till.charged == []


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_powertools_async_processor_cannot_run_in_an_async_handler() -> None:
    till = Till()
    handler = async_handler(MemoryPersistenceLayer(), till)

    @lambda_handler
    @idempotent(persistence_store=MemoryPersistenceLayer())
    async def async_lambda(event: Any, context: Any) -> Any:
        return handler(event, context)

    with pytest.raises(RuntimeError, match="running event loop"):
        async_lambda(sample("sqs"), None)
    gc.collect()  # the coroutine that Powertools has made for nothing
    assert till.charged == []
