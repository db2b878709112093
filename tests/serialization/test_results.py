"""Results: what the first call returns and a replay returns, and what happens where a result cannot be kept."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import json
import logging
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, computed_field

from aidem import DataRecord, IdempotencyConfig, RecordStatus, configure, idempotent, idempotent_function
from aidem._rules.record import OutcomeKind
from aidem.exceptions import (
    IdempotencyConfigError,
    IdempotencyModelTypeError,
    IdempotencyNoSerializationModelError,
    IdempotencyResultUnavailableError,
    IdempotencySerializationError,
    IdempotencyWarning,
)
from aidem.hooks import EventKind
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.serialization import CustomDictSerializer, DataclassSerializer, NoOpSerializer, PydanticSerializer
from tests.support.planned import Listener
from tests.support.records import put

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def layer() -> MemoryPersistenceLayer:
    return MemoryPersistenceLayer()


@pytest.fixture(autouse=True)
def defaults(layer: MemoryPersistenceLayer) -> Iterator[None]:
    configure(persistence_store=layer)
    yield
    configure()


def the_record(layer: MemoryPersistenceLayer) -> DataRecord:
    (record,) = layer.records().values()
    return record


def change(layer: MemoryPersistenceLayer, **changes: Any) -> DataRecord:
    """Change the stored record by hand, as another fleet or another deployment would have written it."""
    changed = the_record(layer).replace(**changes)
    put(layer, changed)
    return changed


def returning(result: Any, **options: Any) -> Callable[[], Any]:
    """Return a function that returns the result once, and afterwards fails the test."""
    results = [result]

    @idempotent_function(**options)
    async def function() -> Any:
        if not results:
            pytest.fail("the function ran again")
        return results.pop()

    return function


def annotated(annotation: Any, result: Any, **options: Any) -> Callable[[], Any]:
    results = [result]

    async def function() -> Any:
        if not results:
            pytest.fail("the function ran again")
        return results.pop()

    function.__annotations__["return"] = annotation
    return idempotent_function(**options)(function)


# --- Plain results ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("result", [0, 0.0, False, "", [], {}, None, 1, "text", [1, [2]], {"a": {"b": None}}], ids=repr)
async def test_a_plain_result_replays_as_itself(result: Any) -> None:
    function = returning(result)
    for _ in range(3):
        replayed = await function()
        assert replayed == result
        assert type(replayed) is type(result)


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ((1, 2), [1, 2]),
        (Decimal("1.50"), "1.50"),
        (datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC), "2026-01-02T00:00:00+00:00"),
        ({1: "a"}, {"1": "a"}),
        (RecordStatus.COMPLETED, "COMPLETED"),
    ],
    ids=repr,
)
async def test_the_first_call_returns_what_a_replay_returns(result: Any, expected: Any) -> None:
    function = returning(result)
    first, replayed = await function(), await function()
    assert first == replayed == expected
    assert type(first) is type(replayed) is type(expected)


async def test_every_call_gets_an_object_of_its_own() -> None:
    given = {"items": [1]}
    function = returning(given)
    for _ in range(3):
        result = await function()
        assert result == {"items": [1]}
        assert result is not given
        result["items"].append(2)


async def test_a_result_is_stored_as_text_by_the_encoder_of_keys(layer: MemoryPersistenceLayer) -> None:
    await returning({"b": Decimal("1.0"), "a": "ä"})()
    assert the_record(layer).response_data == '{"a": "\\u00e4", "b": "1.0"}'


async def test_what_powertools_stored_without_data_replays_as_none(layer: MemoryPersistenceLayer) -> None:
    function = returning("result")
    await function()
    change(layer, response_data=None, owner=None, fence=0)
    assert await function() is None


# --- Serializers ------------------------------------------------------------------------------------------------------


class Line(BaseModel):
    price: Decimal


class Receipt(BaseModel):
    model_config = ConfigDict(populate_by_name=True)

    number: int = Field(validation_alias="receiptNumber", serialization_alias="receiptNumber")
    at: datetime.datetime
    lines: list[Line]
    note: str | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def total(self) -> Decimal:
        return sum((line.price for line in self.lines), Decimal())


RECEIPT = Receipt(number=1, at=datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC), lines=[Line(price=Decimal("1.10"))])


@dataclass
class Part:
    price: Decimal


@dataclass
class Bill:
    number: int
    day: datetime.date
    parts: list[Part]
    main: Part | None = None


BILL = Bill(number=1, day=datetime.date(2026, 1, 2), parts=[Part(Decimal("1.10"))], main=Part(Decimal(2)))


@pytest.mark.parametrize(
    ("annotation", "result"),
    [
        (Receipt, RECEIPT),
        (Receipt | None, RECEIPT),
        (Receipt | None, None),
        (list[Receipt], [RECEIPT, RECEIPT]),
        (dict[str, Receipt], {"a": RECEIPT}),
        (Annotated[Receipt, "documented"], RECEIPT),
        ("Receipt", RECEIPT),
        ("list[Receipt | None]", [RECEIPT, None]),
        (Bill, BILL),
        (Bill | None, BILL),
        (Bill | None, None),
        (list[Bill], [BILL, BILL]),
        (dict[str, Bill], {"a": BILL}),
        ("Bill", BILL),
        ("dict[str, list[Bill]]", {"a": [BILL]}),
    ],
    ids=str,
)
async def test_models_and_dataclasses_are_rebuilt_by_the_return_annotation(annotation: Any, result: Any) -> None:
    function = annotated(annotation, result)
    for _ in range(3):
        assert await function() == result


async def test_a_model_that_is_defined_after_its_function_is_found_at_the_first_call() -> None:
    @idempotent_function
    async def function() -> DefinedLater:
        return DefinedLater(number=1)

    assert await function() == await function() == DefinedLater(number=1)


@dataclass
class DefinedLater:
    number: int


async def test_the_results_of_handlers_are_rebuilt_too() -> None:
    @idempotent
    async def handler(event: Any, context: object) -> Bill:
        return BILL

    assert await handler(1, None) == await handler(1, None) == BILL


@pytest.mark.parametrize("serializer", [PydanticSerializer, PydanticSerializer(Receipt)], ids=["class", "instance"])
async def test_an_explicit_pydantic_serializer_rebuilds_the_model(serializer: Any) -> None:
    function = annotated(Receipt, RECEIPT, output_serializer=serializer)
    assert await function() == await function() == RECEIPT


@pytest.mark.parametrize("serializer", [DataclassSerializer, DataclassSerializer(Bill)], ids=["class", "instance"])
async def test_an_explicit_dataclass_serializer_rebuilds_the_dataclass(serializer: Any) -> None:
    function = annotated("Bill", BILL, output_serializer=serializer)
    assert await function() == await function() == BILL


async def test_an_explicit_serializer_goes_before_the_annotation() -> None:
    function = annotated(
        Bill, BILL, output_serializer=CustomDictSerializer(dataclasses.asdict, lambda data: Part(data["number"]))
    )
    assert await function() == await function() == Part(1)  # type: ignore[arg-type]
    function = annotated(Bill, {"number": 1}, output_serializer=NoOpSerializer(), key_prefix="plain")
    assert await function() == await function() == {"number": 1}


@pytest.mark.parametrize(
    ("annotation", "serializer", "error"),
    [
        (Part | Bill, None, IdempotencyModelTypeError),
        (int, DataclassSerializer, IdempotencyModelTypeError),
        ("NoSuchName", PydanticSerializer, IdempotencyNoSerializationModelError),
    ],
    ids=["two dataclasses", "no dataclass", "unknown name"],
)
async def test_an_annotation_that_no_serializer_can_follow_is_refused_before_anything_runs(
    annotation: Any, serializer: Any, error: type[Exception], layer: MemoryPersistenceLayer
) -> None:
    ran: list[int] = []

    async def function() -> Any:
        ran.append(1)

    function.__annotations__["return"] = annotation
    with pytest.raises(error):
        await idempotent_function(output_serializer=serializer)(function)()
    assert ran == []
    assert not layer.records()


async def test_a_class_without_an_annotation_to_take_is_refused_before_anything_runs() -> None:
    ran: list[int] = []

    async def function():  # type: ignore[no-untyped-def]  # noqa: ANN202
        ran.append(1)

    with pytest.raises(IdempotencyNoSerializationModelError, match="return annotation"):
        await idempotent_function(output_serializer=PydanticSerializer)(function)()
    assert ran == []


# --- Results that cannot be kept --------------------------------------------------------------------------------------


class Full(MemoryPersistenceLayer):
    """A layer with a limit for the size of a record, as most servers have."""

    def complete(self, record: DataRecord, *, now: float) -> Any:
        if len(record.response_data or "") > 50:
            raise IdempotencySerializationError("the record is larger than 50 characters")
        return super().complete(record, now=now)


UNSTORABLE: list[Any] = [
    object(),
    {"body": b"secret"},
    {1: "secret", "a": 1},
    "secret" * 20,
]


@pytest.mark.parametrize("result", UNSTORABLE, ids=["object", "bytes", "mixed keys", "too large"])
async def test_a_result_that_cannot_be_kept_reaches_the_first_caller_and_nothing_runs_again(
    result: Any, caplog: pytest.LogCaptureFixture
) -> None:
    layer, listener = Full(), Listener()
    function = returning(result, persistence_store=layer, config=IdempotencyConfig(hooks=(listener,)))
    with (
        caplog.at_level(logging.INFO, "aidem"),
        pytest.warns(IdempotencyWarning, match="could not be stored") as warned,
    ):
        assert await function() == result
    assert [(record.levelname, record.name) for record in caplog.records] == [("ERROR", "aidem")]
    assert "secret" not in caplog.text + str(warned[0].message)
    for _ in range(2):
        with pytest.raises(IdempotencyResultUnavailableError) as caught:
            await function()
        assert "secret" not in str(caught.value)
    record = the_record(layer)
    assert (record.status, record.outcome) == (RecordStatus.COMPLETED, OutcomeKind.UNAVAILABLE)
    assert (caught.value.key, caught.value.record) == (record.idempotency_key, record)
    assert record.response_data is not None
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(record.response_data)  # AWS Powertools must not take it for a result
    assert listener.kinds[:3] == [EventKind.CLAIMED, EventKind.EXECUTED, EventKind.RESULT_UNAVAILABLE]
    assert sorted(listener.kinds[3:]) == sorted([EventKind.REPLAYED, EventKind.RESULT_UNAVAILABLE] * 2)


async def test_the_log_of_a_result_that_cannot_be_kept_names_the_function_and_the_place(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.warns(IdempotencyWarning, match=r"returning\.<locals>\.function"):
        await returning({"items": [{1}]})()
    assert "returning.<locals>.function" in caplog.text
    assert "$.items[0] is of type set" in caplog.text


@pytest.mark.parametrize("method", ["to_dict", "from_dict"])
async def test_a_serializer_that_fails_never_makes_the_effect_happen_again(method: str) -> None:
    def fail(_: Any) -> Any:
        raise LookupError("secret")

    directions: Any = {"to_dict": lambda data: data, "from_dict": lambda data: data} | {method: fail}
    function = returning("result", output_serializer=CustomDictSerializer(**directions))
    with pytest.warns(IdempotencyWarning, match="could not be stored"):
        assert await function() == "result"
    with pytest.raises(IdempotencyResultUnavailableError):
        await function()


async def test_a_result_of_another_type_than_annotated_is_unavailable_and_not_a_second_run() -> None:
    function = annotated(Receipt, "no receipt")
    with pytest.warns(IdempotencyWarning, match="could not be stored"):
        assert await function() == "no receipt"
    with pytest.raises(IdempotencyResultUnavailableError):
        await function()


@pytest.mark.parametrize(
    "data", ["", "{", "nonsense", "aidem:result", '{"a": 1} 2', "[" * 100_000], ids=lambda data: data[:12]
)
async def test_data_that_cannot_be_decoded_is_unavailable_and_not_a_second_run(
    data: str, layer: MemoryPersistenceLayer
) -> None:
    function = returning("secret")
    await function()
    record = change(layer, response_data=data)
    with pytest.raises(IdempotencyResultUnavailableError, match="not JSON") as caught:
        await function()
    assert caught.value.record == record
    assert the_record(layer) == record


async def test_a_model_that_changed_after_a_deployment_is_unavailable_and_not_a_second_run() -> None:
    async def function(result: Any) -> Any:
        return result

    def deployed(model: Any) -> Any:
        function.__annotations__["return"] = model
        return idempotent_function(key=lambda result: "same key", key_prefix="deployed")(function)

    class Old(BaseModel):
        number: int

    class New(BaseModel):
        number: int
        currency: str

    @dataclass
    class NewDataclass:
        number: int
        currency: str

    assert await deployed(Old)(Old(number=1234)) == Old(number=1234)
    for model in (New, NewDataclass):
        with pytest.raises(IdempotencyResultUnavailableError, match="does not fit the model") as caught:
            await deployed(model)(None)
        assert "1234" not in str(caught.value)
    assert await deployed(Old)(None) == Old(number=1234)


# --- Exceptions that are results --------------------------------------------------------------------------------------


class DeclinedError(Exception):
    def __init__(self, reason: str, code: int = 0) -> None:
        super().__init__(reason, code)
        self.reason = reason
        self.code = code


class SubclassedError(DeclinedError):
    pass


class ForgetfulError(Exception):
    """Cannot be made again: its arguments are not all handed on."""

    def __init__(self, reason: str, code: int) -> None:
        super().__init__(reason)
        self.code = code


def raising(error: BaseException, *types: type[Exception], **settings: Any) -> Callable[[], Any]:
    runs = 0

    @idempotent_function(config=IdempotencyConfig(stored_exceptions=types, **settings), key_prefix="raising")
    async def function() -> None:
        nonlocal runs
        runs += 1
        raise error

    function.runs = lambda: runs  # type: ignore[attr-defined]
    return function


async def test_a_listed_exception_is_stored_and_raised_again(layer: MemoryPersistenceLayer) -> None:
    error = DeclinedError("no funds", code=5)
    function: Any = raising(error, LookupError, DeclinedError)
    with pytest.raises(DeclinedError) as first:
        await function()
    assert first.value is error
    replays = []
    for _ in range(2):
        with pytest.raises(DeclinedError) as caught:
            await function()
        replays.append(caught.value)
    assert [(replay.reason, replay.code, replay.args) for replay in replays] == [("no funds", 5, ("no funds", 5))] * 2
    assert len({id(replay) for replay in [*replays, error]}) == 3
    assert function.runs() == 1
    record = the_record(layer)
    assert (record.status, record.outcome) == (RecordStatus.COMPLETED, OutcomeKind.EXCEPTION)
    assert record.response_data is not None
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(record.response_data)


@pytest.mark.parametrize("error", [SubclassedError("no"), ValueError("no"), KeyboardInterrupt()], ids=repr)
async def test_only_exactly_listed_types_are_outcomes_and_all_others_give_the_key_back(
    error: BaseException, layer: MemoryPersistenceLayer
) -> None:
    function: Any = raising(error, DeclinedError)
    for runs in (1, 2):
        with pytest.raises(type(error)) as caught:
            await function()
        assert caught.value is error
        assert function.runs() == runs
    assert not layer.records()


@pytest.mark.parametrize(
    "error", [ForgetfulError("secret", 5), LookupError(object()), LookupError((1, 2))], ids=range(3)
)
async def test_an_exception_that_cannot_be_made_again_is_unavailable_and_not_a_second_run(
    error: Exception, layer: MemoryPersistenceLayer, caplog: pytest.LogCaptureFixture
) -> None:
    function: Any = raising(error, type(error))
    with pytest.raises(type(error)) as caught:
        await function()
    assert caught.value is error
    assert "ERROR" in caplog.text
    assert the_record(layer).outcome is OutcomeKind.UNAVAILABLE
    with pytest.raises(IdempotencyResultUnavailableError) as refused:
        await function()
    assert "secret" not in str(refused.value) + caplog.records[0].message
    assert function.runs() == 1


async def test_an_exception_whose_type_is_not_listed_any_more_is_unavailable_and_not_a_second_run() -> None:
    with pytest.raises(DeclinedError):
        await raising(DeclinedError("secret"), DeclinedError)()
    for types in ((), (LookupError,)):
        function: Any = raising(DeclinedError("other"), *types)
        with pytest.raises(
            IdempotencyResultUnavailableError, match=r"DeclinedError; list it in stored_exceptions"
        ) as it:
            await function()
        assert "secret" not in str(it.value)
        assert function.runs() == 0


async def test_a_stored_exception_that_its_type_refuses_now_is_unavailable(layer: MemoryPersistenceLayer) -> None:
    function = raising(DeclinedError("no"), DeclinedError)
    with pytest.raises(DeclinedError):
        await function()
    change(layer, response_data=f'aidem:exception:{{"args": [], "type": "{__name__}.DeclinedError"}}')
    with pytest.raises(IdempotencyResultUnavailableError, match="cannot be rebuilt"):
        await function()


async def test_an_exception_without_data_is_unavailable(layer: MemoryPersistenceLayer) -> None:
    function = raising(DeclinedError("no"), DeclinedError)
    with pytest.raises(DeclinedError):
        await function()
    change(layer, response_data=None)
    with pytest.raises(IdempotencyResultUnavailableError):
        await function()


def test_a_base_exception_cannot_be_listed() -> None:
    types: Any = (asyncio.CancelledError,)
    with pytest.raises(IdempotencyConfigError, match="stored_exceptions"):
        IdempotencyConfig(stored_exceptions=types)


# --- The response hook ------------------------------------------------------------------------------------------------


def hooked(hook: Any, result: Any = "result") -> Callable[[], Any]:
    return returning(result, config=IdempotencyConfig(response_hook=hook))


async def test_the_response_hook_changes_what_replays_return_and_not_the_first_call(
    layer: MemoryPersistenceLayer,
) -> None:
    records: list[DataRecord] = []

    def hook(response: Any, record: DataRecord) -> Any:
        records.append(record)
        return {"was": response, "until": record.get_expiration_datetime()}

    function = hooked(hook)
    assert await function() == "result"
    assert records == []
    record = the_record(layer)
    assert await function() == {"was": "result", "until": record.get_expiration_datetime()}
    assert records == [record]
    assert record.response_json_as_dict() == "result"


async def test_an_async_response_hook_is_awaited() -> None:
    async def hook(response: Any, record: DataRecord) -> Any:
        await asyncio.sleep(0)
        return [response]

    function = hooked(hook)
    assert [await function(), await function(), await function()] == ["result", ["result"], ["result"]]


async def test_what_the_hook_answers_is_returned_also_if_it_is_none() -> None:
    function = hooked(lambda response, record: None)
    assert [await function(), await function()] == ["result", None]


async def test_the_hook_gets_the_result_as_it_was_rebuilt() -> None:
    results: list[Any] = []
    function = annotated(Bill, BILL, config=IdempotencyConfig(response_hook=lambda result, _: results.append(result)))
    await function()
    await function()
    assert results == [BILL]


async def test_a_hook_that_fails_fails_the_replay_and_nothing_runs() -> None:
    error = LookupError()

    def hook(response: Any, record: DataRecord) -> Any:
        raise error

    function = hooked(hook)
    await function()
    with pytest.raises(LookupError) as caught:
        await function()
    assert caught.value is error


async def test_a_hook_that_changes_its_response_changes_no_later_replay() -> None:
    def hook(response: Any, record: DataRecord) -> Any:
        response["replays"] += 1
        return response

    function = hooked(hook, {"replays": 0})
    await function()
    assert [await function(), await function()] == [{"replays": 1}] * 2
