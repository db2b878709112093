"""Decorators of AWS Powertools above and below ours: which order works, and what the other one does."""

from __future__ import annotations

import io
import json
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from aws_lambda_powertools import Logger, Metrics, Tracer
from aws_lambda_powertools.metrics import MetricUnit
from aws_lambda_powertools.utilities.data_classes import APIGatewayProxyEventV2, event_source
from aws_lambda_powertools.utilities.parser import BaseModel, event_parser
from aws_lambda_powertools.utilities.validation import SchemaValidationError, validator
from aws_xray_sdk.core import xray_recorder
from pydantic import Field

from aidem import IdempotencyConfig, current_execution, idempotent, idempotent_function, sync
from aidem._runtime import lambda_loop
from aidem.awslambda import lambda_handler
from aidem.hooks import EventKind, IdempotencyEvent
from aidem.persistence.memory import MemoryPersistenceLayer
from tests.support.planned import Listener

EVENT = {"order_id": "o-1", "amount": 42}

xray_recorder.emitter._socket.close()  # opened by the import, for a daemon that is not there


@dataclass
class Context:
    """What Powertools and aidem read of Lambda's context."""

    aws_request_id: str
    function_name: str = "orders"
    memory_limit_in_mb: int = 128
    invoked_function_arn: str = "arn:aws:lambda:eu-central-1:111122223333:function:orders"
    tenant_id: str | None = None

    def get_remaining_time_in_millis(self) -> int:
        return 30_000


@pytest.fixture(autouse=True)
def _no_loop_is_left() -> Iterator[None]:
    yield
    sync.close()
    lambda_loop.close()


class Orders:
    """An idempotent handler with one other decorator; knows the events that ran it."""

    def __init__(self, act: Callable[[Any], Any] = lambda event: {"statusCode": 201}) -> None:
        self.act = act
        self.events: list[Any] = []
        self.keys: list[str] = []

    def _charge(self, event: Any) -> Any:
        self.events.append(event)
        self.keys.append(current_execution().key.partition("#")[2])
        return self.act(event)

    def decorated(self, how: str, other: Any, keys: str = "order_id", **options: Any) -> Any:
        """Return a function that is invoked with an event, and the next request id each time."""
        idempotently: dict[str, Any] = {
            "persistence_store": MemoryPersistenceLayer(),
            "config": IdempotencyConfig(event_key_jmespath=keys, raise_on_no_idempotency_key=True, **options),
        }

        def handler(event: Any, context: Any) -> Any:
            return self._charge(event)

        async def async_handler(event: Any, context: Any) -> Any:
            return self._charge(event)

        handlers: dict[str, Any] = {
            "above": lambda: other(sync.idempotent(**idempotently)(handler)),
            "above, async": lambda: other(lambda_handler(idempotent(**idempotently)(async_handler))),
            "below": lambda: sync.idempotent(**idempotently)(other(handler)),
        }
        function = handlers[how]()
        requests = iter(range(1, 10))
        return lambda event: function(event, Context(f"request-{next(requests)}"))


above = pytest.mark.parametrize("how", ["above", "above, async"])
anywhere = pytest.mark.parametrize("how", ["above", "above, async", "below"])


# --- The event is wrapped or parsed -----------------------------------------------------------------------------------


@anywhere
def test_event_source_gives_the_handler_its_data_class_and_the_key_is_that_of_the_event(how: str) -> None:
    orders, bare = Orders(), Orders()
    keys = "powertools_json(body).order_id"
    handler = orders.decorated(how, event_source(data_class=APIGatewayProxyEventV2), keys)
    event = {"version": "2.0", "headers": {}, "requestContext": {"requestId": "r"}, "body": json.dumps(EVENT)}
    assert handler(event) == handler(event) == {"statusCode": 201}
    assert [event.json_body for event in orders.events] == [EVENT]
    bare.decorated("above", lambda handler: handler, keys)(event)
    assert orders.keys == bare.keys


class Order(BaseModel):
    number: str = Field(validation_alias="order_id")
    amount: int


@pytest.mark.parametrize(("how", "keys"), [("above", "number"), ("above, async", "number"), ("below", "order_id")])
def test_above_event_parser_the_expression_names_the_event_and_below_it_the_model(how: str, keys: str) -> None:
    orders = Orders()
    handler = orders.decorated(how, event_parser(model=Order), keys)
    assert handler(EVENT) == handler(EVENT | {"amount": "43"}) == {"statusCode": 201}
    (order,) = orders.events
    assert (order.number, order.amount) == ("o-1", 42)


# --- The event and the response are validated -------------------------------------------------------------------------

