"""The functions that scenarios decorate, and what their bodies do."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import pathlib
import uuid
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pydantic
from aws_lambda_powertools.utilities.idempotency.serialization.base import (
    BaseIdempotencyModelSerializer,
    BaseIdempotencySerializer,
)

if TYPE_CHECKING:
    from tests.differential.stage import Stage

STAGE: ContextVar[Stage] = ContextVar("STAGE")


@dataclass
class Invocation:
    """The part of a Lambda context that matters here."""

    remaining_seconds: float = 600

    def get_remaining_time_in_millis(self) -> int:
        return int(self.remaining_seconds * 1000)


class Killed(BaseException):
    """What ends a process, as seen from within: no `Exception`."""


# --- Functions --------------------------------------------------------------------------------------------------------


def act() -> Any:
    stage = STAGE.get()
    return stage.scenario.body(stage)


def pay(order):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201 - without annotations
    return act()


def pay_with_note(note: str, order: Any = None) -> Any:
    return act()


def pay_anything(**arguments: Any) -> Any:
    return act()


def pay_by_default(order: Any = "the default") -> Any:
    return act()


def handle(event: Any, context: Any) -> Any:
    return act()


def handle_with_option(event: Any, context: Any, *, dry_run: bool = False) -> Any:
    return act()


def method(self: Any, order: Any) -> Any:
    return act()


def pay_record(record: Any) -> Any:
    if record.body == "bad" and STAGE.get().runs <= 3:
        raise LookupError
    return act()


async def pay_later(order: Any) -> Any:
    return act()


# --- Bodies -----------------------------------------------------------------------------------------------------------


def paid(stage: Stage) -> Any:
    return {"paid": True, "run": stage.runs}


def returning(value: Any) -> Callable[[Stage], Any]:
    return lambda stage: value


def raising(error: BaseException) -> Callable[[Stage], Any]:
    def body(stage: Stage) -> Any:
        raise error

    return body


def failing_at_first(error: BaseException) -> Callable[[Stage], Any]:
    def body(stage: Stage) -> Any:
        if stage.runs == 1:
            raise error
        return paid(stage)

    return body


def calling_itself(stage: Stage) -> Any:
    """Make the same call while it runs."""
    if stage.runs > 1:
        return "ran again"
    try:
        return {"inner": stage.again()}
    except Exception as error:  # noqa: BLE001 - it is what is looked at
        return {"inner": type(error).__name__}


def losing_its_record(stage: Stage) -> Any:
    """Finish late: another has taken over and finished before."""
    winners = {"status": "COMPLETED", "data": '"the winner\'s"', "owner": "winner", "in_progress_expiration": None}
    stage.store.change(winners)
    return "the late one's"


def losing_its_record_and_failing(stage: Stage) -> Any:
    losing_its_record(stage)
    raise LookupError


def losing_its_store(stage: Stage) -> Any:
    stage.store.fail()
    return paid(stage)


def losing_its_store_and_failing(stage: Stage) -> Any:
    stage.store.fail()
    raise LookupError


# --- Types ------------------------------------------------------------------------------------------------------------


class Currency(enum.Enum):
    EURO = "EUR"


@dataclass
class Money:
    amount: int
    currency: str = "EUR"


@dataclass
class Order:
    id: int
    money: Money


@dataclass
class Receipt:
    order: int


@dataclass
class FullReceipt:
    order: int
    money: Money


class OrderModel(pydantic.BaseModel):
    id: int
    when: datetime.date = datetime.date(2026, 1, 2)


class Card(pydantic.BaseModel):
    number: pydantic.SecretStr
    name: str = "Ada"


class ReceiptModel(pydantic.BaseModel):
    order: int
    on: datetime.date = datetime.date(2026, 1, 2)


class Wrapper:
    """As Powertools' event source data classes."""

    raw_event = {"id": 7}  # noqa: RUF012 - never changed


class OldModel:
    """As models of pydantic 1."""

    def dict(self) -> dict[str, Any]:
        return {"id": 8}


PAYLOADS: dict[str, Any] = {
    "a dataclass": Order(1, Money(2)),
    "a pydantic model": OrderModel(id=3),
    "an event wrapper": Wrapper(),
    "an object with dict()": OldModel(),
    "Decimal, dates, UUID, path and enum": {
        "decimal": decimal.Decimal("1.10"),
        "date": datetime.date(2026, 1, 2),
        "datetime": datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.UTC),
        "time": datetime.time(1, 2),
        "uuid": uuid.UUID(int=5),
        "path": pathlib.PurePosixPath("/a/b"),
        "enum": Currency.EURO,
        "nested": [Money(1), OrderModel(id=4)],
    },
    "text of many scripts": {"ä": "東京 🐙", "\x00": "\ud800"},
    "numbers": [0, -1, 2**70, 1.5, 1e300, float("nan"), float("inf"), decimal.Decimal("NaN"), True, None],
    "keys that are no strings": {1: "a", 2: "b"},
}


def receipt_without_annotation(order):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201 - that is it
    return act()


def _annotated(name: str, annotation: Any) -> Callable[..., Any]:
    """Return a function whose return annotation is no string, though annotations in this module are."""

    def function(order: Any) -> Any:
        return act()

    function.__annotations__["return"] = annotation
    function.__name__ = function.__qualname__ = name
    return function


returns_receipt = _annotated("returns_receipt", Receipt)
returns_full_receipt = _annotated("returns_full_receipt", FullReceipt)
returns_model = _annotated("returns_model", ReceiptModel)
returns_optional_model = _annotated("returns_optional_model", ReceiptModel | None)
returns_text = _annotated("returns_text", str)


def returns_receipt_in_a_string(order: Any) -> Receipt:
    receipt: Receipt = act()
    return receipt


class OwnSerializer(BaseIdempotencySerializer):
    """Written for Powertools, and handed to both."""

    def to_dict(self, data: Any) -> dict[str, Any]:
        return {"receipt": data.order}

    def from_dict(self, data: dict[str, Any]) -> Any:
        return Receipt(data["receipt"])


class OwnModelSerializer(OwnSerializer, BaseIdempotencyModelSerializer):
    """Written for Powertools, and handed to both."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def from_dict(self, data: dict[str, Any]) -> Any:
        return self.model(data["receipt"])

    @classmethod
    def instantiate(cls, model_type: Any) -> OwnModelSerializer:
        return cls(model_type)


def fields_of(receipt: Receipt) -> dict[str, Any]:
    return dataclasses.asdict(receipt)


def receipt_of(fields: dict[str, Any]) -> Receipt:
    return Receipt(**fields)


# --- More bodies, and hooks -------------------------------------------------------------------------------------------


def changing_its_payload(order: Any) -> Any:
    order["items"].append("changed")
    return act()


def marking_hook(response: Any, record: Any) -> Any:
    return response | {"replayed": True, "status": str(record.status)}


def naming_hook(response: Any, record: Any) -> Any:
    return type(response).__name__


def reading_hook(response: Any, record: Any) -> Any:
    return {
        "key": record.idempotency_key,
        "expired": record.is_expired,
        "response": record.response_json_as_dict(),
        "seconds": isinstance(int(record.expiry_timestamp), int),
    }


def keys_hook(response: Any, record: Any) -> Any:
    return [key.partition("#")[0] for key in (record.idempotency_key, record.sort_key)]


def timing_hook(response: Any, record: Any) -> Any:
    return "aware" if record.get_expiration_datetime().tzinfo else "naive"


def silent_hook(response: Any, record: Any) -> None:
    response.clear()  # every caller has an object of its own


def failing_hook(response: Any, record: Any) -> Any:
    raise LookupError
