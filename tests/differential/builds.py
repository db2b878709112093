"""How decorated functions are made where one decorator is not all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aws_lambda_powertools.utilities.batch import BatchProcessor, EventType, process_partial_response

from tests.differential import functions

if TYPE_CHECKING:
    from tests.differential.stage import Stage


def without_config(stage: Stage) -> Any:
    return stage.side.idempotent(persistence_store=stage.layer, key_prefix="pay")(stage.observed(functions.handle))


def as_method(stage: Stage) -> Any:
    class Shop:
        pay = stage.decorated(functions.method)

    return Shop().pay


def as_classmethod(stage: Stage) -> Any:
    class Shop:
        pay: Any = classmethod(stage.decorated(functions.method))

    return Shop.pay


def as_staticmethod(stage: Stage) -> Any:
    class Shop:
        pay = staticmethod(stage.decorated(functions.pay))

    return Shop().pay


def lambda_expression(stage: Stage) -> Any:
    return stage.decorated(lambda order: functions.act())


def async_function(stage: Stage) -> Any:
    """Return what runs the coroutine, as a caller does who expects one."""
    import asyncio

    pay_later = stage.decorated(functions.pay_later)
    return lambda order: asyncio.run(pay_later(order=order))


def with_setting_by_position(stage: Stage) -> Any:
    config = stage.side.config("id", **stage.side.defaults)
    decorate = stage.side.idempotent_function(
        data_keyword_argument="order", persistence_store=stage.layer, config=config
    )
    return decorate(stage.observed(functions.pay))


def with_setting_changed_later(stage: Stage) -> Any:
    config = stage.side.config(**stage.side.defaults)
    config.event_key_jmespath = "id"
    decorate = stage.side.idempotent_function(
        data_keyword_argument="order", persistence_store=stage.layer, config=config
    )
    return decorate(stage.observed(functions.pay))


def with_registered_context(stage: Stage) -> Any:
    config = stage.side.config(**stage.side.defaults)
    decorate = stage.side.idempotent_function(
        data_keyword_argument="order", persistence_store=stage.layer, config=config
    )
    pay = decorate(stage.observed(functions.pay))

    def invoked(order: Any) -> Any:
        config.register_lambda_context(functions.Invocation())
        return pay(order=order)

    return invoked


def one_in_another(stage: Stage) -> Any:
    inner = stage.decorated(functions.pay)

    def outer(order: Any) -> Any:
        return {"inner": inner(order=order)}

    return stage.decorated(outer, key_prefix="outer")


def second_config(stage: Stage) -> Any:
    first = stage.decorated(functions.pay, {"event_key_jmespath": "id"}, key_prefix="first")
    second = stage.decorated(functions.pay, {"event_key_jmespath": "amount"}, key_prefix="second")

    def both(order: Any) -> Any:
        return [first(order=order), second(order=order)]

    return both


def completed_elsewhere(stage: Stage) -> Any:
    """Complete the call on another layer of the same store, as another process does."""
    here, elsewhere = (
        stage.decorated(functions.pay),
        stage.decorated(functions.pay, persistence_store=stage.another_layer()),
    )
    calls: list[Callable[..., Any]] = [elsewhere]

    def pay(order: Any) -> Any:
        return [call(order=order) for call in (*calls, here)][-1]

    return pay


SQS_EVENT = {
    "Records": [
        {"messageId": f"m-{number}", "body": text, "eventSource": "aws:sqs"}
        for number, text in enumerate(["good", "bad", "good"])
    ]
}


def batch(stage: Stage) -> Any:
    """Handle the records of an SQS event, each idempotent, with Powertools' processor."""
    pay_record = stage.decorated(functions.pay_record)
    processor = BatchProcessor(event_type=EventType.SQS)

    def handle(event: Any) -> Any:
        return process_partial_response(
            event=event, record_handler=lambda record: pay_record(record=record), processor=processor
        )

    return handle


def function_in_handler(stage: Stage) -> Any:
    config = stage.side.config(**stage.side.defaults)
    pay = _function(stage, config)
    handle = stage.side.idempotent(persistence_store=stage.another_layer(), config=config)(_calling(pay))
    return lambda event: handle(event, functions.Invocation())


def function_after_handler(stage: Stage) -> Any:
    config = stage.side.config(**stage.side.defaults)
    pay = _function(stage, config)
    handle = stage.side.idempotent(persistence_store=stage.another_layer(), config=config)(functions.handle)

    def both(event: Any) -> Any:
        return [handle(event, functions.Invocation()), pay(order=event)]

    return both


def _function(stage: Stage, config: Any) -> Callable[..., Any]:
    decorate = stage.side.idempotent_function(
        data_keyword_argument="order", persistence_store=stage.layer, config=config
    )
    function: Callable[..., Any] = decorate(stage.observed(functions.pay))
    return function


def _calling(pay: Callable[..., Any]) -> Callable[..., Any]:
    def handle(event: Any, context: Any) -> Any:
        return pay(order=event)

    return handle