WITH_ORDER = {"type": "object", "required": ["order_id"], "properties": {"order_id": {"type": "string"}}}
WITH_STATUS = {"type": "object", "required": ["statusCode"]}


@above
def test_validator_above_unwraps_the_event_that_the_expression_is_about(how: str) -> None:
    orders = Orders()
    handler = orders.decorated(how, validator(inbound_schema=WITH_ORDER, envelope="powertools_json(body)"))
    assert handler({"body": json.dumps(EVENT)}) == handler({"body": json.dumps(EVENT)}) == {"statusCode": 201}
    assert orders.events == [EVENT]


@above
def test_validator_above_refuses_an_event_before_it_gets_a_key(how: str) -> None:
    orders, listener = Orders(), Listener()
    handler = orders.decorated(how, validator(inbound_schema=WITH_ORDER), hooks=(listener,))
    with pytest.raises(SchemaValidationError):
        handler({"order_id": 1})
    assert (listener.kinds, orders.events) == ([], [])


def test_validator_below_refuses_an_event_that_has_a_key_and_gives_it_back() -> None:
    orders, listener = Orders(), Listener()
    handler = orders.decorated("below", validator(inbound_schema=WITH_ORDER), hooks=(listener,))
    with pytest.raises(SchemaValidationError):
        handler({"order_id": 1})
    assert (listener.kinds, orders.events) == ([EventKind.CLAIMED, EventKind.RELEASED], [])


@above
def test_a_response_that_validator_above_refuses_is_kept_and_the_function_not_run_again(how: str) -> None:
    orders = Orders(lambda event: {"charged": event["amount"]})
    handler = orders.decorated(how, validator(outbound_schema=WITH_STATUS))
    for _ in range(2):
        with pytest.raises(SchemaValidationError):
            handler(EVENT)
    assert orders.events == [EVENT]


def test_a_response_that_validator_below_refuses_charges_again() -> None:
    orders = Orders(lambda event: {"charged": event["amount"]})
    handler = orders.decorated("below", validator(outbound_schema=WITH_STATUS))
    for _ in range(2):
        with pytest.raises(SchemaValidationError):
            handler(EVENT)
    assert orders.events == [EVENT, EVENT]


# --- Logs -------------------------------------------------------------------------------------------------------------


class LoggingHook:
    """Logs what happens to calls by Powertools' logger."""

    def __init__(self) -> None:
        self.stream = io.StringIO()
        self.logger = Logger(service=f"orders-{secrets.token_hex(4)}", stream=self.stream)

    def on_event(self, event: IdempotencyEvent) -> None:
        self.logger.info(event.kind)

    def lines(self) -> list[tuple[str, str | None]]:
        lines = [json.loads(line) for line in self.stream.getvalue().splitlines()]
        return [(line["message"], line.get("function_request_id")) for line in lines]


@above
def test_inject_lambda_context_above_logs_a_replay_with_its_own_request(how: str) -> None:
    hook = LoggingHook()
    handler = Orders().decorated(how, hook.logger.inject_lambda_context, hooks=(hook,))
    handler(EVENT)
    handler(EVENT)
    assert hook.lines() == [("claimed", "request-1"), ("executed", "request-1"), ("replayed", "request-2")]


def test_inject_lambda_context_below_logs_a_replay_with_the_request_of_another_invocation() -> None:
    hook = LoggingHook()
    handler = Orders().decorated("below", hook.logger.inject_lambda_context, hooks=(hook,))
    handler(EVENT)
    handler(EVENT)
    assert hook.lines() == [("claimed", None), ("executed", "request-1"), ("replayed", "request-1")]


# --- Metrics ----------------------------------------------------------------------------------------------------------


class CountingHook:
    """Counts what happens to calls by Powertools' metrics."""

    def __init__(self) -> None:
        self.metrics = Metrics(namespace="orders", service="orders")
        self.metrics.clear_metrics()

    def on_event(self, event: IdempotencyEvent) -> None:
        self.metrics.add_metric(name=event.kind, unit=MetricUnit.Count, value=1)


