"""Payloads that are pydantic models: what their dump leaves to chance or hides may not decide a key."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import subprocess
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar

import pytest
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PrivateAttr,
    RootModel,
    Secret,
    SecretBytes,
    SecretStr,
    SerializeAsAny,
    WrapSerializer,
    computed_field,
    field_serializer,
    model_serializer,
)
from pydantic import dataclasses as pydantic_dataclasses
from sqlmodel import Field as Column
from sqlmodel import Session, SQLModel, create_engine
from typing_extensions import TypedDict

from aidem import IdempotencyConfig, idempotency, idempotent, idempotent_function, sync
from aidem._rules.canonical_json import encode
from aidem._rules.key import payload_digest, prepare
from aidem.exceptions import IdempotencyKeyError
from aidem.persistence.memory import MemoryPersistenceLayer

T = TypeVar("T")


def text_of(payload: Any) -> str:
    """Return the text that the key of a payload is made of."""
    return encode(prepare(payload))


def refused(payload: Any) -> str:
    """Return why a payload is no key."""
    with pytest.raises(IdempotencyKeyError) as caught:
        payload_digest(prepare(payload), "sha256")
    message = str(caught.value)
    assert "4242" not in message
    reason, _, ways_out = message.removeprefix("the payload cannot be a key: ").partition("; allowed are ")
    assert "event_key_jmespath" in ways_out
    assert "key=" in ways_out
    return reason


# --- Sets -------------------------------------------------------------------------------------------------------------


class Label(BaseModel):
    model_config = ConfigDict(frozen=True)
    name: str
    rank: int | None = None


class Tagged(BaseModel):
    tags: Any = None


class Numbers(BaseModel):
    ids: set[int] = set()
    frozen: frozenset[int] = frozenset()
    nested: frozenset[frozenset[int]] = frozenset()
    by_name: dict[str, list[set[int]]] = {}
    maybe: set[int] | None = None


ORDERS = [[0, 8, 16], [16, 8, 0], [8, 0, 16]]  # of one hash table slot, so that they come as they were put in


@pytest.mark.parametrize("order", ORDERS)
def test_members_of_sets_are_sorted_wherever_in_a_model_they_are(order: list[int]) -> None:
    assert list(set(ORDERS[0])) != list(set(ORDERS[1]))
    numbers = Numbers(
        ids=set(order),
        frozen=frozenset(order),
        nested=frozenset(frozenset([one]) for one in order),
        by_name={"a": [set(order)]},
        maybe=set(order),
    )
    expected = {
        "ids": [0, 8, 16],
        "frozen": [0, 8, 16],
        "nested": [[0], [16], [8]],  # by their text
        "by_name": {"a": [[0, 8, 16]]},
        "maybe": [0, 8, 16],
    }
    assert prepare(numbers) == expected
    assert json.loads(text_of({"in a dict": numbers})) == {"in a dict": expected}
    assert json.loads(text_of(Outer(numbers))) == {"inner": expected}


@dataclasses.dataclass
class Outer:
    inner: Any


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"b", "a", "é", "Z"}, ["Z", "a", "b", "é"]),
        ({10, 2, 1.5}, [1.5, 2, 10]),
        ({"a", 1, None}, ["a", 1, None]),
        ({2.5, True, 10}, [10, 2.5, True]),
        ({Decimal(10), Decimal(2)}, ["10", "2"]),
        ({datetime.date(2026, 1, 2), datetime.date(2025, 1, 2)}, ["2025-01-02", "2026-01-02"]),
        ({Label(name="b"), Label(name="a", rank=1)}, [{"name": "a", "rank": 1}, {"name": "b", "rank": None}]),
        ({(2, "a"), (1, "b")}, [[1, "b"], [2, "a"]]),
    ],
    ids=lambda value: str(value) if isinstance(value, list) else "set",  # whose order differs by process
)
def test_members_of_any_kind_have_an_order(members: set[Any], expected: list[Any]) -> None:
    assert json.loads(text_of(Tagged(tags=members)), parse_constant=str) == {"tags": expected}


def test_a_set_with_nan_has_an_order() -> None:
    nan = float("nan")
    for ratios in ({nan, 2.5, 10.0}, {10.0, nan, 2.5}):
        assert text_of(RootModel[set[float]](ratios)) == "[10.0, 2.5, NaN]"


def test_sets_outside_of_models_are_refused_as_before() -> None:
    assert refused({"ids": {1}}) == "$.ids is of type set"
    assert refused(Outer({1})) == "$.inner is of type set"
    assert refused(PydanticOuter(inner={1})) == "$.inner is of type set"


@pydantic_dataclasses.dataclass
class PydanticOuter:
    inner: Any


PROCESS = """
import sys
from pydantic import BaseModel, RootModel
from aidem import sync
from aidem.persistence.sqlite import SQLitePersistenceLayer

