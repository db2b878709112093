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
from tests.test_losses import loss, trip


class Team(sqlmodel.SQLModel, table=True):
    id: int | None = sqlmodel.Field(default=None, primary_key=True)
    name: str


class Hero(sqlmodel.SQLModel, table=True):
    id: int | None = sqlmodel.Field(default=None, primary_key=True)
    born: datetime.date | None = None
    price: Decimal = Decimal(0)
    team_id: int | None = sqlmodel.Field(default=None, foreign_key="team.id")
    team: Team | None = sqlmodel.Relationship()


class Titled(sqlmodel.SQLModel):
    title: str = sqlmodel.Field(alias="Title")
    hero: Hero | None = None


@dataclasses.dataclass
class Duo:
    first: Hero
    second: Hero | None = None


HERO: dict[str, Any] = {"id": 1, "born": datetime.date(2026, 1, 2), "price": Decimal("1.10")}


@pytest.mark.parametrize(
    ("annotation", "result", "hero"),
    [
        (Hero, lambda: Hero(**HERO), lambda hero: hero),
        (Hero | None, lambda: Hero(**HERO), lambda hero: hero),
        (list[Hero], lambda: [Hero(**HERO)], lambda heroes: heroes[0]),
        (dict[str, list[Hero]], lambda: {"a": [Hero(**HERO)]}, lambda heroes: heroes["a"][0]),
        (Duo, lambda: Duo(Hero(**HERO)), lambda duo: duo.first),
    ],
    ids=range(5),
)
def test_a_row_of_sqlmodel_comes_back_as_its_class_validates_it(annotation: Any, result: Any, hero: Any) -> None:
    again = hero(trip(result(), annotation))
    assert isinstance(again, Hero)
    assert again.model_dump() == {**HERO, "team_id": None}
    assert (type(again.born), type(again.price)) == (datetime.date, Decimal)


def test_a_model_of_sqlmodel_with_an_alias_comes_back() -> None:
    assert trip(Titled.model_validate({"Title": "x"}), Titled).title == "x"


@pytest.mark.parametrize("annotation", [Hero | Team, list[Hero | Team], Titled])
def test_a_row_that_pydantic_does_not_bring_back_is_unavailable(annotation: Any) -> None:
    row: Any = Hero(**HERO)
    if annotation is Titled:
        row = Titled.model_validate({"Title": "x", "hero": row})
    assert "born" in loss([row] if annotation == list[Hero | Team] else row, annotation)


def test_a_row_that_does_not_fit_is_refused() -> None:
    for annotation, stored in ((Hero, {"born": "secret"}), (list[Hero], [{"born": "secret"}])):
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
    hero = Hero(**HERO)
    session.add(hero)
    session.commit()
    assert "id" not in vars(hero)
    assert loss(hero, Hero) == "$.born"
    session.refresh(hero)
    assert trip(hero, Hero).id == 1


def test_a_row_whose_relations_would_not_come_back_is_unavailable(session: sqlmodel.Session) -> None:
    hero = Hero(**HERO, team=Team(name="A"))
    session.add(hero)
    session.commit()
    session.refresh(hero)
    trip(hero, Hero)
    assert hero.team is not None
    assert loss(hero, Hero) == "$.team"
    lonely = Hero(id=2, team=None)
    session.add(lonely)
    session.commit()
    session.refresh(lonely)
    assert lonely.team is None
    assert "team" in vars(lonely)
    trip(lonely, Hero)
