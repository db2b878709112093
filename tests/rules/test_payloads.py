"""From an event to a key, through the fronts: what is a key, what is none, what is compared, what is refused."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import enum
import gzip
import hashlib
import json
import pathlib
import tracemalloc
import uuid
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest
from jmespath.functions import Functions, signature
from pydantic import BaseModel

from aidem import IdempotencyConfig, RecordStatus, configure, idempotency, idempotent, idempotent_function
from aidem.exceptions import (
    IdempotencyAlreadyInProgressError,
    IdempotencyConfigError,
    IdempotencyKeyError,
    IdempotencyValidationError,
    IdempotencyWarning,
)
from aidem.persistence.memory import MemoryPersistenceLayer
from tests.support.records import put

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aidem import DataRecord


@pytest.fixture
def layer() -> MemoryPersistenceLayer:
    return MemoryPersistenceLayer()


@pytest.fixture(autouse=True)
def defaults(layer: MemoryPersistenceLayer) -> Iterator[None]:
    configure(persistence_store=layer)
    yield
    configure()


def stored(layer: MemoryPersistenceLayer) -> list[DataRecord]:
    return list(layer.records().values())


class Charger:
    """Counts its runs, behind each of the decorators that take a payload."""

    def __init__(self, **settings: Any) -> None:
        config = IdempotencyConfig(**settings)
        self.runs = 0
        self.by_event = idempotent(config=config, key_prefix="charge")(self._handle)
        self.by_argument = idempotent_function(data_keyword_argument="order", config=config, key_prefix="charge")(
            self._charge
        )

    async def _handle(self, event: Any, context: object) -> int:
        return await self._charge(event)

    async def _charge(self, order: Any) -> int:
        self.runs += 1
        return self.runs

    async def __call__(self, order: Any) -> int:
        return await self.by_event(order, None)


@dataclasses.dataclass
class Order:
    id: int
    amount: int = 0


class OrderModel(BaseModel):
    id: int
    amount: int = 0


class LegacyModel:
    def dict(self) -> Any:
        return {"id": 1, "amount": 0}


class Wrapper:
    raw_event = {"id": 1, "amount": 0}  # noqa: RUF012 - as event wrappers are written


# --- The key ----------------------------------------------------------------------------------------------------------


async def test_the_key_is_the_prefix_and_the_hash_of_the_whole_payload(layer: MemoryPersistenceLayer) -> None:
    await Charger()({"b": 1, "a": "ä"})
    (record,) = stored(layer)
    assert record.idempotency_key == "charge#" + hashlib.sha256(b'{"a": "\\u00e4", "b": 1}').hexdigest()


async def test_the_hash_function_of_the_config_makes_the_key(layer: MemoryPersistenceLayer) -> None:
    await Charger(hash_function="md5")({"id": 1})
    (record,) = stored(layer)
    digest = hashlib.md5(b'{"id": 1}', usedforsecurity=False).hexdigest()
    assert record.idempotency_key == f"charge#{digest}"


@pytest.mark.parametrize(
    "payload", [Order(1), OrderModel(id=1), LegacyModel(), Wrapper(), {"amount": 0, "id": 1}], ids=type
)
@pytest.mark.parametrize("expression", ["", "id", "[id, amount]"])
async def test_payloads_of_every_kind_with_the_same_data_have_the_same_key(payload: Any, expression: str) -> None:
    charge = Charger(event_key_jmespath=expression)
    assert await charge({"id": 1, "amount": 0}) == 1
    assert await charge(payload) == await charge.by_argument(payload) == await charge.by_argument(order=payload) == 1


async def test_values_that_json_does_not_know_are_keys(layer: MemoryPersistenceLayer) -> None:
    class Color(enum.Enum):
        RED = "red"

    payload = {
        "decimal": Decimal("1.50"),
        "date": datetime.date(2026, 1, 2),
        "datetime": datetime.datetime(2026, 1, 2, 3, tzinfo=datetime.UTC),
        "time": datetime.time(3, 4),
        "uuid": uuid.UUID(int=1),
        "path": pathlib.PurePosixPath("/tmp"),
        "enum": Color.RED,
        "dataclass": Order(1),
        "model": OrderModel(id=2),
    }
    charge = Charger()
    assert await charge(payload) == await charge(dict(reversed(payload.items()))) == 1
    assert len(stored(layer)) == 1


async def test_an_expression_of_several_fields_selects_the_key() -> None:
    charge = Charger(event_key_jmespath="[user, id]")
    orders = [{"user": "a", "id": 1, "at": at} for at in (1, 2)] + [{"user": "b", "id": 1}]
    assert [await charge(order) for order in orders] == [1, 1, 2]


async def test_the_built_in_functions_reach_into_strings() -> None:
    event = json.dumps({"id": 7})
    forms = {
        "powertools_json(body).id": event,
        "powertools_json(powertools_base64(body)).id": base64.b64encode(event.encode()).decode(),
        "powertools_json(powertools_base64_gzip(body)).id": base64.b64encode(gzip.compress(event.encode())).decode(),
    }
    runs = [await Charger(event_key_jmespath=expression)({"body": body}) for expression, body in forms.items()]
    assert runs == [1, 1, 1]


async def test_options_of_jmespath_replace_the_built_in_functions_of_both_expressions() -> None:
    class MyFunctions(Functions):
        @signature({"types": ["string"]})
        def _func_lower(self, text: str) -> str:
            return text.lower()

    options = {"custom_functions": MyFunctions()}
    charge = Charger(
        event_key_jmespath="lower(id)", payload_validation_jmespath="lower(shop)", jmespath_options=options
    )
    assert await charge({"id": "A", "shop": "X"}) == await charge({"id": "a", "shop": "x"}) == 1
    with pytest.raises(IdempotencyValidationError):
        await charge({"id": "a", "shop": "y"})
    with pytest.raises(IdempotencyConfigError, match=r"no function powertools_json\(\)"):
        Charger(event_key_jmespath="powertools_json(id)", jmespath_options=options)


def packed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode())).decode()


@pytest.mark.parametrize("setting", ["event_key_jmespath", "payload_validation_jmespath"])
async def test_a_small_event_that_would_inflate_to_gigabytes_of_objects_is_refused_before_it_does(
    setting: str, layer: MemoryPersistenceLayer
) -> None:
    charge = Charger(**{setting: "powertools_json(powertools_base64_gzip(body))"})
    event = {"body": packed("[" + "{}," * (21 * 1024**2) + "1]")}
    assert len(event["body"]) < 100 * 1024
    tracemalloc.start()
    try:
        with pytest.raises(IdempotencyKeyError, match="to more than max_inflated_bytes=4194304"):
            await charge(event)
        assert tracemalloc.get_traced_memory()[1] < 32 * 1024**2
    finally:
        tracemalloc.stop()
    assert charge.runs == 0
    assert stored(layer) == []


async def test_the_bound_of_what_a_payload_inflates_to_can_be_set() -> None:
    expression = "powertools_json(powertools_base64_gzip(body)).id"
    event = {"body": packed('{"id": 1, "text": "' + "a" * 5 * 1024**2 + '"}')}
    with pytest.raises(IdempotencyKeyError, match="max_inflated_bytes"):
        await Charger(event_key_jmespath=expression)(event)
    charge = Charger(event_key_jmespath=expression, max_inflated_bytes=6 * 1024**2)
    assert await charge(event) == await charge(event) == 1


# --- No key -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "payload",
    [None, "", [], {}, (), [None, None], {"id": None}, (None,), [[None, ""], {"ids": [[]]}]],
    ids=repr,
)
async def test_without_a_key_every_call_runs_nothing_is_stored_and_a_warning_says_so(payload: Any, layer: Any) -> None:
    charge = Charger()
    for expected in (1, 2):
        with pytest.warns(IdempotencyWarning, match="no idempotency key was found.*without idempotency"):
            assert await charge(payload) == expected
    with pytest.warns(IdempotencyWarning, match="no idempotency key was found"):
        assert await charge.by_argument(payload) == 3
    assert stored(layer) == []


@pytest.mark.parametrize(
    "expression",
    [
        *(
            "id",
            "[id]",
            "{id: id}",
            "[id, shop]",
            "[[id], {shop: [shop]}]",
            "items[].[id, shop.name]",
            "items[*].{id: id}",
        ),
        "[items[].id, length(id || '') == `0` && id]",
    ],
)
async def test_an_expression_that_selects_nothing_is_no_key(expression: str, layer: MemoryPersistenceLayer) -> None:
    charge = Charger(event_key_jmespath=expression)
    with pytest.warns(IdempotencyWarning) as warned:
        assert await charge({"other": 1, "items": [{"at": 1}, {"at": 2}]}) == 1
    assert repr(expression) in str(warned[0].message)
    assert stored(layer) == []


async def test_one_field_of_several_is_a_key() -> None:
    charge = Charger(event_key_jmespath="[id, shop]")
    assert await charge({"id": 1}) == await charge({"id": 1, "at": 2}) == 1


@pytest.mark.parametrize("falsy", [0, False, 0.0])
async def test_zero_and_false_are_keys(falsy: Any) -> None:
    charge = Charger(event_key_jmespath="id", raise_on_no_idempotency_key=True)
    assert await charge({"id": falsy}) == await charge({"id": falsy}) == 1


@pytest.mark.parametrize("payload", [{"other": 1}, {"id": ""}, {"id": None}])
async def test_a_key_that_is_demanded_and_missing_is_an_error_and_nothing_runs(payload: Any, layer: Any) -> None:
    charge = Charger(event_key_jmespath="id", raise_on_no_idempotency_key=True)
    for call in (charge, charge.by_argument):
        with pytest.raises(IdempotencyKeyError, match="event_key_jmespath='id'"):
            await call(payload)
    assert charge.runs == 0
    assert stored(layer) == []


# --- What cannot be a key ---------------------------------------------------------------------------------------------


def circular() -> Any:
    node: dict[str, Any] = {}
    node["next"] = [node]
    return {"node": node}


def deep() -> Any:
    value: Any = "secret"
    for _ in range(100_000):
        value = [value]
    return value


class BrokenModel:
    def model_dump(self, *, mode: str) -> Any:
        raise LookupError("secret")


@pytest.mark.parametrize(
    ("payload", "place"),
    [
        ({"order": {"items": [1, b"secret"]}}, r"\$\.order\.items\[1\] is of type bytes"),
        ({"order id": {"secret"}}, r'\$\["order id"\] is of type set'),
        (circular(), r"\$\.node\.next\[0\] contains itself"),
        ({1: "secret", "a": 1}, r"\$ has keys that cannot be sorted"),
        ({("a", 1): "secret"}, r"\$ has a key of type tuple"),
        (deep(), "nested too deeply"),
        (BrokenModel(), r"\$ is a BrokenModel that cannot be dumped"),
        ({"order": BrokenModel()}, r"\$\.order is a BrokenModel that cannot be dumped"),
        (object(), r"\$ is of type object"),
        (10**5000, r"\$ is an integer too long to print"),
    ],
    ids=["bytes", "set", "circular", "mixed keys", "tuple key", "deep", "broken", "broken inside", "object", "integer"],
)
async def test_a_payload_that_cannot_be_hashed_is_refused_with_its_path_nothing_is_stored_and_nothing_runs(
    payload: Any, place: str, layer: MemoryPersistenceLayer
) -> None:
    charge = Charger()
    for call in (charge, charge.by_argument):
        with pytest.raises(IdempotencyKeyError, match=place) as caught:
            await call(payload)
        assert "secret" not in str(caught.value)
    assert charge.runs == 0
    assert stored(layer) == []


async def test_only_what_the_expression_selects_needs_to_be_hashable() -> None:
    charge = Charger(event_key_jmespath="id")
    assert await charge({"id": 1, "stream": object()}) == await charge({"id": 1, "stream": object()}) == 1


@pytest.mark.parametrize("setting", ["event_key_jmespath", "payload_validation_jmespath"])
@pytest.mark.parametrize("body", ["{'secret'", 3, None])
async def test_an_expression_that_fails_on_the_payload_is_refused_and_nothing_runs(
    setting: str, body: Any, layer: MemoryPersistenceLayer
) -> None:
    charge = Charger(**{setting: "powertools_json(body)"})
    with pytest.raises(IdempotencyKeyError, match=r"powertools_json\(body\)") as caught:
        await charge({"id": 1, "body": body})
    assert "secret" not in str(caught.value)
    assert charge.runs == 0
    assert stored(layer) == []


async def test_a_payload_is_fixed_when_the_call_starts_and_not_when_it_is_made() -> None:
    charge = Charger()
    order = {"id": 1}
    call = charge(order)
    order["id"] = 2
    await call
    assert await charge({"id": 2}) == 1
    assert charge.runs == 1


# --- Validation -------------------------------------------------------------------------------------------------------


async def test_the_validated_part_must_not_change_under_one_key(layer: MemoryPersistenceLayer) -> None:
    charge = Charger(event_key_jmespath="id", payload_validation_jmespath="amount")
    assert await charge({"id": 1, "amount": 5, "at": 1}) == await charge({"id": 1, "amount": 5, "at": 2}) == 1
    with pytest.raises(IdempotencyValidationError) as caught:
        await charge({"id": 1, "amount": 6666})
    (record,) = stored(layer)
    assert caught.value.record == record
    assert caught.value.key == record.idempotency_key
    assert "6666" not in str(caught.value)
    assert record.payload_hash == hashlib.sha256(b"5").hexdigest()
    assert charge.runs == 1


async def test_a_validated_part_that_is_missing_is_a_part_too(layer: MemoryPersistenceLayer) -> None:
    charge = Charger(event_key_jmespath="id", payload_validation_jmespath="amount")
    await charge({"id": 1})
    assert stored(layer)[0].payload_hash == hashlib.sha256(b"null").hexdigest()
    with pytest.raises(IdempotencyValidationError):
        await charge({"id": 1, "amount": 5})


async def test_all_arguments_are_validated_too(layer: MemoryPersistenceLayer) -> None:
    config = IdempotencyConfig(event_key_jmespath="id", payload_validation_jmespath="amount")

    @idempotent_function(config=config)
    async def charge(id: int, amount: int) -> int:  # noqa: A002 - the name is what matters
        return amount

    assert await charge(1, 5) == await charge(id=1, amount=5) == 5
    with pytest.raises(IdempotencyValidationError):
        await charge(1, 6)


async def test_without_a_key_expression_the_validated_part_of_all_arguments_is_recorded(layer: Any) -> None:
    @idempotent_function(config=IdempotencyConfig(payload_validation_jmespath="amount"))
    async def charge(amount: int) -> None: ...

    await charge(5)
    assert stored(layer)[0].payload_hash == hashlib.sha256(b"5").hexdigest()


async def test_without_validation_no_hash_is_stored_and_none_is_compared(layer: MemoryPersistenceLayer) -> None:
    charge = Charger(event_key_jmespath="id")
    validating = Charger(event_key_jmespath="id", payload_validation_jmespath="amount")
    await charge({"id": 1, "amount": 5})
    assert stored(layer)[0].payload_hash == ""
    assert await validating({"id": 1, "amount": 6}) == 1
    assert validating.runs == 0


async def test_the_payload_is_compared_while_the_first_execution_is_running(layer: MemoryPersistenceLayer) -> None:
    charge = Charger(event_key_jmespath="id", payload_validation_jmespath="amount")
    await charge({"id": 1, "amount": 5})
    (record,) = stored(layer)
    changed = record.replace(
        status=RecordStatus.INPROGRESS,
        response_data=None,
        in_progress_expiry_timestamp=int((layer.clock() + 30) * 1000),
    )
    put(layer, changed)
    with pytest.raises(IdempotencyAlreadyInProgressError):
        await charge({"id": 1, "amount": 5})
    with pytest.raises(IdempotencyValidationError):
        await charge({"id": 1, "amount": 6})


async def test_nested_blocks_and_functions_validate_each_their_own_payload() -> None:
    charge = Charger(event_key_jmespath="id", payload_validation_jmespath="amount")
    async with idempotency(1, payload="a") as execution:
        assert await execution.run(charge, {"id": 1, "amount": 5}) == 1
    async with idempotency(1, payload="a") as execution:
        assert execution.result == 1
    assert await charge({"id": 1, "amount": 5}) == 1
