"""What a round trip through JSON would lose of a result makes it unavailable; what a class keeps out does not."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import enum
import ipaddress
import pathlib
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from functools import cached_property
from typing import Annotated, Any, Generic, NamedTuple, TypeVar
from zoneinfo import ZoneInfo

import pydantic
import pydantic.dataclasses
import pytest
from pydantic import BaseModel, ConfigDict, Field, SecretBytes, SecretStr

from aidem import configure, idempotency, idempotent_function, sync
from aidem._rules.record import OutcomeKind
from aidem.exceptions import IdempotencyResultUnavailableError, IdempotencySerializationError, IdempotencyWarning
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.serialization import (
    CustomDictSerializer,
    DataclassSerializer,
    NoOpSerializer,
    PydanticSerializer,
    round_trip,
)
from aidem.serialization._losses import lost

T = TypeVar("T")
BERLIN = ZoneInfo("Europe/Berlin")


def trip(result: Any, annotation: Any = ...) -> Any:
    """Return what a replay would return, by the annotation or without one."""
    if annotation is ...:
        return round_trip(result, NoOpSerializer())[1]
    if dataclasses.is_dataclass(annotation):
        return round_trip(result, DataclassSerializer(annotation))[1]
    return round_trip(result, PydanticSerializer(annotation))[1]


def loss(result: Any, annotation: Any = ...) -> str:
    """Return the path to what is lost, having made sure that no value is shown."""
    with pytest.raises(IdempotencySerializationError) as caught:
        trip(result, annotation)
    assert "secret" not in str(caught.value)
    assert str(caught.value).startswith("the result cannot be stored: $")
    return str(caught.value).removeprefix("the result cannot be stored: ").partition(" ")[0]


class Color(enum.StrEnum):
    RED = "red"


class Status(enum.Enum):
    PAID = "paid"


class Card(BaseModel):
    number: SecretStr
    holder: str = ""


class Wallet(BaseModel):
    cards: list[Card] = []
    by_name: dict[str, Card] = {}
    anything: Any = None


class Payment(BaseModel):
    amount: Decimal


class CardPayment(Payment):
    card: str


class SamePayment(Payment):
    def is_large(self) -> bool:
        return self.amount > 1000


class Order(BaseModel):
    payment: Payment | None = None
    payments: list[Payment] = []


class Masked(BaseModel):
    number: str
    other: str | None = None

    @pydantic.field_serializer("number")
    def last_four(self, number: str) -> str:
        return "*" * len(number[:-4]) + number[-4:]

    @pydantic.field_serializer("other")
    def nothing(self, _: object) -> None:
        return None


class Cents(BaseModel):
    amount: int

    @pydantic.field_validator("amount", mode="before")
    @classmethod
    def of_euros(cls, euros: Any) -> Any:
        return euros * 100


class Cut(BaseModel):
    items: list[int] = []
    by_name: dict[str, int] = {}

    @pydantic.field_serializer("items", "by_name")
    def one(self, of: Any) -> Any:
        return of[:1] if isinstance(of, list) else dict(list(of.items())[:1])


class Handle:
    """Has no equality but identity."""


class Forgetful(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    handle: Annotated[Any, pydantic.PlainSerializer(lambda _: 1)]


class Money(BaseModel):
    amount: Decimal

    @pydantic.model_validator(mode="before")
    @classmethod
    def of_text(cls, value: Any) -> Any:
        return {"amount": value} if isinstance(value, str) else value


class Written(BaseModel):
    money: Annotated[Money, pydantic.PlainSerializer(str)]


class Joined(BaseModel):
    items: list[str] = []
    pairs: list[tuple[str, int]] = []

    @pydantic.field_serializer("items", "pairs")
    def join(self, items: list[Any]) -> Any:
        return dict(items) if items and isinstance(items[0], tuple) else ",".join(items)


class Named(BaseModel):
    name: str

    @pydantic.model_serializer
    def only_name(self) -> str:
        return self.name


@dataclasses.dataclass
class ByNumber:
    by_number: dict[int | str, int]


class Guess(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    color: Color | str = ""
    anything: Any = None


class Row:
    """A row of an object-relational mapper: its class has the columns, an instance those that are loaded."""

    payment: Any = None

    def __init__(self, **columns: Any) -> None:
        vars(self).update(columns)


@dataclasses.dataclass
class Account:
    card: Card
    owner: str = ""


@dataclasses.dataclass
class Noted:
    number: int


def noted(value: Any, **attributes: Any) -> Any:
    for name, attribute in attributes.items():
        object.__setattr__(value, name, attribute)
    return value


def expired(wallet: Wallet) -> Wallet:
    del wallet.anything
    return wallet


CARD = Card(number=SecretStr("secret 4242"))


@pytest.mark.parametrize(
    ("annotation", "result", "path"),
    [
        (Card, CARD, "$.number"),
        (Card | None, CARD, "$.number"),
        (list[Card], [Card(number=SecretStr("")), CARD], "$[1].number"),
        (dict[str, Card], {"a": CARD}, "$.a.number"),
        (Wallet, Wallet(cards=[CARD]), "$.cards[0].number"),
        (Wallet, Wallet(by_name={"b": CARD}), "$.by_name.b.number"),
        (Wallet, Wallet(anything=SecretStr("secret")), "$.anything"),
        (Wallet, Wallet(anything=[CARD]), "$.anything[0]"),
        (Wallet, {"cards": [CARD]}, "$.cards[0].number"),
        (Account, Account(CARD), "$.card.number"),
        (SecretBytes, SecretBytes(b"secret"), "$"),
        (Order, Order(payment=CardPayment(amount=Decimal(1), card="secret")), "$.payment.card"),
        (Order, Order(payments=[CardPayment(amount=Decimal(1), card="secret")]), "$.payments[0].card"),
        (Masked, Masked(number="secret 4242"), "$.number"),
        (Masked, Masked(number="", other="secret"), "$.other"),
        (Cents, Cents(amount=3), "$.amount"),
        (Guess, Guess(color=Color.RED), "$.color"),
        (Guess, Guess(anything={SecretStr("secret")}), "$.anything"),
        (Guess, Guess(anything=float("inf")), "$.anything"),
        (Guess, Guess(anything=frozenset({SecretStr("secret")})), "$.anything"),
        (Cut, Cut(items=[1, 2]), "$.items"),
        (Cut, Cut(by_name={"a": 1, "b": 2}), "$.by_name"),
        (ByNumber, ByNumber({1: 1}), "$.by_number.1"),
        (Forgetful, Forgetful(handle=Handle()), "$.handle"),
        (Written, Written.model_construct(money=Decimal(1)), "$.money"),
        (Noted, noted(Noted(1), extra="secret"), "$.extra"),
        (Payment, noted(Payment(amount=Decimal(1)), extra="secret"), "$.extra"),
        (Wallet, expired(Wallet()), "$.anything"),
        (BaseModel, Payment(amount=Decimal(1)), "$.amount"),
        (list[BaseModel], [CARD], "$[0].number"),
        (Order, Row(payments=[]), "$.payment"),
        (Card, Row(number=SecretStr("secret")), "$.number"),
    ],
    ids=range(32),
)
def test_what_a_model_would_not_bring_back_is_named_by_its_path(annotation: Any, result: Any, path: str) -> None:
    assert loss(result, annotation) == path


@pytest.mark.parametrize(
    ("result", "path"),
    [
        (CARD, "$.number"),
        ({"a": [CARD]}, "$.a[0].number"),
        ((1, [CARD]), "$[1][0].number"),
        ({7: CARD}, '$["7"].number'),
        (Account(CARD), "$.card.number"),
        (Wallet(cards=[CARD]), "$.cards[0].number"),
        (Wallet(anything={"x": SecretStr("secret")}), "$.anything.x"),
        (pydantic.RootModel[list[Card]]([CARD]), "$[0].number"),
        (Order(payments=[CardPayment(amount=Decimal(1), card="secret")]), "$.payments[0].card"),
        (Masked(number="secret 4242"), "$.number"),
    ],
    ids=range(10),
)
def test_what_the_dump_of_a_model_would_hide_is_named_where_no_annotation_names_the_model(
    result: Any, path: str
) -> None:
    assert loss(result) == path


# --- What is no loss --------------------------------------------------------------------------------------------------


class Rich(BaseModel):
    model_config = ConfigDict(extra="allow", populate_by_name=True, arbitrary_types_allowed=True, val_json_bytes="utf8")

    number: int = Field(alias="orderNumber")
    other: str = Field("x", validation_alias="otherIn", serialization_alias="otherOut")
    email: Annotated[str, pydantic.StringConstraints(to_lower=True, strip_whitespace=True)] = ""
    at: datetime.datetime | None = None
    took: datetime.timedelta = datetime.timedelta(microseconds=1)
    day: datetime.date | None = None
    hour: datetime.time | None = None
    price: Decimal = Decimal("1.10")
    rate: float = 0.1
    color: Color | None = None
    status: Status | None = None
    id: uuid.UUID = uuid.UUID(int=1)
    path: pathlib.Path = pathlib.Path("a")
    address: ipaddress.IPv4Address | None = None
    url: pydantic.HttpUrl | None = None
    pattern: re.Pattern[str] | None = None
    blob: bytes = b""
    tags: set[str] = set()
    frozen: frozenset[Decimal] = frozenset()
    row: tuple[int, Decimal] = (1, Decimal(2))
    deque: collections.deque[int] = collections.deque()
    sequence: Sequence[Decimal] = ()
    mapping: Mapping[int, Decimal] = {}
    by_color: dict[Color, int] = {}
    anything: Any = None
    parent: Rich | None = None
    hidden: str = Field("default", exclude=True)
    revealed: SecretStr = SecretStr("")
    empty: SecretStr = SecretStr("")
    payment: Payment | None = None
    _cache: dict[str, int] = pydantic.PrivateAttr(default_factory=dict)

    @pydantic.computed_field
    def total(self) -> Decimal:
        return self.price * 2

    @cached_property
    def expensive(self) -> object:
        return object()

    @pydantic.field_serializer("revealed")
    def reveal(self, secret: SecretStr) -> str:
        return secret.get_secret_value()


def rich(**changes: Any) -> Rich:
    return Rich(orderNumber=1, **changes)


def used(model: Rich) -> Rich:
    assert model.expensive
    model._cache["a"] = 1
    return model


class Picky(BaseModel):
    """Has an `__eq__` that cannot be asked about others, and no hash."""

    number: int

    def __eq__(self, other: object) -> bool:
        raise AssertionError

    __hash__ = None  # type: ignore[assignment]


class Vector:
    """Answers a comparison as an array of numpy does."""

    def __init__(self, items: list[int]) -> None:
        self.items = items

    def __eq__(self, other: object) -> Any:
        raise ValueError("ambiguous")

    __hash__ = None  # type: ignore[assignment]


def _vector(value: Any) -> Vector:
    return value if isinstance(value, Vector) else Vector(value)


class Scientific(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    vector: Annotated[Vector, pydantic.PlainSerializer(lambda vector: vector.items), pydantic.PlainValidator(_vector)]
    handle: Annotated[
        Handle, pydantic.PlainSerializer(lambda _: 1), pydantic.PlainValidator(lambda v: v if v != 1 else Handle())
    ]


class Page(BaseModel, Generic[T]):
    items: list[T]


class Tags(pydantic.RootModel[set[str]]):
    pass


class Sloppy(BaseModel):
    """Is assigned what it does not declare, which pydantic allows by default."""

    status: Status = Status.PAID
    price: Decimal = Decimal(0)
    number: int = 0
    many: list[int] = []


class WithoutNones(BaseModel):
    a: int | None = None
    b: int | None = None

    @pydantic.model_serializer(mode="wrap")
    def sparse(self, dump: Any) -> Any:
        return {name: value for name, value in dump(self).items() if value is not None}


@dataclasses.dataclass(slots=True, frozen=True)
class Slotted:
    price: Decimal
    at: datetime.datetime | None = None


@dataclasses.dataclass
class Derived:
    price: Decimal
    double: Decimal = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.double = self.price * 2
        self.triple = self.price * 3


@dataclasses.dataclass
class Counted:
    price: Decimal
    count: int = dataclasses.field(init=False, default=0)
    tags: list[str] = dataclasses.field(init=False, default_factory=list)


class Aliased(BaseModel):
    first: int = Field(validation_alias=pydantic.AliasChoices("FIRST", pydantic.AliasPath("all", 0)))
    second: int = Field(2, validation_alias=pydantic.AliasPath("all", 1))


class Stripped(BaseModel):
    """Its validation changes JSON data, as the annotation of a function asks for."""

    name: Annotated[str, pydantic.StringConstraints(strip_whitespace=True)]
    tags: list[Annotated[str, pydantic.StringConstraints(to_lower=True)]] = []
    at: datetime.datetime | None = None


class Receipt(BaseModel):
    payment: Payment
    note: str = "has no column"


@pydantic.dataclasses.dataclass
class Checked:
    price: Decimal
    secret: str = Field("default", exclude=True)


class Point(NamedTuple):
    x: int
    y: Decimal


class ExtraDateTime(datetime.datetime):
    pass


NOW = datetime.datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=datetime.UTC)
IN_BERLIN = datetime.datetime(2026, 10, 25, 2, 30, tzinfo=BERLIN, fold=1)  # an hour that comes twice


@pytest.mark.parametrize(
    ("annotation", "result"),
    [
        (Rich, rich()),
        (Rich, rich(at=NOW, day=NOW.date(), hour=NOW.timetz(), color="red", status="paid")),
        (Rich, rich(at=IN_BERLIN)),
        (Rich, rich(at=ExtraDateTime(2026, 1, 2))),
        (Rich, rich(email=" A@B.example ", price=Decimal("1E+3"), rate=float("nan"))),
        (Rich, rich(rate=1, blob=b"a", tags={"a", "b"}, frozen={Decimal("1.0"), Decimal(2)})),
        (Rich, rich(deque=collections.deque([1]), sequence=(Decimal(1),), mapping={1: Decimal(1)})),
        (Rich, rich(by_color={"red": 1}, url="https://example.com", pattern="a+", address="127.0.0.1")),
        (Rich, rich(parent=rich(parent=rich(price=Decimal(3))), unknown=[1], more={"a": None})),
        (Rich, rich(anything=[NOW, (1, 2), {"a": Decimal(1)}, Color.RED, uuid.UUID(int=2), {1: 2, 3: 3}])),
        (Rich, rich(anything=Payment(amount=Decimal(1)))),
        (Rich, rich(anything=[{Decimal(1), 2}, b"a", datetime.timedelta(1)])),
        (Rich, rich(hidden="kept", revealed=SecretStr("told"))),
        (Rich, rich(payment=SamePayment(amount=Decimal(1)))),
        (Rich, used(rich())),
        (Payment, SamePayment(amount=Decimal(1))),
        (Payment, CardPayment(amount=Decimal(1), card="filtered, as the annotation says")),
        (list[Payment | None], [None, CardPayment(amount=Decimal(1), card="filtered")]),
        (Picky, Picky(number=1)),
        (list[Picky], [Picky(number=1)]),
        (Scientific, Scientific(vector=Vector([1, 2]), handle=Handle())),
        (Page[Decimal], Page[Decimal](items=[Decimal(1)])),
        (Page[Payment], Page[Payment](items=[Payment(amount=Decimal(1))])),
        (Tags, Tags({"a", "b"})),
        (WithoutNones, WithoutNones(b=1)),
        (Sloppy, noted(Sloppy(), status="paid", price=0.1, number="5", many=(1, 2))),
        (Slotted, Slotted(Decimal(1), NOW)),
        (Derived, Derived(Decimal(1))),
        (Checked, Checked(Decimal(1), secret="kept")),
        (list[Slotted] | None, [Slotted(Decimal(1))]),
        (tuple[Payment, Point], (Payment(amount=Decimal(1)), Point(1, Decimal(2)))),
        (list[Payment], (Payment(amount=Decimal(1)),)),
        (Payment, {"amount": Decimal(1), "unknown": "is dropped as by any model"}),
        (Rich, {"orderNumber": 1, "otherIn": "y", "at": NOW}),
        (Rich, {"number": 1, "at": "2026-01-02T03:04:05Z", "day": "2026-01-02"}),
        (Slotted, {"price": "1.0"}),
        (Status, "paid"),
        (Iterable[Payment], [Payment(amount=Decimal(1))]),
        (tuple[Money, Decimal], ("5", Decimal(1))),
        (Counted, Counted(Decimal(1))),
        (list[Counted], [Counted(Decimal(1))]),
        (Aliased, Aliased.model_validate({"FIRST": 1})),
        (Aliased, {"FIRST": 1}),
        (Stripped, {"name": " A ", "tags": ["B"], "at": NOW}),
        (Payment, Row(amount=Decimal(1))),
        (Receipt, Row(payment=Row(amount=Decimal(1)))),
    ],
    ids=range(46),
)
def test_what_comes_back_or_is_kept_out_on_purpose_is_no_loss(annotation: Any, result: Any) -> None:
    trip(result, annotation)


@pytest.mark.parametrize(
    "result",
    [
        rich(at=NOW, payment=SamePayment(amount=Decimal(1)), hidden="kept", revealed=SecretStr("told"), tags={"a"}),
        {"a": Payment(amount=Decimal(1)), "b": (Color.RED, [NOW])},
        Order(payment=Payment(amount=Decimal(1))),
        Tags({"a"}),
        WithoutNones(a=1),
        Wallet(anything=CardPayment(amount=Decimal(1), card="x")),
        Slotted(Decimal(1)),
        Guess(anything={"a": 1, 1: 2}),
        Joined(items=["a"], pairs=[("a", 1)]),
        [Named(name="a")],
        float("nan"),
        collections.OrderedDict(b=1, a=2),
    ],
    ids=range(12),
)
def test_json_data_is_what_is_promised_of_a_result_that_no_annotation_names(result: Any) -> None:
    trip(result)


def test_a_dataclass_whose_annotations_only_pydantic_can_resolve_is_compared_by_its_values() -> None:
    @dataclasses.dataclass
    class Local:
        amount: Decimal

    @dataclasses.dataclass
    class Outer:
        local: Local
        extra: Any = None

    class Model(BaseModel):
        outer: Outer

    trip(Model(outer=Outer(Local(Decimal(1)))), Model)
    assert loss(Model(outer=Outer(Local(Decimal(1)), SecretStr("secret"))), Model) == "$.outer.extra"


def test_what_the_serializers_of_users_bring_back_is_not_judged() -> None:
    lossy = CustomDictSerializer(to_dict=lambda card: card.holder, from_dict=lambda holder: holder)
    assert round_trip(Card(number=SecretStr("secret"), holder="A"), lossy) == ('"A"', "A")


def test_a_result_that_is_too_deep_to_be_compared_is_lost() -> None:
    def deep() -> Any:
        value: Any = []
        for _ in range(100_000):
            value = [value]
        return value

    assert lost(deep(), deep(), frozenset()) == "$"


# --- What callers get -------------------------------------------------------------------------------------------------


@pytest.fixture
def layer() -> Iterator[MemoryPersistenceLayer]:
    layer = MemoryPersistenceLayer()
    configure(persistence_store=layer)
    yield layer
    configure()
    sync.close()


def check_unavailable(layer: MemoryPersistenceLayer, logged: str) -> None:
    (record,) = layer.records().values()
    assert record.outcome is OutcomeKind.UNAVAILABLE
    assert "4242" not in str(record.response_data) + logged
    assert "the result cannot be stored: $.number " in logged


@pytest.mark.parametrize("annotation", [Card, Any, Card | None], ids=str)
async def test_the_first_caller_keeps_a_secret_and_later_ones_are_told_that_it_is_not_stored(
    annotation: Any, layer: MemoryPersistenceLayer, caplog: pytest.LogCaptureFixture
) -> None:
    async def issue() -> Any:
        return CARD

    issue.__annotations__["return"] = annotation
    function = idempotent_function(issue)
    with pytest.warns(IdempotencyWarning, match="could not be stored"):
        assert await function() is CARD
    with pytest.raises(IdempotencyResultUnavailableError):
        await function()
    check_unavailable(layer, caplog.text)


def test_the_first_blocking_caller_keeps_a_secret(
    layer: MemoryPersistenceLayer, caplog: pytest.LogCaptureFixture
) -> None:
    @sync.idempotent_function
    def issue() -> Card:
        return CARD

    with pytest.warns(IdempotencyWarning, match="could not be stored"):
        assert issue() is CARD
    with pytest.raises(IdempotencyResultUnavailableError):
        issue()
    check_unavailable(layer, caplog.text)


async def in_block() -> Any:
    async with idempotency("card") as execution:
        if not execution.replayed:
            execution.result = CARD
    return execution.result


async def test_a_block_keeps_a_secret(layer: MemoryPersistenceLayer, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.warns(IdempotencyWarning, match="could not be stored"):
        assert await in_block() is CARD
    check_unavailable(layer, caplog.text)
    with pytest.raises(IdempotencyResultUnavailableError):
        await in_block()
