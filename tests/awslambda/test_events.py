"""The expressions that the page about Lambda recommends, on events as AWS delivers them."""

from __future__ import annotations

import base64
import copy
import gzip
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aws_lambda_powertools.utilities import data_classes
from aws_lambda_powertools.utilities.data_classes.dynamo_db_stream_event import DynamoDBRecord
from aws_lambda_powertools.utilities.data_classes.kinesis_stream_event import KinesisStreamRecord
from aws_lambda_powertools.utilities.data_classes.sqs_event import SQSRecord

from aidem import IdempotencyConfig, idempotent, idempotent_function
from aidem.exceptions import IdempotencyKeyError
from aidem.persistence.memory import MemoryPersistenceLayer

ROOT = Path(__file__).parents[2]
EVENTS = ROOT / "tests" / "data" / "events"
PAGE = ROOT / "docs" / "lambda.md"

Change = Callable[[Any], None]


# --- What happens to events -------------------------------------------------------------------------------------------


def put(path: str, value: Any) -> Change:
    """Change one value; a path is names and numbers with slashes between."""

    def change(event: Any) -> None:
        *outer, last = [int(name) if name.isdecimal() else name for name in path.split("/")]
        for name in outer:
            event = event[name]
        assert event[last] != value
        event[last] = value

    return change


def every(*changes: Change) -> Change:
    def change(event: Any) -> None:
        for step in changes:
            step(event)

    return change


def in_text(path: str, change: Change, decode: Any = json.loads, encode: Any = json.dumps) -> Change:
    """Change something in JSON text inside an event."""

    def change_text(event: Any) -> None:
        *outer, last = [int(name) if name.isdecimal() else name for name in path.split("/")]
        for name in outer:
            event = event[name]
        inner = decode(event[last])
        change(inner)
        event[last] = encode(inner)

    return change_text


BASE64 = (
    lambda text: json.loads(base64.b64decode(text)),
    lambda data: base64.b64encode(json.dumps(data).encode()).decode(),
)
GZIP = (
    lambda text: json.loads(gzip.decompress(base64.b64decode(text))),
    lambda data: base64.b64encode(gzip.compress(json.dumps(data).encode(), compresslevel=1)).decode(),
)


def reverse_records(event: Any) -> None:
    event["Records"].reverse()


def swap_first_record(event: Any) -> None:
    event["Records"][0] = event["Records"][1]


unchanged = every()
sqs_redelivery = every(
    put("Records/0/receiptHandle", "AQEBnew"),
    put("Records/0/attributes/ApproximateReceiveCount", "2"),
)
sqs_new_message = every(
    put("Records/0/messageId", "5fea7756-0ea4-451a-a703-a558b933e274"),
    put("Records/0/receiptHandle", "AQEBnew"),
    put("Records/0/attributes/SentTimestamp", "1763910999000"),
)
sqs_new_body = every(in_text("Records/0/body", put("order_id", "o-9")), put("Records/0/md5OfBody", "new"))
to_dead_letters = every(
    sqs_redelivery, put("Records/0/eventSourceARN", "arn:aws:sqs:eu-central-1:111122223333:dead.fifo")
)
SQS = {
    "redelivery": sqs_redelivery,
    "redelivery in another batch": every(sqs_redelivery, reverse_records),
    "move to a dead-letter queue": to_dead_letters,
    "redrive": sqs_new_message,
    "sent again": sqs_new_message,
    "the same body on purpose": sqs_new_message,
    "second copy in the queue": sqs_new_message,
    "another message": every(sqs_new_message, sqs_new_body),
}


def http(key_header: str, trace_header: str, caller: str, path: str, body: Change) -> dict[str, Change]:
    new_request = put(f"headers/{trace_header}", "Root=1-new")
    return {
        "client's retry": new_request,
        "another order": every(new_request, body),
        "another request": every(new_request, put(f"headers/{key_header}", "another")),
        "another caller": every(new_request, put(caller, "somebody-else")),
        "another path": every(new_request, put(path, "/refunds")),
    }