class Line(BaseModel):
    labels: frozenset[str]
    model_config = {"frozen": True}

class Order(BaseModel):
    tags: set[str]
    lines: list[Line]
    unique: set[Line]

class Orders(RootModel[dict[str, Order]]):
    pass

@sync.idempotent_function(persistence_store=SQLitePersistenceLayer(sys.argv[1]), key_prefix="charge")
def charge(orders):
    print("charged")

line = Line(labels={"north", "south", "east", "west"})
other = Line(labels={"red", "green", "blue"})
charge(Orders({"a": Order(tags={"new", "gift", "express", "b2b"}, lines=[line, other], unique={other, line})}))
print(" ".join({"new", "gift", "express", "b2b"}), file=sys.stderr)
sync.close()
"""


def test_processes_with_other_hash_seeds_charge_once(tmp_path: Any) -> None:
    ran = [
        subprocess.run(
            [sys.executable, "-c", PROCESS, str(tmp_path / "records.db")],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
        )
        for seed in range(4)
    ]
    assert len({process.stderr for process in ran}) > 1  # the sets did come in other orders
    assert [process.stdout for process in ran] == ["charged\n", "", "", ""]


# --- Secrets ----------------------------------------------------------------------------------------------------------


class Card(BaseModel):
    number: SecretStr
    name: str = "Ada"


class Pin(BaseModel):
    code: SecretBytes


class Born(Secret[datetime.date]):
    def _display(self) -> str:
        return "****/**/**"


class Person(BaseModel):
    born: Born


class Wallet(BaseModel):
    cards: list[Card] = []
    by_name: dict[str, Card] = {}
    main: Card | None = None
    recent: deque[Card] = deque()
    loose: Any = None


CARD = Card(number=SecretStr("4242424242424242"))


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (CARD, "$.number is a SecretStr, which the dump of Card.number masks"),
        (Pin(code=SecretBytes(b"4242")), "$.code is a SecretBytes, which the dump of Pin.code masks"),
        (
            Person(born=Born(datetime.date(4242, 1, 1))),
            "$.born is a Born, which the dump of Person.born masks",
        ),
        (Wallet(cards=[CARD]), "$.cards[0].number is a SecretStr, which the dump of Card.number masks"),
        (Wallet(by_name={"a": CARD}), "$.by_name.a.number is a SecretStr, which the dump of Card.number masks"),
        (Wallet(main=CARD), "$.main.number is a SecretStr, which the dump of Card.number masks"),
        (Wallet(loose=CARD.number), "$.loose is a SecretStr, which the dump of Wallet.loose masks"),
        (Wallet(loose=[{"a": (CARD.number,)}]), "$.loose[0].a[0] is a SecretStr, which the dump of Wallet.loose masks"),
        (Wallet(loose=Outer(CARD)), "$.loose.inner.number is a SecretStr, which the dump of Card.number masks"),
        (Wallet(recent=deque([CARD])), "$.recent[0].number is a SecretStr, which the dump of Card.number masks"),
        (Wallet(loose={CARD.number: 1}), None),
        (Wallet(loose={SecretStr("4242"), SecretStr("42")}), None),
        ({"order": [CARD]}, "$.order[0].number is a SecretStr, which the dump of Card.number masks"),
        (Outer(CARD), "$.inner.number is a SecretStr, which the dump of Card.number masks"),
        (PydanticOuter(inner=CARD), "$.inner.number is a SecretStr, which the dump of Card.number masks"),
        (RootModel[SecretStr](CARD.number), "$ is a SecretStr, which the dump of RootModel[SecretStr].root masks"),
        (RootModel[list[Card]]([CARD]), "$[0].number is a SecretStr, which the dump of Card.number masks"),
        (Outer(CARD.number), "$.inner is of type SecretStr"),
        ({"number": CARD.number}, "$.number is of type SecretStr"),
    ],
    ids=str,
)
def test_a_secret_that_the_dump_masks_is_refused_with_its_path(payload: Any, reason: str | None) -> None:
    found = refused(payload)
    assert found == reason or (reason is None and found.startswith("$.loose"))


class Revealed(BaseModel):
    number: SecretStr
    code: SecretBytes = SecretBytes(b"1")

    @field_serializer("number", "code", when_used="json")
    def _reveal(self, secret: Any) -> Any:
        return secret.get_secret_value()


class Mentioned(BaseModel):
    number: SecretStr

    @field_serializer("number")
    def _mention(self, secret: SecretStr) -> str:
        return f"card {secret}"


def test_a_secret_that_a_serializer_shows_is_a_key() -> None:
    assert prepare(Revealed(number=SecretStr("4242"))) == {"number": "4242", "code": "1"}
    assert refused(Mentioned(number=SecretStr("4242"))).startswith("$.number is a SecretStr")


def test_an_empty_secret_hides_nothing() -> None:
    assert prepare(Card(number=SecretStr(""))) == {"number": "", "name": "Ada"}


# --- Fields of subclasses ---------------------------------------------------------------------------------------------


class Payment(BaseModel):
    amount: int = 1


class CardPayment(Payment):
    card: str = "4242"


class CountedPayment(Payment):
    @computed_field  # type: ignore[prop-decorator]
    @property
    def twice(self) -> int:
        return self.amount * 2


class QuietPayment(Payment):
    trace: str = Field(default="4242", exclude=True)


class OpenPayment(Payment):
    model_config = ConfigDict(extra="allow")


class AliasedPayment(Payment):
    model_config = ConfigDict(serialize_by_alias=True)
    card: str = Field(default="4242", serialization_alias="CardNumber")


class ShortPayment(Payment):
    card: str = "4242"

    @model_serializer
    def _short(self) -> dict[str, int]:
        return {"amount": self.amount}


@dataclasses.dataclass
class Base:
    id: int = 1


@dataclasses.dataclass
class Derived(Base):
    note: str = "4242"


@pydantic_dataclasses.dataclass
class PydanticDerived(Base):
    note: str = "4242"
    trace: str = Field(default="4242", exclude=True)


class Checkout(BaseModel):
    one: Payment | None = None
    many: list[Payment] = []
    by_name: dict[str, tuple[Payment, ...]] = {}
    either: Payment | int = 0
    any_model: BaseModel | None = None
    data: Base | None = None
    duck: SerializeAsAny[Payment] | None = None
    anything: Any = None


class Box(BaseModel, Generic[T]):
    content: T


DROPPED = "is a field of CardPayment that the dump of Checkout.{} drops, whose annotation names a base class"


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (Checkout(one=CardPayment()), "$.one.card " + DROPPED.format("one")),
        (Checkout(many=[Payment(), CardPayment()]), "$.many[1].card " + DROPPED.format("many")),
        (Checkout(by_name={"a": (CardPayment(),)}), "$.by_name.a[0].card " + DROPPED.format("by_name")),
        (Checkout(either=CardPayment()), "$.either.card " + DROPPED.format("either")),
        (Checkout(any_model=Payment()), "$.any_model.amount is a field of Payment that the dump of Checkout.any_model"),
        (Checkout(one=OpenPayment(card="4242")), "$.one.card is a field of OpenPayment that the dump of Checkout.one"),  # type: ignore[call-arg]
        (Checkout(one=AliasedPayment()), "$.one.CardNumber is a field of AliasedPayment that the dump of Checkout.one"),
        (Checkout(data=Derived()), "$.data.note is a field of Derived that the dump of Checkout.data drops"),
        (Checkout(data=PydanticDerived()), "$.data.note is a field of PydanticDerived that the dump of Checkout.data"),
        (
            Box[Payment](content=CardPayment()),
            "$.content.card is a field of CardPayment that the dump of Box[Payment]",
        ),
        (RootModel[list[Payment]]([CardPayment()]), "$[0].card is a field of CardPayment that the dump of RootModel"),
        ([Checkout(one=CardPayment())], "$[0].one.card " + DROPPED.format("one")),
    ],
    ids=range(12),
)
def test_a_field_of_a_subclass_that_the_dump_drops_is_refused_with_its_path(payload: Any, reason: str) -> None:
    assert refused(payload).startswith(reason)


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (Checkout(duck=CardPayment(amount=2)), {"duck": {"amount": 2, "card": "4242"}}),
        (Checkout(anything=CardPayment()), {"anything": {"amount": 1, "card": "4242"}}),
        (Checkout(anything=Derived()), {"anything": {"id": 1, "note": "4242"}}),
        (Checkout(one=CountedPayment()), {"one": {"amount": 1}}),
        (Checkout(one=QuietPayment()), {"one": {"amount": 1}}),
        (Checkout(one=ShortPayment()), {"one": {"amount": 1}}),
        (Checkout(anything=ShortPayment()), {"anything": {"amount": 1}}),
        (Checkout(one=OpenPayment()), {"one": {"amount": 1}}),
    ],
    ids=range(8),
)
def test_what_is_shown_or_left_out_on_purpose_is_a_key(payload: Any, expected: dict[str, Any]) -> None:
    assert {name: value for name, value in prepare(payload).items() if name in expected} == expected


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int = 9


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    _bones: int = PrivateAttr(3)
    name: str = Field(default="Rex", repr=False)


class Owner(BaseModel):
    pet: Cat | Dog = Field(discriminator="kind")


def test_a_discriminated_union_shows_all_of_its_member() -> None:
    assert prepare(Owner(pet=Dog())) == {"pet": {"kind": "dog", "name": "Rex"}}


class Reduced(BaseModel):
    """Its author writes identifiers in the place of what they name."""

    decorated: Payment = CardPayment()
    annotated: Annotated[Payment, PlainSerializer(lambda payment: {"amount": payment.amount})] = CardPayment()
    wrapped: Annotated[Payment, WrapSerializer(lambda payment, write: write(payment))] = CardPayment()

    @field_serializer("decorated")
    def _reduce(self, payment: Payment) -> dict[str, int]:
        return {"amount": payment.amount}


class ReducedAll(BaseModel):
    payment: Payment = CardPayment()
    tags: set[int] = set()

    @field_serializer("*")
    def _reduce(self, value: Any) -> Any:
        return list(value) if isinstance(value, set) else {"amount": value.amount}


def test_what_a_serializer_leaves_out_is_left_out() -> None:
    amount = {"amount": 1}
    assert prepare(Reduced()) == {"decorated": amount, "annotated": amount, "wrapped": amount}
    assert prepare(ReducedAll()) == {"payment": amount, "tags": []}


@pytest.mark.parametrize("order", ORDERS)
def test_a_set_that_a_serializer_writes_as_it_comes_is_sorted(order: list[int]) -> None:
    assert prepare(ReducedAll(tags=set(order)))["tags"] == [0, 8, 16]


# --- Serializers that write two values alike --------------------------------------------------------------------------


class Lossy(BaseModel):
    card: str = "x"
    price: float = 1
    exact: Decimal = Decimal(1)
    as_float: Annotated[Decimal, PlainSerializer(float)] = Decimal(1)
    count: int = 1
    hidden: Annotated[str, PlainSerializer(lambda _: None)] = ""

    @field_serializer("card")
    def _last_digits(self, card: str) -> str:
        return "****" + card[-4:] if len(card) > 4 else card

    @field_serializer("price")
    def _rounded(self, price: float) -> float:
        return round(price, 2)

    @field_serializer("exact")
    def _rounded_text(self, exact: Decimal) -> str:
        return f"{exact:.2f}"

    @field_serializer("count")
    def _in_dozens(self, count: int) -> int:
        return count // 12 * 12 if count > 1 else count


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"card": "4000 0000 0000 9999"}, "card"),
        ({"price": 1.499}, "price"),
        ({"exact": Decimal("1.499")}, "exact"),
        ({"as_float": Decimal("1.00000000000000000001")}, "as_float"),
        ({"count": 25}, "count"),
        ({"hidden": "x"}, "hidden"),
    ],
    ids=str,
)
def test_a_serializer_that_demonstrably_writes_two_values_alike_is_refused(values: dict[str, Any], name: str) -> None:
    plain = {"hidden": "None"} | values  # the text of None, which is read back as itself
    reason = f"$.{name} is changed by the serializer of Lossy.{name}, which writes another value alike"
    assert refused(Lossy(**plain)) == reason


class Formatted(BaseModel):
    """Its serializers change values, and keep them apart."""

    card: str
    price: Decimal
    at: datetime.datetime
    count: Annotated[int, PlainSerializer(str)] = 5
    ratio: Annotated[float, PlainSerializer(lambda ratio: f"{ratio:%}")] = 0.5
    broken: Annotated[float, PlainSerializer(lambda ratio: "half" if ratio == 0.5 else 1 / 0)] = 0.5
    same: Annotated[str, PlainSerializer(lambda same: same)] = "4242"
    as_float: Annotated[Decimal, PlainSerializer(float)] = Decimal("1.10")

    @field_serializer("card")
    def _prefixed(self, card: str) -> str:
        return f"card-{card}"

    @field_serializer("price")
    def _in_euros(self, price: Decimal) -> str:
        return f"{price:.2f} €"

    @field_serializer("at")
    def _day(self, at: datetime.datetime) -> str:
        return f"{at:%d.%m.%Y}"


def test_a_serializer_that_keeps_values_apart_is_the_authors_word() -> None:
    now = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
    assert prepare(Formatted(card="1", price=Decimal("1.5"), at=now)) == {
        "card": "card-1",
        "price": "1.50 €",
        "at": "02.01.2026",
        "count": "5",
        "ratio": "50.000000%",
        "broken": "half",
        "same": "4242",
        "as_float": 1.1,
    }


class Cents(BaseModel):
    """Writes itself as a number, whatever its field holds."""

    cents: int

    @model_serializer
    def _number(self) -> int:
        return self.cents


def test_a_model_that_does_not_write_itself_as_an_object_is_what_it_writes() -> None:
    assert prepare(Cents(cents=5)) == 5
    assert prepare(Checkout(anything=[Cents(cents=5)]))["anything"] == [5]


class Percent(RootModel[float]):
    @field_serializer("root")
    def _rounded(self, ratio: float) -> float:
        return round(ratio, 1)


def test_the_serializer_of_a_root_model_is_one_of_a_field() -> None:
    assert prepare(Percent(0.5)) == 0.5
    assert refused(Percent(0.5123)).startswith("$ is changed by the serializer of Percent.root")


# --- Dicts ------------------------------------------------------------------------------------------------------------


class Titles(TypedDict, total=False):
    short: str
    long: str


class Point(NamedTuple):
    x: int
    y: set[int]


def test_keys_that_the_dump_makes_one_of_are_refused() -> None:
    assert refused(Tagged(tags={1: "a", "1": "b"})) == (
        '$.tags["1"] is in a dict of which the dump of Tagged.tags makes one key of two'
    )
    assert prepare(Tagged(tags={1: "a", "2": {3}})) == {"tags": {"1": "a", "2": [3]}}


def test_a_dict_of_which_a_serializer_leaves_something_out_is_what_it_writes() -> None:
    class Kept(BaseModel):
        items: list[Annotated[dict[str, int], PlainSerializer(lambda item: {"id": item["id"]})]]
        titles: Titles
        points: list[Annotated[Point, PlainSerializer(lambda point: {"x": point.x})]]
        some: list[Annotated[list[int], PlainSerializer(lambda some: some[:1])]]

    kept = Kept(items=[{"id": 1, "at": 2}], titles={"short": "a"}, points=[Point(1, {2})], some=[[1, 2]])
    assert prepare(kept) == {"items": [{"id": 1}], "titles": {"short": "a"}, "points": [{"x": 1}], "some": [[1]]}
    assert prepare(Tagged(tags=Point(1, {16, 8, 0}))) == {"tags": [1, [0, 8, 16]]}


class Endless(BaseModel):
    exact: Decimal = Field(allow_inf_nan=True)


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
def test_a_number_that_the_dump_writes_as_null_is_refused(number: float) -> None:
    assert refused(Tagged(tags=number)).startswith("$.tags is a float that is not finite")
    assert refused(Tagged(tags=[number])).startswith("$.tags[0] is a float that is not finite")
    assert text_of(RootModel[float](number)) == text_of(number)
    assert text_of(Endless(exact=Decimal(number))) == text_of({"exact": str(Decimal(number))})


# --- Names, warnings, and what looks like a model ---------------------------------------------------------------------


class Crossed(BaseModel):
    a: set[int] = Field(serialization_alias="A")
    b: SecretStr | None = Field(default=None, serialization_alias="B")

    def model_dump(self, **options: Any) -> dict[str, Any]:
        return super().model_dump(by_alias=True, exclude_none=True, **options)


@pytest.mark.parametrize("order", ORDERS)
def test_a_model_that_changes_how_it_is_dumped_is_dumped_its_way(order: list[int]) -> None:
    assert prepare(Crossed(a=set(order))) == {"A": [0, 8, 16]}
    assert refused(Crossed(a=set(order), b=SecretStr("4242"))).startswith("$.B is a SecretStr")


class Strict(BaseModel):
    a: int

    def model_dump(self, *, mode: str) -> dict[str, Any]:  # type: ignore[override]
        return {"a": self.a, "mode": mode}


def test_a_model_that_takes_no_other_options_is_dumped_by_its_mode_alone() -> None:
    assert prepare(Strict(a=1)) == {"a": 1, "mode": "json"}


def test_a_value_that_does_not_fit_its_field_is_in_no_warning() -> None:
    unfit = Payment.model_construct(amount="4242")
    with pytest.warns(UserWarning, match="4242"):
        unfit.model_dump()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prepare(unfit) == {"amount": "4242"}


class Duck:
    def __init__(self, **shown: Any) -> None:
        self.shown = shown

    def model_dump(self, *, mode: str) -> Any:
        return {"mode": mode, **self.shown}


def test_what_is_no_model_of_pydantic_says_itself_what_it_is() -> None:
    assert prepare(Duck(id=1)) == {"mode": "json", "id": 1}
    assert refused(Duck(ids={1})) == "$.ids is of type set"


class Customer(SQLModel, table=True):
    id: int | None = Column(default=None, primary_key=True)
    name: str


@pytest.fixture
def session() -> Iterator[Session]:
    engine = create_engine("sqlite://")
    SQLModel.metadata.create_all(engine)
    with Session(engine) as session:
        yield session
    engine.dispose()


def test_a_row_that_is_not_loaded_is_refused_and_loads_nothing(session: Session) -> None:
    customer = Customer(name="4242")
    session.add(customer)
    session.commit()  # which expires it
    assert refused(customer) == "$.id is Customer.id, which is not loaded"
    assert "name" not in vars(customer)
    session.refresh(customer)
    assert prepare(customer) == {"id": 1, "name": "4242"}


def test_a_model_without_some_of_its_fields_is_what_it_has() -> None:
    assert prepare(Card.model_construct(name="Ada")) == {"name": "Ada"}


# --- Only what the key or the validation hash is made from ------------------------------------------------------------


class Details(BaseModel):
    pass


class MoreDetails(Details):
    card: Card = CARD
    cards: list[Card] = [CARD]


class Order(BaseModel):
    id: int = 1
    card: Card = CARD
    cards: list[Card] = [CARD]
    secrets: set[SecretStr] = {SecretStr("4242"), SecretStr("42")}
    payment: Payment = CardPayment()
    details: Details = MoreDetails()


def fronts(**settings: Any) -> dict[str, Callable[[Any], Any]]:
    """Return the same function behind each front; the payload is an order."""
    config = IdempotencyConfig(**settings)
    options: Any = {"config": config, "persistence_store": MemoryPersistenceLayer(), "key_prefix": "charge"}

    async def charge(order: Any) -> int:
        return 1

    async def handle(event: Any, context: Any) -> int:
        return 1

    async def handler(event: Any) -> Any:
        return await idempotent(**options)(handle)(event, None)

    async def blocking(order: Any) -> Any:
        import asyncio

        function = sync.idempotent_function(data_keyword_argument="order", **options)(lambda order: 1)
        return await asyncio.to_thread(function, order)

    return {
        "function": idempotent_function(data_keyword_argument="order", **options)(charge),
        "key=": idempotent_function(key=lambda order: order, **options)(charge),
        "handler": handler,
        "blocking": blocking,
    }


FRONTS = ["function", "key=", "handler", "blocking"]


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("setting", ["event_key_jmespath", "payload_validation_jmespath"])
@pytest.mark.parametrize("expression", ["id", "[id, card.name]", "payment.amount", "cards[*].name", "length(secrets)"])
async def test_what_is_not_selected_may_be_hidden(front: str, setting: str, expression: str) -> None:
    settings = {"event_key_jmespath": "id", setting: expression}
    assert await fronts(**settings)[front](Order()) == 1


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("setting", ["event_key_jmespath", "payload_validation_jmespath"])
@pytest.mark.parametrize(
    "expression",
    [
        *("@", "card", "card.number", "[id, card.number]", "cards[*].number", "cards[0]", "secrets", "secrets[0]"),
        *("payment", "payment.card", "[id, payment.card]", "card.number && id", "card.number == 'x'", "card.number.x"),
        *("to_string(card.number)", "to_string(card)", "not_null(card.number)", "[id, card.number.*]"),
        *(
            "secrets[]",
            "contains(secrets, 'x')",
            "cards[?number == 'x'] || id",
            "[id, details.card]",
            "details.cards[0]",
        ),
    ],
)
async def test_what_is_selected_or_looked_at_may_not_be_hidden(front: str, setting: str, expression: str) -> None:
    settings = {"event_key_jmespath": "id", setting: expression}
    with pytest.raises(
        IdempotencyKeyError, match=r"which the dump of|that the dump of|the dump does not show"
    ) as caught:
        await fronts(**settings)[front](Order())
    assert "4242" not in str(caught.value)


async def test_a_block_refuses_a_key_and_a_payload_that_hide_something() -> None:
    layer = MemoryPersistenceLayer()
    for key, payload in ((CARD, 1), (1, CARD)):
        with pytest.raises(IdempotencyKeyError, match=r"which the dump of Card\.number masks"):
            async with idempotency(key, payload=payload, persistence_store=layer):
                pytest.fail("the block ran")


async def test_key_may_give_the_secret_itself() -> None:
    runs: list[str] = []

    @idempotent_function(
        key=lambda card: card.number.get_secret_value(), persistence_store=MemoryPersistenceLayer(), key_prefix="charge"
    )
    async def charge(card: Card) -> None:
        runs.append(card.number.get_secret_value())

    for number in ("4242", "5555", "4242"):
        await charge(Card(number=SecretStr(number)))
    assert runs == ["4242", "5555"]
