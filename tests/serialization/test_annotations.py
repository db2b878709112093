"""What a return annotation promises: types of the standard library come back, and what cannot is told once."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import enum
import fractions
import functools
import os
import subprocess
import sys
import typing
from collections import abc
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, NamedTuple, NewType, TypedDict, TypeVar
from uuid import UUID

import fastapi.responses
import pydantic
import pytest
import starlette.responses
from hypothesis import given
from hypothesis import strategies as st

from aidem import configure, idempotency, idempotent, idempotent_function, sync
from aidem.exceptions import IdempotencySerializationError, IdempotencyUsageError
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.serialization import (
    CustomDictSerializer,
    DataclassSerializer,
    NoOpSerializer,
    resolve,
    round_trip,
)

if typing.TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")
Cents = NewType("Cents", int)
Amount = NewType("Amount", Decimal)


class Color(enum.Enum):
    RED = "red"
    PAIR = (1, "x")


class Level(enum.IntEnum):
    LOW = 1


class Word(enum.StrEnum):
    YES = "yes"


class Right(enum.Flag):
    READ = 1
    WRITE = 2


class Point(NamedTuple):
    x: int
    y: Decimal


Pair = collections.namedtuple("Pair", "left right")  # noqa: PYI024 - its fields have no types


class Options(TypedDict, total=False):
    until: datetime.date
    children: list[Options]


class Plain(TypedDict):
    name: str
    child: dict[str, int] | None


class Alias:
    """As a `type` statement of Python 3.12 makes one."""

    __value__: Any


JSON = Alias()
JSON.__value__ = dict[str, JSON] | list[JSON] | str | None  # type: ignore[valid-type]
Tree = Alias()
Tree.__value__ = dict[str, Tree] | list[datetime.date]  # type: ignore[valid-type]
Dates = Alias()
Dates.__value__ = list[datetime.date]

NOW = datetime.datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=datetime.UTC)
DAY = datetime.date(2026, 1, 2)


@pytest.fixture(autouse=True)
def layer() -> Iterator[MemoryPersistenceLayer]:
    layer = MemoryPersistenceLayer()
    configure(persistence_store=layer)
    yield layer
    configure()
    sync.close()


def returning(annotation: Any, result: Any = None) -> Any:
    results = [result]

    async def function() -> Any:
        return results.pop()

    function.__annotations__["return"] = annotation
    return function


def exactly(value: Any) -> Any:
    """Return a value as something that is equal only where every type in it is."""
    if isinstance(value, dict):
        return type(value), [(exactly(key), exactly(item)) for key, item in sorted(value.items(), key=repr)]
    if isinstance(value, list | tuple):
        return type(value), [exactly(item) for item in value]
    if isinstance(value, set | frozenset):
        return type(value), sorted((exactly(item) for item in value), key=repr)
    return type(value), value


@pytest.mark.parametrize(
    ("annotation", "result", "text"),
    [
        (Decimal, Decimal("1.10"), '"1.10"'),
        (datetime.datetime, NOW, '"2026-01-02T03:04:05.000678+00:00"'),
        (datetime.date, DAY, '"2026-01-02"'),
        (datetime.date, NOW, '"2026-01-02T03:04:05.000678+00:00"'),
        (datetime.time, NOW.timetz(), '"03:04:05.000678+00:00"'),
        (datetime.timedelta, datetime.timedelta(days=1, microseconds=1), '"P1DT0.000001S"'),
        (datetime.timedelta, -datetime.timedelta(microseconds=1), '"-P0DT0.000001S"'),
        (datetime.timedelta, datetime.timedelta.max, '"P999999999DT86399.999999S"'),
        (datetime.timedelta, datetime.timedelta.min, '"-P999999999DT0.000000S"'),
        (UUID, UUID(int=1), '"00000000-0000-0000-0000-000000000001"'),
        (Path, Path("/a/b"), '"/a/b"'),
        (PurePosixPath, PurePosixPath("a"), '"a"'),
        (Color, Color.PAIR, '[1, "x"]'),
        (Level, Level.LOW, "1"),
        (Word, Word.YES, '"yes"'),
        (Right, Right.READ | Right.WRITE, "3"),
        (Literal[Color.RED], Color.RED, '"red"'),
        (Point, Point(1, Decimal("2.0")), '[1, "2.0"]'),
        (Pair, Pair(1, [2]), "[1, [2]]"),
        (set[str], {"a"}, '["a"]'),
        (set[Decimal], {Decimal(1)}, '["1"]'),
        (frozenset[tuple[int, Decimal]], frozenset({(1, Decimal(2))}), '[[1, "2"]]'),
        (abc.Set[int], {1}, "[1]"),
        (bytes, b"\xff\x00", '"/wA="'),
        (bytearray, bytearray(b"\xff"), '"/w=="'),
        (tuple, (1, "x"), '[1, "x"]'),
        (tuple[int, Decimal], (1, Decimal(2)), '[1, "2"]'),
        (tuple[Decimal, ...], (Decimal(1), Decimal(2)), '["1", "2"]'),
        (tuple[()], (), "[]"),
        (Decimal | None, None, "null"),
        (Decimal | None, Decimal(1), '"1"'),
        (typing.Optional[UUID], UUID(int=1), '"00000000-0000-0000-0000-000000000001"'),  # noqa: UP045
        (Decimal | int, 1, "1"),
        (list[Decimal], [Decimal(1)], '["1"]'),
        (list[datetime.date | None], [DAY, None], '["2026-01-02", null]'),
        (dict[str, Decimal], {"a": Decimal(1)}, '{"a": "1"}'),
        (dict[str, list[UUID]], {"a": [UUID(int=1)]}, '{"a": ["00000000-0000-0000-0000-000000000001"]}'),
        (dict[int, str], {1: "a"}, '{"1": "a"}'),
        (dict[datetime.date, Decimal], {DAY: Decimal(1)}, '{"2026-01-02": "1"}'),
        (dict[bytes, int], {b"a": 1}, '{"YQ==": 1}'),
        (abc.Mapping[Color, int], {Color.RED: 1}, '{"red": 1}'),
        (abc.Sequence[Decimal], [Decimal(1)], '["1"]'),
        (Options, {"until": DAY, "children": [{"until": DAY}]}, None),
        (list[Options], [{}], "[{}]"),
        (Annotated[Decimal, "EUR"], Decimal(1), '"1"'),
        (Amount, Decimal(1), '"1"'),
        (Dates, [DAY], '["2026-01-02"]'),
        (tuple[Dates, Dates], ([DAY], [DAY]), '[["2026-01-02"], ["2026-01-02"]]'),  # type: ignore[valid-type]
        (tuple[Amount, list[Amount]], (Decimal(1), [Decimal(2)]), '["1", ["2"]]'),
        (Tree, {"a": {"b": [DAY]}, "c": [DAY]}, '{"a": {"b": ["2026-01-02"]}, "c": ["2026-01-02"]}'),
        ("Decimal", Decimal(1), '"1"'),
        ("dict[str, Decimal | None]", {"a": None}, '{"a": null}'),
    ],
    ids=range(52),
)
async def test_what_is_annotated_comes_back(
    annotation: Any, result: Any, text: str | None, layer: MemoryPersistenceLayer
) -> None:
    function = idempotent_function(returning(annotation, result))
    first, replayed = await function(), await function()
    assert exactly(first) == exactly(replayed) == exactly(result)
    (record,) = layer.records().values()
    assert text in (None, record.response_data)


@pytest.mark.parametrize(
    ("annotation", "result"),
    [
        (Decimal, 0),
        (Decimal, "no amount"),
        (dict[str, datetime.datetime], {"paid": NOW, "shipped": None, "sent": "soon"}),
        (tuple[int, Decimal], (None, Decimal(1))),
        (set[int], {"a", "b"}),
        (list[Decimal], None),
        (list[Decimal], {"error": 1}),
        (datetime.timedelta, "PT"),
        (datetime.timedelta, 5),
        (bytes, "no base64"),
        (Color, "green"),
        (Point, "none"),
        (dict[int, Decimal], {"a": Decimal(1)}),
        (Options, {"until": None}),
    ],
    ids=range(14),
)
async def test_a_value_that_is_not_what_is_annotated_comes_back_as_it_was(annotation: Any, result: Any) -> None:
    function = idempotent_function(returning(annotation, result))
    first, replayed = await function(), await function()
    assert exactly(first) == exactly(replayed) == exactly(result)


def test_a_value_of_another_length_than_annotated_is_unavailable() -> None:
    with pytest.raises(IdempotencySerializationError, match=r"\$ would be changed or lost"):
        round_trip((1, 2, 3), resolve(None, returning(tuple[int, int])))


def test_a_value_is_converted_to_what_is_annotated() -> None:
    for annotation, result, expected in ((set[int], [1], {1}), (UUID, str(UUID(int=1)), UUID(int=1))):
        assert exactly(round_trip(result, resolve(None, returning(annotation)))[1]) == exactly(expected)


@given(st.timedeltas())
def test_every_duration_comes_back_and_is_read_by_pydantic(duration: datetime.timedelta) -> None:
    text, again = round_trip(duration, resolve(None, returning(datetime.timedelta)))
    assert again == duration
    if abs(duration) < datetime.timedelta(days=999_999_999 // 2):
        assert pydantic.TypeAdapter(datetime.timedelta).validate_json(text) == duration


@dataclasses.dataclass
class Parcel:
    took: datetime.timedelta
    label: bytes
    sent: datetime.date


@dataclasses.dataclass
class Priced:
    net: Amount
    gross: Amount


def test_a_new_type_comes_back_in_every_field() -> None:
    priced = Priced(Amount(Decimal(1)), Amount(Decimal(2)))
    assert round_trip(priced, DataclassSerializer(Priced))[1] == priced


def test_durations_and_bytes_are_kept_in_dataclasses() -> None:
    parcel = Parcel(datetime.timedelta(1.5), b"\xff", NOW)
    assert round_trip(parcel, DataclassSerializer(Parcel))[1] == parcel
    for stored in ({"took": "P1D"}, {"took": "P1DT1.xS"}, {"label": "\u00e9"}, {"label": "a"}, {"sent": "2026-01-02T"}):
        with pytest.raises(IdempotencySerializationError, match="does not fit the model"):
            DataclassSerializer(Parcel).from_dict({"took": "P0DT0.000000S", "label": "", "sent": "2026-01-02"} | stored)


@pytest.mark.parametrize(
    "annotation",
    [
        int,
        str | None,
        dict[str, Any],
        dict[str, list[dict[str, int | None]]],
        list[int] | dict[str, int] | None,
        list[int] | list[str],
        abc.Mapping[str, object],
        abc.Sequence[int],
        abc.Hashable,
        object,
        Plain,
        Literal["a", 1],
        Cents,
        JSON,
        pydantic.JsonValue,
        T,
        list[T],  # type: ignore[valid-type]
        dict[str, T] | list[T],  # type: ignore[valid-type]
        typing.NoReturn,
        typing.LiteralString,
        None,
    ],
    ids=range(21),
)
def test_an_annotation_that_json_data_fits_says_nothing(annotation: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert type(resolve(None, returning(annotation))) is NoOpSerializer
    assert not caplog.records


class Unstorable(enum.Enum):
    LOCK = object()


class Speaks(typing.Protocol):
    name: str


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        (fractions.Fraction, "JSON has nothing for Fraction"),
        (list[fractions.Fraction | None], "JSON has nothing for Fraction"),
        (collections.OrderedDict[str, int], "JSON has nothing for OrderedDict"),
        (dict[str, Decimal | fractions.Fraction], "JSON has nothing for Fraction"),
        (Speaks, "JSON has nothing for Speaks"),
        (abc.Callable[[], int], "JSON has nothing for Callable"),
        (type[int], "JSON has nothing for type"),
        (datetime.date | str, "two of its members look alike"),
        (tuple[int, ...] | list[int], "two of its members look alike"),
        (dict[str, T] | Decimal, "~T cannot be rebuilt from JSON"),  # type: ignore[valid-type]
        (Unstorable, "cannot be stored as JSON"),
    ],
    ids=range(11),
)
async def test_an_annotation_that_nothing_is_rebuilt_by_is_told_once(
    annotation: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    function = returning(annotation)
    function.__qualname__ = f"function_{reason}_{annotation}"  # a name of its own: it is told once in a process
    decorated = idempotent_function(function, key_prefix="told")
    await decorated()
    for other in (function, functools.partial(function)):
        assert isinstance(resolve(None, other), NoOpSerializer)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"{function.__qualname__} does not say how results are rebuilt: " in record.getMessage()
    assert reason in record.getMessage()
    assert record.getMessage().endswith("callers get plain JSON data unless you pass an output_serializer")


async def test_a_block_goes_by_the_annotation_of_what_it_runs() -> None:
    async def price() -> Decimal:
        return Decimal("1.10")

    for _ in range(2):
        async with idempotency("price") as execution:
            assert await execution.run(price) == Decimal("1.10")


def test_blocking_functions_and_handlers_go_by_their_annotations() -> None:
    @sync.idempotent_function
    def price() -> Decimal:
        return Decimal("1.10")

    @sync.idempotent
    def handler(event: Any, context: object) -> tuple[Decimal, set[int]]:
        return Decimal(event), {1}

    assert price() == price() == Decimal("1.10")
    assert handler("1", None) == handler("1", None) == (Decimal(1), {1})


WITHOUT_PYDANTIC = """
import sys
sys.modules["pydantic"] = sys.modules["pydantic_core"] = None
import asyncio, dataclasses, datetime
from decimal import Decimal
from aidem import idempotent_function
from aidem.persistence.memory import MemoryPersistenceLayer

