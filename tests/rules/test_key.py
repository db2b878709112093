"""Keys: the golden vectors, AWS Powertools as the oracle, and what is no key."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import functools
import hashlib
import json
import math
import os
import subprocess
import sys
from copy import deepcopy
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import UUID

import pydantic
import pytest
from aws_lambda_powertools.utilities.data_classes import SQSEvent
from aws_lambda_powertools.utilities.idempotency.base import _prepare_data
from aws_lambda_powertools.utilities.idempotency.persistence.base import BasePersistenceLayer
from hypothesis import given
from hypothesis import strategies as st

from aidem._rules import key as _key
from aidem.exceptions import IdempotencyKeyError

VECTORS: dict[str, dict[str, str]] = json.loads((Path(__file__).parents[1] / "data/golden-keys.json").read_text())[
    "vectors"
]


class E(enum.Enum):
    A = "a"
    B = 2


class SE(str, enum.Enum):  # noqa: UP042 - what the vector was made of
    P = "paid"


@dataclasses.dataclass
class DC:
    a: Any
    b: Any


VALUES: dict[str, Any] = {
    "obj_unsorted": {"b": 1, "a": [1, 2, {"z": None, "y": True}]},
    "nonascii": {"name": "café ✓ 😀"},
    "list": ["u1", 7],
    "str": "abc",
    "str_digits": "1",
    "int": 1,
    "float": 1.0,
    "float_small": 1e-07,
    "bigfloat": 1e16,
    "true": True,
    "false": False,
    "zero": 0,
    "neg_zero": -0.0,
    "nan": math.nan,
    "inf": math.inf,
    "decimal": Decimal("1.10"),
    "decimal_nan": Decimal("NaN"),
    "tuple": (1, "2"),
    "intkeys": {1: "a", 2: "b"},
    "boolkey": {True: 1},
    "datetime": datetime.datetime(2024, 3, 20, 14, 30),  # noqa: DTZ001 - what the vector was made of
    "datetime_tz": datetime.datetime(2024, 3, 20, 14, 30, tzinfo=datetime.UTC),
    "date": datetime.date(2024, 3, 20),
    "time": datetime.time(1, 2, 3),
    "uuid": UUID("12345678-1234-5678-1234-567812345678"),
    "path": PurePosixPath("/a/b"),
    "enum_str": E.A,
    "enum_int": E.B,
    "str_enum": SE.P,
    "dataclass_nested": {"d": DC(a=1, b=Decimal(2))},
    "escape": 'a"b\\c\n\u2028/<>&',
    "big_int": 2**70,
    "nested_empty": {"a": {}, "b": []},
    "bytes": b"x",
    "set": {1},
    "complex": 1j,
    "mixed_keys": {1: 1, "a": 2},
    "tuple_key": {(1, 2): 1},
    "timedelta": datetime.timedelta(days=1),
}
ACCEPTED = [
    (name, hash_function)
    for name, vector in VECTORS.items()
    for hash_function in ("md5", "sha256")
    if hash_function in vector
]


def test_every_golden_vector_has_a_value_here() -> None:
    assert VALUES.keys() == VECTORS.keys()


@pytest.mark.parametrize("name", VECTORS)
def test_the_value_is_the_one_of_the_vector(name: str) -> None:
    # The reprs of Enum members and dataclasses, and of times in UTC, name things of where the vectors were made.
    assert repr(VALUES[name]).replace("test_key.", "") == VECTORS[name]["repr"]


@pytest.mark.parametrize(("name", "hash_function"), ACCEPTED)
def test_a_golden_vector_holds(name: str, hash_function: str) -> None:
    assert _key.payload_digest(_key.prepare(VALUES[name]), hash_function) == VECTORS[name][hash_function]


@pytest.mark.parametrize("name", [name for name, vector in VECTORS.items() if "error" in vector])
def test_a_golden_error_is_refused(name: str) -> None:
    with pytest.raises(IdempotencyKeyError, match=r"^the payload cannot be a key: \$ "):
        _key.payload_digest(_key.prepare(VALUES[name]), "md5")


def test_a_refusal_names_the_path_and_what_is_allowed_and_no_value() -> None:
    with pytest.raises(IdempotencyKeyError) as caught:
        _key.payload_digest({"card": {"number": b"4111"}, "name": "Ada"}, "md5")
    message = str(caught.value)
    assert "$.card.number is of type bytes" in message
    assert "allowed are JSON values, dataclasses" in message
    assert "4111" not in message
    assert "Ada" not in message


@pytest.mark.parametrize("seed", ["0", "1", "4242"])
def test_keys_do_not_depend_on_the_hash_seed_of_the_process(seed: str) -> None:
    code = (
        "import dataclasses, aidem._rules.key as k\n"
        "C = dataclasses.make_dataclass('C', [('b', dict), ('a', list)])\n"
        "v = k.prepare(C({'z': 1, 'é': {'k': 1, 'j': 2}, 'a': None}, ['x', {'q': 1, 'p': 2}]))\n"
        "print(k.idempotency_key('f', k.payload_digest(v, 'sha256')))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": seed},
    )
    text = '{"a": ["x", {"p": 2, "q": 1}], "b": {"a": null, "z": 1, "\\u00e9": {"j": 2, "k": 1}}}'
    assert process.stdout.strip() == f"f#{hashlib.sha256(text.encode()).hexdigest()}"


# --- AWS Powertools as the oracle


class Powertools(BasePersistenceLayer):
    """Hashes as Powertools does, and stores nothing."""

    def _get_record(self, idempotency_key: Any) -> Any:
        raise NotImplementedError

    _put_record: Any = _get_record
    _update_record: Any = _get_record
    _delete_record: Any = _get_record

    def digest(self, payload: Any) -> str:
        return self._generate_hash(deepcopy(_prepare_data(payload)))


class ME(enum.IntEnum):
    N = 7


class Rate(Decimal, enum.Enum):
    HALF = "0.50"


class Item(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(serialize_by_alias=True)
    sku: str = pydantic.Field(alias="SKU")
    price: Decimal
    at: datetime.datetime | None = None

    @pydantic.computed_field
    def label(self) -> str:
        return f"{self.sku}!"


class Root(pydantic.RootModel[list[int]]):
    pass


@dataclasses.dataclass
class Dumped:
    """Within data Powertools asks for the dump first, at the top for the fields."""

    n: int

    def json(self) -> None: ...

    def model_dump(self, mode: str) -> dict[str, int]:
        return {"dumped": self.n}


@dataclasses.dataclass(frozen=True)
class Words(str):  # noqa: SLOT000 - it has a field
    """A str to the encoder, a dataclass to `asdict`."""

    n: int = 1


class Wrapper:
    def __init__(self, event: Any) -> None:
        self.raw_event = event


class OldModel:
    def __init__(self, event: Any) -> None:
        self.event = event

    def dict(self) -> Any:
        return {"event": self.event}


leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.decimals()
    | st.dates()
    | st.times()
    | st.datetimes(timezones=st.none() | st.just(datetime.UTC))
    | st.uuids()
    | st.sampled_from([E.A, E.B, SE.P, ME.N, Rate.HALF, PurePosixPath("a/b"), Path("x"), Words(), Dumped(4)])
    | st.builds(
        Item, SKU=st.text(), price=st.decimals(allow_nan=False, allow_infinity=False), at=st.none() | st.datetimes()
    )
    | st.builds(Root, st.lists(st.integers(), max_size=3))
)
inner = st.recursive(
    leaves,
    lambda children: (
        st.lists(children, max_size=4)
        | st.tuples(children, children)
        | st.dictionaries(st.text(max_size=3) | st.just(SE.P), children, max_size=4)
        | st.dictionaries(st.integers() | st.floats(allow_nan=False) | st.booleans(), children, max_size=3)
        | st.builds(DC, children, children)
    ),
    max_leaves=12,
)
payloads = inner | st.builds(Wrapper, inner) | st.builds(OldModel, inner)


@given(payloads, st.sampled_from(["md5", "sha256", "sha512", "sha3_256", "blake2b"]))
def test_keys_are_those_of_powertools(payload: Any, hash_function: str) -> None:
    powertools = Powertools()
    powertools.hash_function = getattr(hashlib, hash_function)
    assert _key.payload_digest(_key.prepare(payload), hash_function) == powertools.digest(payload)


def test_an_event_of_powertools_is_its_raw_event() -> None:
    event = SQSEvent({"Records": [{"body": "x", "n": Decimal(1)}]})
    assert _key.prepare(event) == event.raw_event
    assert _key.payload_digest(_key.prepare(event), "md5") == Powertools().digest(event)


# --- the steps, one by one


def test_a_prepared_dataclass_is_data_in_its_depth_so_that_expressions_can_select_from_it() -> None:
    assert _key.prepare(DC(DC(1, 2), [DC(3, 4)])) == {"a": {"a": 1, "b": 2}, "b": [{"a": 3, "b": 4}]}


def test_a_dataclass_with_methods_of_a_model_is_prepared_by_its_fields() -> None:
    assert _key.prepare(Dumped(4)) == {"n": 4}


def test_a_model_is_prepared_by_its_json_dump() -> None:
    assert _key.prepare(Item(SKU="a", price=Decimal(1))) == {"SKU": "a", "price": "1", "at": None, "label": "a!"}


@pytest.mark.parametrize("payload", [{"a": 1}, [1], "x", 1, None, SE.P, UUID(int=1), DC, Item], ids=repr)
def test_other_payloads_are_prepared_as_they_are(payload: Any) -> None:
    assert _key.prepare(payload) is payload


def nested(depth: int) -> list[Any]:
    return functools.reduce(lambda inner, _: [inner], range(depth), [])


class Broken:
    def model_dump(self, mode: str) -> None:
        raise OSError("secret")


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (DC(1, [open]), r"\$\.b\[0\] is of type builtin_function_or_method"),
        (Broken(), r"\$ is a Broken that cannot be dumped: OSError"),
        (DC(1, nested(10_000)), r"\$ is nested too deeply"),
    ],
    ids=["dataclass", "model", "depth"],
)
def test_a_payload_that_cannot_be_prepared_is_refused(payload: Any, reason: str) -> None:
    with pytest.raises(IdempotencyKeyError, match=f"^the payload cannot be a key: {reason}; allowed"):
        _key.payload_digest(_key.prepare(payload), "md5")


class Blank(enum.Enum):
    NONE = None
    EMPTY = ""


class Contact(pydantic.BaseModel):
    name: str | None = None
    phones: list[str] = []


def endless() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    "selected",
    [
        *(None, "", [], (), {}, set(), b"", [None], (None, None), {"a": None, "b": None}),
        *([[]], [""], [[None, None], [None, None]], {"a": {"b": [None, ""]}, "c": ({},)}, [[[[[None]]]]]),
        *(Blank.NONE, [Blank.EMPTY], [DC(None, "")], {"contact": Contact()}, [Contact(name="")]),
    ],
    ids=repr,
)
def test_nothing_is_no_key_at_any_depth(selected: Any) -> None:
    assert _key.is_missing(selected)


@pytest.mark.parametrize(
    "selected",
    [
        *(0, False, 0.0, -0.0, Decimal(0), "0", " ", [0], [None, 0], {"a": None, "b": False}, UUID(int=0)),
        *([[None, 0]], [[None], [[""], [False]]], {"a": {"b": [" "]}}, [DC(None, 0)], [Contact(phones=["1"])]),
    ],
    ids=repr,
)
def test_something_is_a_key_even_if_it_is_false(selected: Any) -> None:
    assert not _key.is_missing(selected)


@pytest.mark.parametrize(
    ("selected", "reason"),
    [
        (nested(100_000), r"\$ is nested too deeply"),
        (endless(), r"\$\[0\] contains itself"),
        ([None, Broken()], r"\$\[1\] is a Broken that cannot be dumped: OSError"),
        ({"id": object()}, r"\$\.id is of type object"),
    ],
    ids=["deep", "circular", "broken", "object"],
)
def test_what_cannot_be_looked_through_is_refused_and_not_taken_for_nothing(selected: Any, reason: str) -> None:
    with pytest.raises(IdempotencyKeyError, match=f"^the payload cannot be a key: {reason}; allowed"):
        _key.is_missing(selected)


@pytest.mark.parametrize("name", ["md5", "sha1", "sha256", "sha512_256", "SHA256", "blake2s"])
def test_a_hash_function_of_hashlib_is_allowed_and_used(name: str) -> None:
    _key.check_hash_function(name)
    assert _key.payload_digest("café", name) == hashlib.new(name, rb'"caf\u00e9"').hexdigest()


@pytest.mark.parametrize("name", ["shake_128", "shake_256", "sha257", "new", "", None])
def test_a_hash_function_without_one_length_or_existence_is_refused(name: Any) -> None:
    with pytest.raises(ValueError, match=r"^a hash of fixed length in hashlib, such as blake2b, .*, sha256") as caught:
        _key.check_hash_function(name)
    assert "shake" not in str(caught.value).partition("such as")[2]


def test_a_hash_is_declared_not_to_be_for_security(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def md5(data: bytes, *, usedforsecurity: bool) -> Any:
        asked.append(usedforsecurity)
        return hashlib.sha1(data, usedforsecurity=False)

    monkeypatch.setattr(hashlib, "md5", md5)
    _key.hash_constructor.cache_clear()
    _key.payload_digest("x", "md5")
    _key.hash_constructor.cache_clear()
    assert asked == [False]


def test_a_hash_function_is_allowed_that_is_barred_from_security_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def new(name: str, *, usedforsecurity: bool = True) -> Any:
        if usedforsecurity is not False:
            raise ValueError(f"[digital envelope routines] disabled for FIPS: {name}")
        return hashlib.md5(usedforsecurity=False)

    monkeypatch.setattr(hashlib, "new", new)
    _key.check_hash_function("md5")


def test_the_default_prefix_names_lambda_function_module_and_function() -> None:
    assert _key.default_prefix("orders", "app.main", "Handler.run") == "orders.app.main.Handler.run"


@pytest.mark.parametrize("lambda_function_name", [None, ""])
def test_the_default_prefix_outside_lambda_is_that_of_powertools(lambda_function_name: str | None) -> None:
    assert _key.default_prefix(lambda_function_name, "app", "run") == "test-func.app.run"


def test_a_key_is_prefix_and_digest() -> None:
    assert _key.idempotency_key("test-func.app.run", "abc") == "test-func.app.run#abc"