def with_request_id(happenings: dict[str, Change]) -> dict[str, Change]:
    return {name: every(change, put("requestContext/requestId", "new")) for name, change in happenings.items()}


LOWER = ("idempotency-key", "x-amzn-trace-id")
ORDER = put("order_id", "o-9")
HAPPENINGS: dict[str, dict[str, Change]] = {
    "sqs": SQS,
    "sqs_fifo": SQS
    | {
        "another message": every(sqs_new_message, put("Records/0/attributes/MessageDeduplicationId", "order-o-9")),
        "move to a dead-letter queue": every(
            to_dead_letters,
            put("Records/0/attributes/MessageDeduplicationId", "059f36b4-87a3-44ab-83d2-661975830a7d"),
        ),
    },
    "sqs_sns": SQS
    | {
        "another message": every(
            sqs_new_message,
            in_text("Records/0/body", every(put("MessageId", "new"), in_text("Message", ORDER))),
        ),
        "sent again": every(sqs_new_message, in_text("Records/0/body", put("MessageId", "new"))),
    },
    "sqs_eventbridge": SQS
    | {
        "another event": every(
            sqs_new_message, in_text("Records/0/body", every(put("id", "new"), put("detail/order_id", "o-9")))
        ),
        "sent again": every(sqs_new_message, in_text("Records/0/body", put("id", "new"))),
    },
    "sns": {
        "redelivery": unchanged,
        "sent again": every(
            put("Records/0/Sns/MessageId", "new"), put("Records/0/Sns/Timestamp", "2025-11-23T15:11:00Z")
        ),
        "another message": every(put("Records/0/Sns/MessageId", "new"), in_text("Records/0/Sns/Message", ORDER)),
    },
    "eventbridge": {
        "redelivery": unchanged,
        "sent again": put("id", "new"),
        "another event": every(put("id", "new"), put("detail/order_id", "o-9")),
    },
    "kinesis": {
        "redelivery": unchanged,
        "sent again": every(
            put("Records/0/eventID", "shardId-000000000006:new"), put("Records/0/kinesis/sequenceNumber", "new")
        ),
        "another record": swap_first_record,
    },
    "dynamodb_stream": {"redelivery": unchanged, "another change of the item": swap_first_record},
    "s3": {
        "redelivery": unchanged,
        "another write of the object": every(
            put("Records/0/s3/object/sequencer", "0055AED6DCD90281E6"),
            put("Records/0/eventTime", "2025-11-23T15:11:00Z"),
        ),
        "another object": put("Records/0/s3/object/key", "2025/o-9.json"),
    },
    "cloudwatch_logs": {
        "redelivery": in_text("awslogs/data", unchanged, *GZIP),  # what packed it may pack it another way
        "other log events": in_text("awslogs/data", put("logEvents/0/id", "new"), *GZIP),
    },
    "apigateway_rest": with_request_id(
        http(
            "Idempotency-Key",
            "X-Amzn-Trace-Id",
            "requestContext/authorizer/claims/sub",
            "path",
            in_text("body", ORDER),
        )
    ),
    "apigateway_http": with_request_id(
        http(*LOWER, "requestContext/authorizer/jwt/claims/sub", "rawPath", in_text("body", ORDER))
    ),
    "function_url": with_request_id(
        http(*LOWER, "requestContext/authorizer/iam/userId", "rawPath", in_text("body", ORDER, *BASE64))
    ),
    "alb": http(*LOWER, "headers/x-amzn-oidc-identity", "path", in_text("body", ORDER)),
}
SAMPLES = {
    "SQS": "sqs",
    "SQS FIFO": "sqs_fifo",
    "SNS through SQS": "sqs_sns",
    "EventBridge through SQS": "sqs_eventbridge",
    "SNS": "sns",
    "EventBridge": "eventbridge",
    "Kinesis": "kinesis",
    "DynamoDB stream": "dynamodb_stream",
    "S3": "s3",
    "CloudWatch Logs": "cloudwatch_logs",
    "API Gateway, REST": "apigateway_rest",
    "API Gateway, HTTP": "apigateway_http",
    "Function URL": "function_url",
    "Application Load Balancer": "alb",
}


