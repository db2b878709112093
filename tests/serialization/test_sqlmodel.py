"""Rows of SQLModel as results: their class validates them by `model_validate`, and by nothing else.

Relations of SQLModel are not found where annotations are strings, so this module keeps them as they are.
"""

import dataclasses
import datetime
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy.pool
import sqlmodel

from aidem.exceptions import IdempotencySerializationError
from aidem.serialization import PydanticSerializer
from tests.serialization.test_losses import loss, trip


class Crew(sqlmodel.SQLModel, table=True):
    id: int | None = sqlmodel.Field(default=None, primary_key=True)
    name: str


class Sailor(sqlmodel.SQLModel, table=True):
    id: int | None = sqlmodel.Field(default=None, primary_key=True)
    born: datetime.date | None = None
    price: Decimal = Decimal(0)
    crew_id: int | None = sqlmodel.Field(default=None, foreign_key="crew.id")
    crew: Crew | None = sqlmodel.Relationship()


class Titled(sqlmodel.SQLModel):
    title: str = sqlmodel.Field(alias="Title")
    sailor: Sailor | None = None


@dataclasses.dataclass
class Duo:
    first: Sailor
    second: Sailor | None = None


SAILOR: dict[str, Any] = {"id": 1, "born": datetime.date(2026, 1, 2), "price": Decimal("1.10")}


@pytest.mark.parametrize(
    ("annotation", "result", "sailor"),
    [
        (Sailor, lambda: Sailor(**SAILOR), lambda sailor: sailor),
        (Sailor | None, lambda: Sailor(**SAILOR), lambda sailor: sailor),
        (list[Sailor], lambda: [Sailor(**SAILOR)], lambda sailors: sailors[0]),
        (dict[str, list[Sailor]], lambda: {"a": [Sailor(**SAILOR)]}, lambda sailors: sailors["a"][0]),
        (Duo, lambda: Duo(Sailor(**SAILOR)), lambda duo: duo.first),
    ],
    ids=range(5),
)
def test_a_row_of_sqlmodel_comes_back_as_its_class_validates_it(annotation: Any, result: Any, sailor: Any) -> None:
    again = sailor(trip(result(), annotation))
    assert isinstance(again, Sailor)
    assert again.model_dump() == {**SAILOR, "crew_id": None}
    assert (type(again.born), type(again.price)) == (datetime.date, Decimal)


def test_a_model_of_sqlmodel_with_an_alias_comes_back() -> None:
    assert trip(Titled.model_validate({"Title": "x"}), Titled).title == "x"


@pytest.mark.parametrize("annotation", [Sailor | Crew, list[Sailor | Crew], Titled])
def test_a_row_that_pydantic_does_not_bring_back_is_unavailable(annotation: Any) -> None:
    row: Any = Sailor(**SAILOR)
    if annotation is Titled:
        row = Titled.model_validate({"Title": "x", "sailor": row})
    assert "born" in loss([row] if annotation == list[Sailor | Crew] else row, annotation)


def test_a_row_that_does_not_fit_is_refused() -> None:
    for annotation, stored in ((Sailor, {"born": "secret"}), (list[Sailor], [{"born": "secret"}])):
        with pytest.raises(IdempotencySerializationError, match="the stored result does not fit the model") as caught:
            PydanticSerializer(annotation).from_dict(stored)
        assert "secret" not in str(caught.value)


@pytest.fixture
def session() -> Iterator[sqlmodel.Session]:
    engine = sqlmodel.create_engine("sqlite://", poolclass=sqlalchemy.pool.StaticPool)
    sqlmodel.SQLModel.metadata.create_all(engine)
    with sqlmodel.Session(engine) as session:
        yield session
    engine.dispose()


def test_a_row_that_has_expired_is_unavailable_instead_of_empty(session: sqlmodel.Session) -> None:
    sailor = Sailor(**SAILOR)
    session.add(sailor)
    session.commit()
    assert "id" not in vars(sailor)
    assert loss(sailor, Sailor) == "$.born"
    session.refresh(sailor)
    assert trip(sailor, Sailor).id == 1


def test_a_row_whose_relations_would_not_come_back_is_unavailable(session: sqlmodel.Session) -> None:
    sailor = Sailor(**SAILOR, crew=Crew(name="A"))
    session.add(sailor)
    session.commit()
    session.refresh(sailor)
    trip(sailor, Sailor)
    assert sailor.crew is not None
    assert loss(sailor, Sailor) == "$.crew"
    lonely = Sailor(id=2, crew=None)
    session.add(lonely)
    session.commit()
    session.refresh(lonely)
    assert lonely.crew is None
    assert "crew" in vars(lonely)
    trip(lonely, Sailor)