def flushed(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """Return the metrics of each flush since the last look."""
    kinds = set(EventKind)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [{name: line[name] for name in line if name in kinds} for line in lines]


@above
def test_log_metrics_above_flushes_what_a_replay_has_counted(how: str, capsys: pytest.CaptureFixture[str]) -> None:
    hook = CountingHook()
    handler = Orders().decorated(how, hook.metrics.log_metrics, hooks=(hook,))
    handler(EVENT)
    assert flushed(capsys) == [{"claimed": [1.0], "executed": [1.0]}]
    handler(EVENT)
    assert flushed(capsys) == [{"replayed": [1.0]}]


@pytest.mark.filterwarnings("ignore:No application metrics to publish")
def test_log_metrics_below_is_one_invocation_late(capsys: pytest.CaptureFixture[str]) -> None:
    hook = CountingHook()
    handler = Orders().decorated("below", hook.metrics.log_metrics, hooks=(hook,))
    handler(EVENT)
    handler(EVENT)
    assert flushed(capsys) == [{"claimed": [1.0]}]
    handler({"order_id": "o-2"})
    assert flushed(capsys) == [{"claimed": [1.0], "executed": [1.0], "replayed": [1.0]}]
    hook.metrics.clear_metrics()


# --- Traces -----------------------------------------------------------------------------------------------------------


class Traces:
    """X-Ray's recorder, as Lambda has set it up: one segment for each invocation."""

    def __init__(self) -> None:
        self.recorder = xray_recorder
        self.tracer = Tracer(service="orders", disabled=False, auto_patch=False)
        self.recorder.configure(sampling=False, context_missing="RUNTIME_ERROR", emitter=self, streaming_threshold=1000)
        self.segments: list[Any] = []

    def send_entity(self, entity: Any) -> None:
        self.segments.append(json.loads(entity.serialize()))

    def invoke(self, handler: Any, event: Any) -> Any:
        self.recorder.begin_segment("lambda")
        try:
            return handler(event)
        finally:
            self.recorder.end_segment()

    def names(self) -> list[list[str]]:
        """Return the names of the subsegments of each invocation."""
        return [[inner["name"] for inner in segment.get("subsegments", [])] for segment in self.segments]


@pytest.fixture
def traces() -> Iterator[Traces]:
    yield Traces()
    Tracer._reset_config()


@above
def test_capture_lambda_handler_above_traces_replays_and_the_handler_annotates_its_segment(
    how: str, traces: Traces
) -> None:
    orders = Orders(lambda event: traces.tracer.put_annotation("order", event["order_id"]))
    handler = orders.decorated(how, traces.tracer.capture_lambda_handler)
    traces.invoke(handler, EVENT)
    traces.invoke(handler, EVENT)
    assert [len(names) for names in traces.names()] == [1, 1]
    first, replay = (segment["subsegments"][0].get("annotations", {}) for segment in traces.segments)
    assert (first["order"], "order" in replay) == ("o-1", False)


def test_capture_lambda_handler_below_traces_no_replay(traces: Traces) -> None:
    handler = Orders().decorated("below", traces.tracer.capture_lambda_handler)
    traces.invoke(handler, EVENT)
    traces.invoke(handler, EVENT)
    assert [len(names) for names in traces.names()] == [1, 0]


def test_capture_method_goes_below_an_async_function_and_traces_its_runs(traces: Traces) -> None:
    @idempotent_function(data_keyword_argument="order_id", persistence_store=MemoryPersistenceLayer())
    @traces.tracer.capture_method
    async def charge(order_id: str) -> str:
        return f"charged {order_id}"

    @lambda_handler
    async def handler(event: Any, context: Any) -> list[str]:
        return [await charge(event["order_id"]), await charge(event["order_id"])]

    assert traces.invoke(lambda event: handler(event, None), EVENT) == ["charged o-1"] * 2
    ((name,),) = traces.names()
    assert name.endswith("charge")


# --- What is refused --------------------------------------------------------------------------------------------------

PLAIN_DECORATORS: list[Any] = [
    validator,
    event_source(data_class=APIGatewayProxyEventV2),
    event_parser(model=Order),
    Logger(service="orders-refused").inject_lambda_context,
    Metrics(namespace="orders", service="orders").log_metrics,
]


async def async_handler(event: Any, context: Any) -> None:
    raise AssertionError


@pytest.mark.parametrize("plain", PLAIN_DECORATORS)
@pytest.mark.parametrize("ours", [idempotent, lambda_handler])
def test_a_plain_decorator_on_an_async_handler_is_refused_at_import(ours: Any, plain: Any) -> None:
    with pytest.raises(TypeError, match="async_handler is not an async function"):
        ours(plain(async_handler))


def test_idempotent_above_lambda_handler_is_refused_and_told_its_place() -> None:
    with pytest.raises(
        TypeError, match=r"async_handler is not an async function.*put idempotent right above `async def`"
    ):
        idempotent(lambda_handler(async_handler))  # type: ignore[arg-type]


def test_one_under_aidem_sync_is_refused_when_it_is_called_and_its_body_does_not_run() -> None:
    handler: Any = sync.idempotent(persistence_store=MemoryPersistenceLayer())(validator(async_handler))
    with pytest.raises(TypeError, match="returned a coroutine"):
        handler(EVENT, None)