# --- What the page says -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the page's tables."""

    event: str
    payload: str
    expression: str
    same: tuple[str, ...]
    another: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.event}: {self.expression}"

    @property
    def sample(self) -> str:
        return SAMPLES[self.event]

    def after(self, happening: str) -> Any:
        """Return the event as something happened to it."""
        event = sample(self.sample)
        HAPPENINGS[self.sample][happening](event)
        return event

    def payload_of(self, event: Any) -> Any:
        return event["Records"][0] if self.payload == "record" else event


def sample(name: str) -> Any:
    return json.loads((EVENTS / f"{name}.json").read_text(encoding="utf-8"))


def tables() -> Iterator[list[Row]]:
    (section,) = re.findall(r"^## Events\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    for table in re.findall(r"^\| Event .*\n\|---.*\n((?:\|.*\n)+)", section, re.MULTILINE):
        yield [row_of(line) for line in table.splitlines()]


def row_of(line: str) -> Row:
    event, payload, expression, same, another = (cell.strip() for cell in line.strip("|").split("|"))
    return Row(event=event, payload=payload, expression=expression.strip("`"), same=names(same), another=names(another))


def names(cell: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in cell.split(",")) if cell else ()


*RECOMMENDED, NOT_RECOMMENDED = tables()
ROWS = [*itertools.chain(*RECOMMENDED), *NOT_RECOMMENDED]
SAME = [pytest.param(row, name, id=f"{row}: {name}") for row in ROWS for name in row.same]
ANOTHER = [pytest.param(row, name, id=f"{row}: {name}") for row in ROWS for name in row.another]


def test_every_sample_has_a_row_and_every_row_a_sample() -> None:
    assert {row.sample for row in ROWS} == {path.stem for path in EVENTS.glob("*.json")} == set(HAPPENINGS)
    assert {row.payload for row in ROWS} == {"event", "record"}


@pytest.mark.parametrize("row", [*itertools.chain(*RECOMMENDED)], ids=str)
def test_what_is_recommended_tells_the_same_work_from_other_work(row: Row) -> None:
    assert row.same
    assert row.another


# --- Whether it is so -------------------------------------------------------------------------------------------------


class Orders:
    """A function, idempotent by the expression of a row, that counts how often it ran."""

    def __init__(self, row: Row, expression: str | None = None) -> None:
        self.runs = 0
        options: Any = {
            "persistence_store": MemoryPersistenceLayer(),
            "config": IdempotencyConfig(
                event_key_jmespath=row.expression if expression is None else expression,
                raise_on_no_idempotency_key=True,
            ),
        }

        @idempotent(**options)
        async def handle_event(event: Any, context: Any) -> int:
            self.runs += 1
            return self.runs

        @idempotent_function(data_keyword_argument="record", **options)
        async def handle_record(record: Any) -> int:
            self.runs += 1
            return self.runs

        self.handle = handle_record if row.payload == "record" else lambda event: handle_event(event, None)


@pytest.mark.parametrize(("row", "happening"), SAME)
async def test_the_same_key_on(row: Row, happening: str) -> None:
    orders = Orders(row)
    await orders.handle(row.payload_of(sample(row.sample)))
    assert await orders.handle(row.payload_of(row.after(happening))) == 1
    assert orders.runs == 1


@pytest.mark.parametrize(("row", "happening"), ANOTHER)
async def test_another_key_on(row: Row, happening: str) -> None:
    orders = Orders(row)
    await orders.handle(row.payload_of(sample(row.sample)))
    assert await orders.handle(row.payload_of(row.after(happening))) == 2


# --- Events of another source -----------------------------------------------------------------------------------------

OF_SEVERAL_FIELDS = [row for row in itertools.chain(*RECOMMENDED) if row.sample in {"s3", "sqs_fifo"}]


@pytest.mark.parametrize("name", sorted(HAPPENINGS))
@pytest.mark.parametrize("row", OF_SEVERAL_FIELDS, ids=str)
async def test_an_event_of_another_source_has_no_key_which_it_would_share_with_all_others(row: Row, name: str) -> None:
    event = sample(name)
    payload = event["Records"][0] if row.payload == "record" and "Records" in event else event
    if name == row.sample:
        assert await Orders(row).handle(payload) == 1
    else:
        with pytest.raises(IdempotencyKeyError, match="no idempotency key was found"):
            await Orders(row).handle(payload)


# --- The Idempotency-Key header ---------------------------------------------------------------------------------------

BY_HEADER = [row for row in ROWS if "headers." in row.expression]


def without_key_header(row: Row) -> Any:
    event = sample(row.sample)
    headers = event["headers"]
    event["headers"] = {name: headers[name] for name in headers if name.lower() != "idempotency-key"}
    assert len(event["headers"]) == len(headers) - 1
    return event


@pytest.mark.parametrize("row", BY_HEADER, ids=str)
async def test_a_request_without_the_header_has_no_key(row: Row) -> None:
    with pytest.raises(IdempotencyKeyError):
        await Orders(row).handle(without_key_header(row))


@pytest.mark.parametrize("row", BY_HEADER, ids=str)
async def test_requests_without_the_header_would_share_a_key_but_for_the_condition(row: Row) -> None:
    orders = Orders(row, row.expression.partition("&&")[2])
    first, other = without_key_header(row), without_key_header(row)
    other["body"] = "another order"
    assert await orders.handle(first) == await orders.handle(other) == 1


@pytest.mark.parametrize("name", ["Idempotency-Key", "idempotency-key"])
async def test_a_header_can_be_found_under_two_names(name: str) -> None:
    (row,) = (row for row in BY_HEADER if row.sample == "apigateway_rest")
    (advice,) = re.findall(r"`(not_null\(headers[^`]*\))`", PAGE.read_text(encoding="utf-8"))
    event = without_key_header(row)
    event["headers"][name] = "8e03978e-40d5-43e8-bc93-6894a57f9324"
    assert await Orders(row, advice).handle(event) == 1
    with pytest.raises(IdempotencyKeyError):
        await Orders(row, advice).handle(without_key_header(row))


# --- Event wrappers ---------------------------------------------------------------------------------------------------

WRAPPERS: dict[tuple[str, str], Any] = {
    ("sqs", "event"): data_classes.SQSEvent,
    ("sqs", "record"): SQSRecord,
    ("sqs_fifo", "record"): SQSRecord,
    ("sqs_sns", "record"): SQSRecord,
    ("sqs_eventbridge", "record"): SQSRecord,
    ("sns", "event"): data_classes.SNSEvent,
    ("eventbridge", "event"): data_classes.EventBridgeEvent,
    ("kinesis", "record"): KinesisStreamRecord,
    ("dynamodb_stream", "record"): DynamoDBRecord,
    ("s3", "event"): data_classes.S3Event,
    ("cloudwatch_logs", "event"): data_classes.CloudWatchLogsEvent,
    ("apigateway_rest", "event"): data_classes.APIGatewayProxyEvent,
    ("apigateway_http", "event"): data_classes.APIGatewayProxyEventV2,
    ("function_url", "event"): data_classes.LambdaFunctionUrlEvent,
    ("alb", "event"): data_classes.ALBEvent,
}


@pytest.mark.parametrize("row", ROWS, ids=str)
async def test_a_data_class_of_powertools_has_the_key_of_the_event_in_it(row: Row) -> None:
    orders = Orders(row)
    raw = row.payload_of(sample(row.sample))
    wrapped = WRAPPERS[row.sample, row.payload](copy.deepcopy(raw))
    assert await orders.handle(raw) == await orders.handle(wrapped) == 1


@pytest.mark.parametrize(("row", "happening"), ANOTHER)
async def test_data_classes_of_different_events_have_different_keys(row: Row, happening: str) -> None:
    orders = Orders(row)
    wrapper = WRAPPERS[row.sample, row.payload]
    await orders.handle(wrapper(row.payload_of(sample(row.sample))))
    assert await orders.handle(wrapper(row.payload_of(row.after(happening)))) == 2