layer = MemoryPersistenceLayer()

@dataclasses.dataclass
class Order:
    price: Decimal
    at: datetime.datetime | None = None
    anything: object = None

def check(annotation, result):
    async def function():
        return result
    function.__annotations__["return"] = annotation
    function = idempotent_function(function, persistence_store=layer, key_prefix=f"{annotation} {result}")
    async def twice():
        return await function(), await function()
    first, replayed = asyncio.run(twice())
    assert first == replayed == result, (annotation, first, replayed)
    assert type(first) is type(replayed) is type(result)

check(Decimal, Decimal("1.10"))
check(dict[str, set[datetime.date]], {"a": {datetime.date(2026, 1, 2)}})
check(tuple[bytes, datetime.timedelta | None], (b"a", None))
check(Order, Order(Decimal(1)))
check(list[Order], [Order(Decimal(1), datetime.datetime(2026, 1, 2))])
"""


def test_annotations_are_followed_where_pydantic_is_not_installed() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_PYDANTIC], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr


def test_pydantic_is_not_imported_for_the_types_of_the_standard_library() -> None:
    code = WITHOUT_PYDANTIC.replace('sys.modules["pydantic"] = sys.modules["pydantic_core"] = None', "")
    code += "assert 'pydantic' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- HTTP responses ---------------------------------------------------------------------------------------------------

REFUSAL = r"returns a {}, and HTTP responses cannot be replayed from JSON; return the data .*IdempotentRoute"


@pytest.mark.parametrize(
    ("annotation", "name"),
    [
        (starlette.responses.Response, "Response"),
        (fastapi.responses.JSONResponse, "JSONResponse"),
        (starlette.responses.StreamingResponse | None, "StreamingResponse"),
        (dict[str, Any] | starlette.responses.RedirectResponse, "RedirectResponse"),
        (Annotated[fastapi.responses.PlainTextResponse, "documented"], "PlainTextResponse"),
        (list[starlette.responses.FileResponse], "FileResponse"),
        ("fastapi.responses.JSONResponse", "JSONResponse"),
    ],
    ids=range(7),
)
def test_a_function_that_returns_an_http_response_is_refused_when_it_is_decorated(annotation: Any, name: str) -> None:
    def blocking() -> Any: ...

    blocking.__annotations__["return"] = annotation
    for decorate, function in ((idempotent_function, returning(annotation)), (sync.idempotent_function, blocking)):
        with pytest.raises(IdempotencyUsageError, match=REFUSAL.format(name)):
            decorate(function)


def test_a_handler_that_returns_an_http_response_is_refused_when_it_is_decorated() -> None:
    async def handler(event: Any, context: object) -> starlette.responses.Response: ...  # type: ignore[empty-body]

    with pytest.raises(IdempotencyUsageError, match=REFUSAL.format("Response")):
        idempotent(handler)


async def test_a_response_whose_name_is_defined_later_is_refused_at_the_first_call_before_anything_runs(
    layer: MemoryPersistenceLayer,
) -> None:
    ran: list[int] = []

    @idempotent_function
    async def function() -> LaterResponse:  # type: ignore[name-defined] # noqa: F821
        ran.append(1)

    globals()["LaterResponse"] = starlette.responses.JSONResponse
    try:
        with pytest.raises(IdempotencyUsageError, match=REFUSAL.format("JSONResponse")):
            await function()
    finally:
        del globals()["LaterResponse"]
    assert not ran
    assert not layer.records()


async def test_a_block_refuses_to_run_a_function_that_returns_an_http_response() -> None:
    ran: list[int] = []

    async def respond() -> starlette.responses.Response:
        ran.append(1)
        return starlette.responses.Response()

    async with idempotency("respond") as execution:
        with pytest.raises(IdempotencyUsageError, match=REFUSAL.format("Response")):
            await execution.run(respond)
        execution.result = None
    assert not ran


async def test_a_serializer_of_the_users_own_may_keep_responses() -> None:
    keeps = CustomDictSerializer(lambda response: response.body.decode(), starlette.responses.Response)
    function = idempotent_function(
        returning(starlette.responses.Response, starlette.responses.Response("paid")), output_serializer=keeps
    )
    for _ in range(2):
        assert (await function()).body == b"paid"
