"""Results and errors as text, and back."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import enum
import functools
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from decimal import Decimal
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Literal, NamedTuple, NewType, TypedDict, TypeVar
from uuid import UUID

import pydantic
import pydantic.dataclasses
import pytest
from aws_lambda_powertools.utilities.idempotency.serialization.dataclass import (
    DataclassSerializer as PowertoolsDataclassSerializer,
)
from aws_lambda_powertools.utilities.idempotency.serialization.pydantic import (
    PydanticSerializer as PowertoolsPydanticSerializer,
)
from hypothesis import given
from hypothesis import strategies as st

from aidem._rules.canonical_json import encode
from aidem.exceptions import (
    IdempotencyModelTypeError,
    IdempotencyNoSerializationModelError,
    IdempotencySerializationError,
    IdempotencyUsageError,
    IdempotencyValidationError,
)
from aidem.serialization import (
    UNAVAILABLE_TEXT,
    CustomDictSerializer,
    DataclassSerializer,
    ModelSerializer,
    NoOpSerializer,
    OutputSerializer,
    PydanticSerializer,
    exception_from_text,
    exception_text,
    resolve,
    result_from_text,
    result_text,
)

if TYPE_CHECKING:
    from decimal import Context as OnlyForTypeCheckers

T = TypeVar("T")
ZERO = UUID(int=0)


def replayed(result: Any, serializer: OutputSerializer) -> Any:
    return result_from_text(result_text(result, serializer), serializer)


def refusal(call: Callable[..., Any], *args: Any) -> str:
    """Return the message of a refusal, having made sure that nothing a log would show holds a value."""
    with pytest.raises(IdempotencySerializationError) as caught:
        call(*args)
    shown: BaseException | None = caught.value
    while shown is not None:
        assert "secret" not in str(shown)
        shown = shown.__cause__ or (None if shown.__suppress_context__ else shown.__context__)
    return str(caught.value)


# --- plain results


@pytest.mark.parametrize("result", [0, False, "", [], {}, None, 0.0, "null", "x", [None], {"a": [1, 2.5]}], ids=repr)
def test_a_plain_result_replays_as_itself(result: Any) -> None:
    again = replayed(result, NoOpSerializer())
    assert again == result
    assert type(again) is type(result)


def test_none_is_stored_as_null_without_asking_the_serializer() -> None:
    nobody = CustomDictSerializer(to_dict=refuse_to_be_called, from_dict=refuse_to_be_called)
    assert result_text(None, nobody) == "null"
    assert result_from_text("null", nobody) is None


def refuse_to_be_called(_: Any) -> Any:
    raise AssertionError


@pytest.mark.parametrize("result", [0, False, "", [], {}], ids=repr)
def test_a_falsy_result_goes_through_the_serializer(result: Any) -> None:
    serializer = CustomDictSerializer(to_dict=lambda data: [data], from_dict=lambda data: (data[0], "rebuilt"))
    assert replayed(result, serializer) == (result, "rebuilt")


def test_a_result_is_stored_by_the_encoder_of_keys() -> None:
    assert result_text({"b": Decimal("1.10"), "a": UUID(int=1)}, NoOpSerializer()) == (
        '{"a": "00000000-0000-0000-0000-000000000001", "b": "1.10"}'
    )


def test_every_replay_gets_an_object_of_its_own() -> None:
    text = result_text({"items": []}, NoOpSerializer())
    result_from_text(text, NoOpSerializer())["items"].append(1)
    assert result_from_text(text, NoOpSerializer()) == {"items": []}


def test_a_result_that_cannot_be_encoded_is_refused_with_its_path() -> None:
    message = refusal(result_text, {"order": ["secret", {1}]}, NoOpSerializer())
    assert message.startswith("the result cannot be stored: $.order[1] is of type set; allowed are JSON values")


def fail(_: Any) -> Any:
    raise LookupError("no value here")


def test_a_serializer_that_fails_is_named_with_the_type_of_its_error() -> None:
    broken = CustomDictSerializer(to_dict=fail, from_dict=fail)
    assert refusal(result_text, 1, broken) == "CustomDictSerializer.to_dict() raised LookupError"
    assert refusal(result_from_text, "1", broken) == "CustomDictSerializer.from_dict() raised LookupError"


def test_what_is_no_exception_leaves_a_serializer_as_it_is() -> None:
    def interrupt(_: Any) -> Any:
        raise KeyboardInterrupt

    broken = CustomDictSerializer(to_dict=interrupt, from_dict=interrupt)
    with pytest.raises(KeyboardInterrupt):
        result_text(1, broken)
    with pytest.raises(KeyboardInterrupt):
        result_from_text("1", broken)


@pytest.mark.parametrize("text", ["", "{", "aidem:unavailable", "[" * 200_000, "1" * 5000], ids=range(5))
def test_stored_text_that_is_not_json_is_refused(text: str) -> None:
    assert refusal(result_from_text, text, NoOpSerializer()).startswith("the stored result is not JSON: ")


def test_a_refusal_of_the_serializer_itself_is_kept() -> None:
    own = IdempotencySerializationError("mine")

    def refuse(_: Any) -> Any:
        raise own

    broken = CustomDictSerializer(to_dict=refuse, from_dict=refuse)
    for call in (lambda: result_text(1, broken), lambda: result_from_text("1", broken)):
        with pytest.raises(IdempotencySerializationError) as caught:
            call()
        assert caught.value is own


# --- pydantic


class Line(pydantic.BaseModel):
    sku: str = pydantic.Field(alias="articleNumber")
    price: Decimal


class Receipt(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(serialize_by_alias=True)
    lines: list[Line] = pydantic.Field(alias="receiptLines")
    at: datetime.datetime
    parent: Receipt | None = None

    @pydantic.computed_field
    def total(self) -> Decimal:
        return sum((line.price for line in self.lines), Decimal(0))


class Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64")
    blob: bytes
    tags: set[str]
    wait: datetime.timedelta

    @pydantic.computed_field
    def size(self) -> int:
        return len(self.blob)


@pydantic.dataclasses.dataclass
class Checked:
    amount: int = pydantic.Field(alias="AMOUNT")


NOW = datetime.datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=datetime.UTC)
LINE = Line(articleNumber="a-1", price=Decimal("1.10"))
RECEIPT = Receipt(receiptLines=[LINE, LINE], at=NOW, parent=Receipt(receiptLines=[], at=NOW))
STRICT = Strict(blob=b"\xff\x00", tags={"a", "b"}, wait=datetime.timedelta(seconds=1.5))


@pytest.mark.parametrize(
    ("annotation", "result"),
    [
        (Receipt, RECEIPT),
        (Receipt | None, RECEIPT),
        (list[Receipt], [RECEIPT]),
        (dict[str, Line], {"x": LINE}),
        (tuple[Line, int], (LINE, 1)),
        (Strict, STRICT),
        (Line | Strict, STRICT),
        (Checked, Checked(AMOUNT=3)),
        (list[datetime.date], [NOW.date()]),
    ],
    ids=str,
)
def test_pydantic_results_survive_with_aliases_computed_fields_and_nested_models(annotation: Any, result: Any) -> None:
    again = replayed(result, PydanticSerializer(annotation))
    assert again == result
    assert type(again) is type(result)


def test_models_are_stored_by_field_name_and_without_computed_fields() -> None:
    assert PydanticSerializer(Receipt).to_dict(Receipt(receiptLines=[LINE], at=NOW)) == {
        "lines": [{"sku": "a-1", "price": "1.10"}],
        "at": "2026-01-02T03:04:05.000678Z",
        "parent": None,
    }


def test_what_powertools_stored_of_a_model_is_rebuilt() -> None:
    stored = encode(PowertoolsPydanticSerializer(Receipt).to_dict(RECEIPT))
    assert '"receiptLines"' in stored
    assert '"total"' in stored
    assert result_from_text(stored, PydanticSerializer(Receipt)) == RECEIPT


class ByNameOnly(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(validate_by_alias=False, validate_by_name=True, serialize_by_alias=True)
    a: int = pydantic.Field(alias="A")


def test_names_and_aliases_are_read_whatever_the_model_says() -> None:
    stored = PowertoolsPydanticSerializer(ByNameOnly).to_dict(ByNameOnly.model_validate({"a": 1}))
    assert stored == {"A": 1}
    assert PydanticSerializer(ByNameOnly).from_dict(stored) == ByNameOnly.model_validate({"a": 1})
    assert PydanticSerializer(Line).from_dict({"sku": "a-1", "price": "1.10"}) == LINE


def test_a_result_of_another_type_is_stored_if_it_fits_the_model() -> None:
    again = replayed({"sku": "a-1", "price": "1.10"}, PydanticSerializer(Line))
    assert again == LINE


def test_what_does_not_fit_the_model_is_named_by_place_and_kind() -> None:
    data = {"lines": [{"sku": "x", "price": "secret"}, {"sku": 1}], "at": "secret"}
    assert refusal(PydanticSerializer(Receipt).from_dict, data) == (
        "the stored result does not fit the model: $.lines.0.price (decimal_parsing), "
        "$.lines.1.sku (string_type), $.lines.1.price (missing), $.at (datetime_from_date_parsing)"
    )


def test_of_many_faults_the_first_are_named() -> None:
    message = refusal(PydanticSerializer(list[int]).from_dict, ["secret"] * 6)
    assert message.endswith("$.4 (int_parsing), …")


class Unfinished(pydantic.BaseModel):
    of: OnlyForTypeCheckers


@pytest.mark.parametrize("annotation", [object(), threading_like := type("Lock", (), {}), Unfinished], ids=range(3))
def test_an_annotation_that_pydantic_cannot_handle_is_refused_when_the_serializer_is_made(annotation: Any) -> None:
    with pytest.raises(IdempotencyModelTypeError, match=r"^PydanticSerializer cannot handle .*; use a pydantic model"):
        PydanticSerializer(annotation)


def test_without_pydantic_one_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydantic", None)
    with pytest.raises(IdempotencyUsageError, match=r"needs pydantic: install aidem-idempotency\[pydantic\],"):
        PydanticSerializer(Receipt)


# --- dataclasses


class Color(enum.Enum):
    RED = "red"
    PAIR = (1, "x")
    EXACT = Decimal("1.5")


class Permission(enum.Flag):
    READ = enum.auto()
    WRITE = enum.auto()


class Size(NamedTuple):
    width: int
    unit: Color


class Options(TypedDict, total=False):
    color: typing.Required[Color]
    until: datetime.date


Cents = NewType("Cents", int)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    street: str
    id: UUID = ZERO


@dataclasses.dataclass
class Node:
    name: str
    children: list[Node] = dataclasses.field(default_factory=list)
    by_name: dict[str, Node] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Page(Generic[T]):
    items: list[T]
    first: T
    rest: Page[T] | None = None


@dataclasses.dataclass
class Everything:
    address: Address
    maybe: Address | None
    many: list[Address]
    pair: tuple[Address, int]
    row: tuple[Decimal, ...]
    bag: set[UUID]
    frozen: frozenset[Address]
    abstract: Sequence[Decimal]
    abstract_set: AbstractSet[int]
    by_id: Mapping[UUID, Address]
    by_number: dict[int, Decimal]
    by_color: dict[Color, int]
    by_day: dict[datetime.date | None, int]
    color: Color
    colors: list[Color]
    permission: Permission
    amount: Decimal
    nan_or_amount: Decimal | None
    path: PurePosixPath
    at: datetime.datetime
    day: datetime.date
    hour: datetime.time
    size: Size
    options: Options
    model: Receipt
    any_model: Line | Strict
    checked: Checked
    page: Page[Address]
    literal: Literal["a", 1]
    union: bool | float | str | Literal[1] | list[Address] | None
    annotated: Annotated[Decimal, "EUR"]
    cents: Cents
    number: float
    anything: Any
    bare: list
    bare_dict: dict
    bare_tuple: tuple
    unit: Decimal | int


def everything(**changes: Any) -> Everything:
    address = Address(street="s", id=UUID(int=1))
    values: dict[str, Any] = {
        "address": address,
        "maybe": None,
        "many": [address, address],
        "pair": (address, 1),
        "row": (Decimal(1), Decimal("2.0")),
        "bag": {UUID(int=1), UUID(int=2)},
        "frozen": frozenset({address}),
        "abstract": [Decimal(1)],
        "abstract_set": {1, 2},
        "by_id": {UUID(int=3): address},
        "by_number": {1: Decimal(1), -2: Decimal(2)},
        "by_color": {Color.RED: 1},
        "by_day": {NOW.date(): 1},
        "color": Color.PAIR,
        "colors": [Color.RED, Color.EXACT],
        "permission": Permission.READ | Permission.WRITE,
        "amount": Decimal("-Infinity"),
        "nan_or_amount": Decimal("0.10"),
        "path": PurePosixPath("/a"),
        "at": NOW,
        "day": NOW.date(),
        "hour": NOW.time(),
        "size": Size(1, Color.RED),
        "options": {"color": Color.PAIR, "until": NOW.date()},
        "model": RECEIPT,
        "any_model": STRICT,
        "checked": Checked(AMOUNT=3),
        "page": Page([address], address, Page([], address)),
        "literal": "a",
        "union": [address],
        "annotated": Decimal(7),
        "cents": Cents(5),
        "number": 1,
        "anything": {"a": [1, None]},
        "bare": [1],
        "bare_dict": {"a": 1},
        "bare_tuple": (1, "x"),
        "unit": 3,
    }
    return Everything(**{**values, **changes})


def test_a_dataclass_is_rebuilt_with_everything_in_it() -> None:
    result = everything()
    assert replayed(result, DataclassSerializer(Everything)) == result


@pytest.mark.parametrize(
    "changes",
    [
        {"maybe": Address(street="x")},
        {"union": 1},
        {"union": 2},
        {"union": "y"},
        {"union": None},
        {"unit": Decimal("1.5")},
        {"literal": 1},
        {"by_day": {None: 1}},
        {"nan_or_amount": None},
        {"options": {"color": Color.RED}},
        {"number": 1.5},
        {"anything": None},
    ],
    ids=str,
)
def test_a_dataclass_is_rebuilt_with_other_values_in_it(changes: dict[str, Any]) -> None:
    result = everything(**changes)
    assert replayed(result, DataclassSerializer(Everything)) == result


def test_a_decimal_nan_is_rebuilt_as_a_decimal() -> None:
    again = replayed(everything(nan_or_amount=Decimal("NaN")), DataclassSerializer(Everything))
    assert isinstance(again.nan_or_amount, Decimal)
    assert again.nan_or_amount.is_nan()


nodes = st.recursive(
    st.builds(Node, st.text()),
    lambda children: st.builds(Node, st.text(), st.lists(children, max_size=3), st.dictionaries(st.text(), children)),
    max_leaves=8,
)


@given(nodes)
def test_a_dataclass_that_contains_itself_is_rebuilt(node: Node) -> None:
    assert replayed(node, DataclassSerializer(Node)) == node


@pytest.mark.parametrize(
    ("annotation", "result"),
    [
        (Node | None, Node("a")),
        (list[Node], [Node("a")]),
        (dict[str, list[Node]], {"a": [Node("b")]}),
        (tuple[Node, ...], (Node("a"),)),
        (Page[Node], Page([Node("a")], Node("b"))),
        (Node | int | list[str], 3),
        (list[Node | None], [None, Node("a")]),
        (tuple[Node, list[None]], (Node("a"), [None])),
    ],
    ids=str,
)
def test_annotations_around_a_dataclass_are_understood(annotation: Any, result: Any) -> None:
    assert replayed(result, DataclassSerializer(annotation)) == result


@dataclasses.dataclass
class Computed:
    net: Decimal
    gross: Decimal = dataclasses.field(init=False)
    note: str | None = dataclasses.field(default=None, init=False)

    def __post_init__(self) -> None:
        self.net += 1  # not the same when it happens twice
        self.gross = self.net * 2


def test_fields_that_init_does_not_take_or_changes_are_as_they_were() -> None:
    result = Computed(Decimal(1))
    result.note = "later"
    again = replayed(result, DataclassSerializer(Computed))
    assert (again.net, again.gross, again.note) == (Decimal(2), Decimal(4), "later")


def test_a_field_that_was_not_stored_gets_its_default() -> None:
    assert result_from_text('{"street": "s"}', DataclassSerializer(Address)) == Address(street="s")


@dataclasses.dataclass
class Invoice:
    number: str
    address: Address


def test_what_powertools_stored_of_a_dataclass_is_rebuilt_in_its_depth() -> None:
    invoice = Invoice("n", Address(street="s"))
    stored = encode(PowertoolsDataclassSerializer(Invoice).to_dict(invoice))
    assert result_from_text(stored, DataclassSerializer(Invoice)) == invoice


def test_a_dataclass_is_stored_as_json_data() -> None:
    assert DataclassSerializer(Invoice).to_dict(Invoice("n", Address(street="s"))) == {
        "number": "n",
        "address": {"street": "s", "id": UUID(int=0)},
    }


@dataclasses.dataclass
class Picky:
    amount: int
    sure: bool = True
    child: Picky | None = None
    day: datetime.date | None = None
    price: Decimal | None = None
    color: Color | None = None
    pair: tuple[int, str] | None = None
    by_number: dict[int, int] | None = None
    line: Line | None = None
    lines: list[Picky] | None = None
    deque: collections.deque[int] | None = None
    union: int | list[int] = 0
    options: Options | None = None

    def __post_init__(self) -> None:
        if self.amount < 0:
            raise ValueError("negative")


@pytest.mark.parametrize(
    ("data", "misfit"),
    [
        ("secret", "$ is not of type dict"),
        ({"amount": "secret"}, "$.amount is not of type int"),
        ({"amount": 1, "sure": 1}, "$.sure is not of type bool"),
        ({"amount": 1, "secre": 1}, "$ is not of type Picky"),
        ({}, "$ is not of type Picky"),
        ({"amount": -1}, "$ is not of type Picky"),
        ({"amount": 1, "child": {"amount": -1}}, "$.child is not of type Picky"),
        ({"amount": 1, "day": "secret"}, "$.day is not of type date"),
        ({"amount": 1, "price": "secret"}, "$.price is not of type Decimal"),
        ({"amount": 1, "color": "secret"}, "$.color is not of type Color"),
        ({"amount": 1, "pair": [1]}, "$.pair is not of type tuple of 2"),
        ({"amount": 1, "pair": [1, 2]}, "$.pair[1] is not of type str"),
        ({"amount": 1, "by_number": {"secre": 1}}, "$.by_number.secre is not of type int"),
        ({"amount": 1, "by_number": {"1.5": 1}}, "$.by_number.1.5 is not of type int"),
        ({"amount": 1, "by_number": {"1": "secret"}}, "$.by_number.1 is not of type int"),
        ({"amount": 1, "line": {"sku": "secret"}}, "$.line is not of type Line"),
        ({"amount": 1, "lines": [{"amount": 1}, {"amount": None}]}, "$.lines[1].amount is not of type int"),
        ({"amount": 1, "lines": {}}, "$.lines is not of type list[test_serialization.Picky] | None"),
        ({"amount": 1, "deque": [1]}, "$.deque is not of type deque"),
        ({"amount": 1, "union": "secret"}, "$.union is not of type int | list[int]"),
        ({"amount": 1, "union": [None]}, "$.union[0] is not of type int"),
        ({"amount": 1, "options": {"size": 1}}, "$.options is not of type Options"),
    ],
    ids=str,
)
def test_what_does_not_fit_a_dataclass_is_named_by_place_and_type(data: Any, misfit: str) -> None:
    message = refusal(result_from_text, encode(data), DataclassSerializer(Picky))
    message = message.replace(f"{__name__}.", "test_serialization.")
    assert message.startswith("the stored result does not fit the model: ")
    if "deque" in misfit:
        assert "$.deque is not of type" in message
    else:
        assert message == f"the stored result does not fit the model: {misfit}"


def test_an_error_of_the_users_own_code_stays_the_cause() -> None:
    with pytest.raises(IdempotencySerializationError) as caught:
        DataclassSerializer(Picky).from_dict({"amount": -1})
    assert isinstance(caught.value.__cause__, ValueError)


class Cyclic(enum.Enum):
    LAMBDA = object()


@dataclasses.dataclass
class WithLambda:
    of: Cyclic


@dataclasses.dataclass
class Unresolved:
    of: OnlyForTypeCheckers


@dataclasses.dataclass
class Ambiguous:
    when: datetime.date | str


class Speaks(typing.Protocol):
    name: str


@dataclasses.dataclass
class Loose:
    speaks: Speaks | None = None
    thing: object = None


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        (int, "needs a dataclass, and <class 'int'> contains none"),
        (Literal["Node"], "contains none"),
        (Line, "contains none"),
        (Node | Address, "two of its members look alike there"),
        (Address | dict[str, Any], "two of its members look alike there"),
        (Ambiguous, "two of its members look alike there"),
        (list[Page[T]], "~T cannot be rebuilt from JSON; name a class there"),  # type: ignore[valid-type]
        (Page, "~T cannot be rebuilt"),
        (WithLambda, "cannot be stored as JSON: is of type object"),
        (Unresolved, "the annotations of Unresolved cannot be resolved: name 'OnlyForTypeCheckers' is not defined"),
    ],
    ids=str,
)
def test_what_could_only_be_guessed_is_refused_when_the_serializer_is_made(annotation: Any, reason: str) -> None:
    with pytest.raises(IdempotencyModelTypeError) as caught:
        DataclassSerializer(annotation)
    assert reason in str(caught.value)


def test_a_class_that_json_does_not_know_is_no_matter_where_there_is_none() -> None:
    assert replayed(Loose(None, 5), DataclassSerializer(Loose)) == Loose(None, 5)


def test_a_dataclass_that_contains_its_own_instance_cannot_be_stored() -> None:
    node = Node("secret")
    node.children.append(node)
    assert (
        refusal(result_text, node, DataclassSerializer(Node)) == "DataclassSerializer.to_dict() raised RecursionError"
    )


# --- which serializer


async def returns_receipt() -> Receipt: ...  # type: ignore[empty-body]
async def returns_optional_receipt() -> Receipt | None: ...
async def returns_lines() -> dict[str, list[Line]]: ...  # type: ignore[empty-body]
async def returns_node() -> Node: ...  # type: ignore[empty-body]
async def returns_annotated_nodes() -> Annotated[list[Node], "x"]: ...  # type: ignore[empty-body]
async def returns_page() -> Page[Address]: ...  # type: ignore[empty-body]
async def returns_dict() -> dict[str, int]: ...  # type: ignore[empty-body]
async def returns_literal() -> Literal["Node"]: ...  # type: ignore[empty-body]
async def returns_none() -> None: ...
async def returns_what_is_hidden() -> OnlyForTypeCheckers: ...  # type: ignore[empty-body]
async def takes_what_is_hidden(_: OnlyForTypeCheckers) -> Node: ...  # type: ignore[empty-body]
async def says_nothing(): ...  # type: ignore[no-untyped-def]  # noqa: ANN201


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (returns_receipt, PydanticSerializer),
        (returns_optional_receipt, PydanticSerializer),
        (returns_lines, PydanticSerializer),
        (returns_node, DataclassSerializer),
        (returns_annotated_nodes, DataclassSerializer),
        (returns_page, DataclassSerializer),
        (takes_what_is_hidden, DataclassSerializer),
        (returns_dict, NoOpSerializer),
        (returns_literal, NoOpSerializer),
        (returns_none, NoOpSerializer),
        (returns_what_is_hidden, NoOpSerializer),
        (says_nothing, NoOpSerializer),
        (len, NoOpSerializer),
        (None, NoOpSerializer),
    ],
)
def test_a_serializer_is_deduced_from_the_return_annotation(function: Any, expected: type) -> None:
    assert type(resolve(None, function)) is expected


def test_an_annotation_that_cannot_be_resolved_is_warned_of_once_for_each_function(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def one() -> OnlyForTypeCheckers: ...  # type: ignore[empty-body]
    async def other() -> OnlyForTypeCheckers: ...  # type: ignore[empty-body]

    for function in (one, functools.partial(one), other):
        resolve(None, function)
    assert {(record.name, record.levelname) for record in caplog.records} == {("aidem", "WARNING")}
    assert [record.getMessage() for record in caplog.records] == [
        f"the return annotation of {__name__}.{function.__qualname__} cannot be resolved: name 'OnlyForTypeCheckers' "
        "is not defined; callers get plain JSON data unless you import at run time what it names, or pass an "
        "output_serializer"
        for function in (one, other)
    ]


class Service:
    async def method(self) -> Node: ...  # type: ignore[empty-body]

    @classmethod
    async def class_method(cls) -> Node: ...  # type: ignore[empty-body]

    @staticmethod
    async def static_method() -> Node: ...  # type: ignore[empty-body]

    async def __call__(self) -> Node: ...  # type: ignore[empty-body]


@functools.wraps(returns_node)
async def wrapped(*args: Any) -> Any: ...


elsewhere: dict[str, Any] = {}
exec("def wrapper(): ...", elsewhere)
functools.update_wrapper(elsewhere["wrapper"], returns_node)


@functools.cache
def cached() -> Node: ...  # type: ignore[empty-body]


@pytest.mark.parametrize(
    "function",
    [
        Service().method,
        Service.method,
        Service.class_method,
        vars(Service)["class_method"],
        vars(Service)["static_method"],
        Service(),
        functools.partial(functools.partial(Service().method)),
        wrapped,
        elsewhere["wrapper"],
        cached,
    ],
    ids=range(10),
)
def test_the_annotation_of_any_callable_is_found(function: Any) -> None:
    assert isinstance(resolve(None, function), DataclassSerializer)
    assert isinstance(resolve(DataclassSerializer, function), DataclassSerializer)


def test_a_model_from_the_function_around_is_found() -> None:
    @dataclasses.dataclass
    class Local:
        a: int

    async def returns_local() -> Local:
        if not_bound_yet:
            raise AssertionError
        return Local(1)

    assert isinstance(resolve(None, returns_local), DataclassSerializer)
    not_bound_yet = False


def test_an_instance_is_used_as_it_is() -> None:
    serializer = NoOpSerializer()
    assert resolve(serializer, returns_node) is serializer


def test_a_class_takes_the_return_annotation() -> None:
    receipt = resolve(PydanticSerializer, returns_optional_receipt)
    assert replayed(RECEIPT, receipt) == RECEIPT
    assert replayed([Node("a")], resolve(DataclassSerializer, returns_annotated_nodes)) == [Node("a")]


class OwnSerializer(NoOpSerializer):
    def __init__(self, model: Any) -> None:
        self.model = model

    @classmethod
    def instantiate(cls, model_type: Any) -> OwnSerializer:
        return cls(model_type)


@pytest.mark.parametrize(("function", "model"), [(returns_node, Node), (says_nothing, None), (None, None)])
def test_a_class_of_ones_own_is_asked_with_the_annotation_or_none(function: Any, model: Any) -> None:
    own = resolve(OwnSerializer, function)
    assert isinstance(own, OwnSerializer)
    assert own.model is model


@pytest.mark.parametrize("serializer", [PydanticSerializer, DataclassSerializer])
@pytest.mark.parametrize("function", [says_nothing, None])
def test_a_class_without_an_annotation_to_take_says_so(serializer: type[ModelSerializer], function: Any) -> None:
    with pytest.raises(IdempotencyNoSerializationModelError, match=rf"^{serializer.__name__} takes its model from"):
        resolve(serializer, function)


def test_a_class_says_which_name_in_the_annotation_cannot_be_resolved() -> None:
    with pytest.raises(
        IdempotencyNoSerializationModelError, match=r"name 'OnlyForTypeCheckers' is not defined; import"
    ):
        resolve(PydanticSerializer, returns_what_is_hidden)


def test_a_class_that_makes_nothing_is_refused() -> None:
    with pytest.raises(IdempotencyUsageError, match=r"NoOpSerializer has no instantiate\(\); pass an instance"):
        resolve(NoOpSerializer, returns_node)  # type: ignore[arg-type]


async def returns_either() -> Node | Address: ...  # type: ignore[empty-body]


def test_a_deduced_union_of_dataclasses_is_refused_before_anything_runs() -> None:
    with pytest.raises(IdempotencyModelTypeError, match="look alike"):
        resolve(None, returns_either)


# --- stored exceptions


class DeclinedError(Exception):
    pass


class InsufficientError(DeclinedError):
    def __init__(self, needed: int, currency: str = "EUR") -> None:
        super().__init__(needed, currency)
        self.needed = needed


class KeywordError(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")


class ForgetfulError(Exception):
    def __init__(self, message: str, *, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class SlottedError(Exception):
    __slots__ = ("code",)

    def __init__(self, message: str, *, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class WellSlottedError(Exception):
    __slots__ = ("_WellSlottedError__hidden", "code", "unset")

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = self.__hidden = code


class TalkativeError(Exception):
    """Says more than its arguments and attributes hold."""

    spoken: ClassVar[dict[int, str]] = {}

    def __str__(self) -> str:
        return self.spoken.get(id(self), "nothing")


def talkative() -> Exception:
    error = TalkativeError("x")
    error.spoken[id(error)] = "secret"
    return error


class Reason(enum.StrEnum):
    NO_FUNDS = "no funds"


def changed(error: Exception, **attributes: Any) -> Exception:
    for name, value in attributes.items():
        setattr(error, name, value)
    return error


def test_an_exception_is_stored_by_name_and_arguments() -> None:
    error = DeclinedError("no", {"code": 5})
    assert exception_text(error) == (
        f'aidem:exception:{{"args": ["no", {{"code": 5}}], "type": "{__name__}.DeclinedError"}}'
    )


@pytest.mark.parametrize(
    "error",
    [
        DeclinedError(),
        DeclinedError("no", [1, None]),
        InsufficientError(5),
        ValueError("x"),
        KeyError(1),
        SlottedError("x"),
        WellSlottedError(5),
        OSError("x"),
        OSError(122, "quota exceeded"),
        FileNotFoundError(2, "no such file", "a.txt"),
        OSError(18, "cross-device link", "a.txt", None, "b.txt"),
        UnicodeEncodeError("ascii", "\u00e9", 0, 1, "ordinal not in range(128)"),
        UnicodeTranslateError("\u00e9", 0, 1, "no such character"),
        ImportError("no module"),
        SyntaxError("invalid"),
    ],
    ids=repr,
)
def test_an_exception_is_made_again(error: Exception) -> None:
    error.add_note("a note is no part of it")
    again = exception_from_text(
        exception_text(error), (OSError, DeclinedError, InsufficientError, ValueError, KeyError, type(error))
    )
    assert type(again) is type(error)
    assert again.args == error.args
    assert str(again) == str(error)
    assert again.__dict__.keys() <= error.__dict__.keys()
    for name in ("code", "errno", "strerror", "filename", "filename2", "encoding", "object", "start", "end", "reason"):
        assert getattr(again, name, None) == getattr(error, name, None)


def shifting() -> Exception:
    error = OSError()
    error.args = (2, "secret")  # from which OSError makes a FileNotFoundError
    return error


def attributed() -> Exception:
    error = DeclinedError("x")
    error.code = "secret"  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    "error",
    [
        DeclinedError(b"secret"),
        DeclinedError(("secret", 1)),
        DeclinedError(Decimal(1)),
        DeclinedError(float("nan")),
        KeywordError(code=1),
        ForgetfulError("secret", code=3),
        attributed(),
        shifting(),
        UnicodeDecodeError("utf-8", b"secret", 0, 1, "bad"),
        changed(UnicodeEncodeError("ascii", "secret", 0, 1, "bad"), start=2),
        changed(OSError(2, "secret"), strerror="another secret"),
        changed(OSError("secret"), filename="secret"),
        SlottedError("secret", code=3),
        changed(WellSlottedError(1), unset="secret"),
        talkative(),
        ImportError("x", name="secret"),
        AttributeError("x", name="secret"),
        NameError("x", name="secret"),
        SyntaxError("x", ("secret", 1, 2, "secret")),
        changed(StopIteration(1), value="secret"),
        ExceptionGroup("secret", [ValueError("secret")]),
        DeclinedError(Reason.NO_FUNDS),
        DeclinedError({"secret": True, "of": [Reason.NO_FUNDS]}),
        IdempotencyValidationError.__new__(IdempotencyValidationError, "x"),
    ],
    ids=range(24),
)
def test_an_exception_that_its_arguments_do_not_make_again_is_refused(error: Exception) -> None:
    name = f"{type(error).__module__}.{type(error).__qualname__}"
    assert refusal(exception_text, error).startswith(f"an exception of type {name} cannot be stored: ")


def test_an_exception_that_is_not_listed_is_not_made() -> None:
    text = exception_text(InsufficientError(5))
    assert refusal(exception_from_text, text, (DeclinedError, ValueError)).endswith("list it in stored_exceptions")


@pytest.mark.parametrize(
    "text",
    [
        "aidem:exception:",
        "aidem:exception:{}",
        "aidem:exception:[]",
        'aidem:exception:{"args": [1, 2], "type": "test.KeywordError"}'.replace("test", __name__),
        'aidem:exception:{"args": null, "type": "builtins.ValueError"}',
        UNAVAILABLE_TEXT,
        "{}",
    ],
    ids=range(7),
)
def test_text_that_makes_no_exception_is_refused(text: str) -> None:
    assert refusal(exception_from_text, text, (KeywordError, ValueError)).startswith(
        "the stored exception cannot be rebuilt"
    )


def test_outcomes_that_are_no_results_are_not_json() -> None:
    assert UNAVAILABLE_TEXT == "aidem:unavailable"
    refusal(result_from_text, UNAVAILABLE_TEXT, NoOpSerializer())
    refusal(result_from_text, exception_text(DeclinedError()), NoOpSerializer())
