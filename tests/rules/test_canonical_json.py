"""The canonical encoder: what it writes, what it refuses, and where it says the fault lies."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import json
import math
import subprocess
import sys
from decimal import Decimal
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any
from uuid import UUID

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aidem._rules.canonical_json import NotEncodableError, decode, encode, loaded, make_chunks, plain

Json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=20,
)


@given(Json)
def test_json_values_are_written_as_the_standard_library_writes_them(value: Any) -> None:
    assert encode(value) == json.dumps(value, sort_keys=True)


def test_where_there_is_no_encoder_in_c_the_one_in_python_writes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json.encoder, "c_make_encoder", None)
    value = {"b": [1, 2.5, None, "é"], "a": Decimal(1)}
    assert "".join(make_chunks()(value, 0)) == encode(value)


@pytest.mark.parametrize("text", [' {"a": 1}', '{"a": 1}\n', "\t1 "])
def test_white_space_around_a_value_is_read_over(text: str) -> None:
    assert decode(text) == json.loads(text)


@pytest.mark.parametrize("text", ["", " ", "{", '{"a": 1} 2', "nul", "1 2"])
def test_what_is_not_json_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="char"):
        decode(text)


@given(Json)
def test_decoding_reads_what_was_encoded(value: Any) -> None:
    assert encode(decode(encode(value))) == encode(value)


def test_every_decoded_value_is_an_object_of_its_own() -> None:
    text = encode({"items": []})
    decode(text)["items"].append(1)
    assert decode(text) == {"items": []}


class Color(enum.Enum):
    RED = "red"
    PAIR = (1, "x")


class Status(str, enum.Enum):  # noqa: UP042 - a mixed Enum of before StrEnum
    PAID = "paid"


class Level(enum.IntEnum):
    HIGH = 3


class Rate(Decimal, enum.Enum):
    FULL = "1.50"


@dataclasses.dataclass
class Point:
    x: int
    y: Any = None


class Model(pydantic.BaseModel):
    at: datetime.date
    amount: Decimal = Decimal("1.10")

    @pydantic.computed_field
    def total(self) -> int:
        return 3


class DumpOnly:
    def __repr__(self) -> str:
        return "DumpOnly()"  # names a test case: the same in every process

    def model_dump(self, mode: str) -> dict[str, str]:
        return {"mode": mode}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Decimal("1.10"), '"1.10"'),
        (Decimal("NaN"), "NaN"),
        (Decimal("sNaN"), "NaN"),
        (Decimal("-Infinity"), '"-Infinity"'),
        (math.inf, "Infinity"),
        (Color.RED, '"red"'),
        (Color.PAIR, '[1, "x"]'),
        (Status.PAID, '"paid"'),
        (Level.HIGH, "3"),
        (Rate.FULL, f'"{Rate.FULL}"'),  # a Decimal first, an Enum second, as AWS Powertools has it
        (datetime.date(2024, 3, 20), '"2024-03-20"'),
        (datetime.datetime(2024, 3, 20, 14, 30, tzinfo=datetime.UTC), '"2024-03-20T14:30:00+00:00"'),
        (datetime.time(1, 2, 3), '"01:02:03"'),
        (UUID(int=1), '"00000000-0000-0000-0000-000000000001"'),
        (PurePosixPath("/a/b"), '"/a/b"'),
        (PureWindowsPath("c:/a"), '"c:\\\\a"'),
        (Point(1, Point(2)), '{"x": 1, "y": {"x": 2, "y": null}}'),
        (Model(at=datetime.date(2024, 3, 20)), '{"amount": "1.10", "at": "2024-03-20", "total": 3}'),
        (DumpOnly(), '{"mode": "json"}'),
        ((1, [2.5, None]), "[1, [2.5, null]]"),
        ({2: "b", 1: "a"}, '{"1": "a", "2": "b"}'),
        ({Status.PAID: 1}, '{"paid": 1}'),
        ({None: 1}, '{"null": 1}'),
        ("é\u2028", '"\\u00e9\\u2028"'),
    ],
    ids=repr,
)
def test_values_that_json_does_not_know_are_replaced(value: Any, text: str) -> None:
    assert encode(value) == text
    assert encode({"a": [value]}) == f'{{"a": [{text}]}}'


class Opaque:
    pass


class Undumpable(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)
    inner: Opaque


def circular() -> Any:
    value: dict[str, Any] = {"a": []}
    value["a"].append(value)
    return value


def circular_dataclass() -> Point:
    point = Point(1)
    point.y = [point]
    return point


def deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "path", "reason"),
    [
        (b"secret", "$", "is of type bytes"),
        ({"order": {"items": [1, 2, 3, {"price": 1j}]}}, "$.order.items[3].price", "is of type complex"),
        ({"a b": {7: (1, {2})}}, '$["a b"]["7"][1]', "is of type set"),
        ({"wait": datetime.timedelta(1)}, "$.wait", "is of type timedelta"),
        (Point, "$", "is of type type"),
        ({"model": Model}, "$.model", "is of type ModelMetaclass"),
        ({"color": Color}, "$.color", "is of type EnumType"),
        (Point(1, Point(2, Opaque())), "$.y.y", "is of type Opaque"),
        (Undumpable(inner=Opaque()), "$", "is a Undumpable that cannot be dumped: PydanticSerializationError"),
        ({"a": {(1, 2): 1}}, "$.a", "has a key of type tuple"),
        ({Color.RED: 1}, "$", "has a key of type Color"),
        ({"a": {1: 1, "b": 2}}, "$.a", "has keys that cannot be sorted: they are of more than one type"),
        ({"a": [10**5000]}, "$.a[0]", "is an integer too long to print"),
        ({10**5000: 1}, "$", "is an integer too long to print"),
        (circular(), "$.a[0]", "contains itself"),
        (circular_dataclass(), "$.y[0]", "contains itself"),
        (deep(200_000), "$", "is nested too deeply"),
    ],
    ids=range(17),
)
def test_everything_else_is_refused_with_its_path(value: Any, path: str, reason: str) -> None:
    with pytest.raises(NotEncodableError) as caught:
        encode(value)
    assert (caught.value.path, caught.value.reason) == (path, reason)
    assert str(caught.value) == f"{path} {reason}"


def test_values_beside_the_fault_are_passed_over() -> None:
    fine = [
        None,
        True,
        1.5,
        "x",
        12,
        {"a": Decimal(1), "b": Color.RED},
        Model(at=datetime.date.min),
        [1, ()],
        {1.5: 1, None: 2},
    ]
    with pytest.raises(NotEncodableError, match=r"^\$\[8\] has keys"):
        encode([*fine, b"not reached"])


class Uncopyable(str):
    __slots__ = ()

    def __deepcopy__(self, memo: Any) -> str:
        raise OSError


def test_an_error_that_no_fault_in_the_data_explains_is_let_through() -> None:
    with pytest.raises(OSError, match=r"^$"):
        encode(Point(1, Uncopyable("x")))


def test_what_plain_cannot_replace_is_a_type_error() -> None:
    assert plain(UUID(int=1)) == str(UUID(int=1))
    with pytest.raises(TypeError, match="Opaque"):
        plain(Opaque())


def test_a_class_whose_module_nobody_imported_is_not_imported_to_ask_for_it() -> None:
    assert loaded("decimal", "Decimal") is Decimal
    assert loaded("a_module_that_is_not_there", "Decimal") == ()


def test_importing_keys_and_results_does_not_import_pydantic() -> None:
    modules = "aidem._rules.canonical_json, aidem._rules.key, aidem.serialization"
    code = f"import sys, {modules}; sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
