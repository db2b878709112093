from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from aidem.exceptions import IdempotencyPersistenceConfigError
from aidem.persistence import URL_FORMS, open_persistence_layer
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.persistence.sqlite import SQLitePersistenceLayer
from aidem.testing import claim_of


def test_memory_is_a_layer_of_its_own_for_each_call() -> None:
    layer = open_persistence_layer("memory://")
    assert isinstance(layer, MemoryPersistenceLayer)
    assert open_persistence_layer("memory://") is not layer


@pytest.mark.parametrize("form", ["absolute", "relative"])
async def test_sqlite_takes_a_path_as_sqlalchemy_writes_it(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "with space").mkdir()
    path = Path("with space") / "records.sqlite3"
    layer = open_persistence_layer(f"sqlite:///{tmp_path / path if form == 'absolute' else path}")
    assert isinstance(layer, SQLitePersistenceLayer)
    assert not (tmp_path / path).exists()
    async with layer:
        claim = await layer.acquire(claim_of("key", now=0), now=0)
        assert await layer.get("key") == claim.record
    assert (tmp_path / path).exists()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "memory",
        "memory:",
        "memory://somewhere",
        "sqlite",
        "sqlite://",
        "sqlite:///",
        "dynamodb://",
        "sqlite://records.sqlite3",
        "records.sqlite3",
        "mysql://host/records",
        "MEMORY://",
    ],
)
def test_a_url_of_no_layer_is_answered_with_those_that_are_allowed(url: str) -> None:
    with pytest.raises(IdempotencyPersistenceConfigError) as refused:
        open_persistence_layer(url)
    assert str(refused.value).endswith(
        f"write {', '.join(URL_FORMS[:-1])} or {URL_FORMS[-1]}",
    )


@pytest.mark.parametrize("url", [None, Path("records.sqlite3")])
def test_what_is_no_text_is_answered_with_the_urls_that_are_allowed(url: Any) -> None:
    with pytest.raises(
        IdempotencyPersistenceConfigError, match=rf"takes a URL as text, not {type(url).__name__}; write"
    ):
        open_persistence_layer(url)


@pytest.mark.parametrize("url", ["amqp://user:secret@host", "secret", "memory://secret", "sqlite://secret"])
def test_a_refusal_shows_the_scheme_and_nothing_that_may_be_secret(url: str) -> None:
    with pytest.raises(IdempotencyPersistenceConfigError) as refused:
        open_persistence_layer(url)
    scheme = url.partition("://")[0] if "://" in url else ""
    assert f"scheme {scheme!r} " in str(refused.value)
    assert "secret" not in str(refused.value)


def test_only_the_layer_that_is_named_is_imported() -> None:
    code = """if True:
        import sys
        from aidem.persistence import open_persistence_layer
        assert "aidem.persistence.memory" not in sys.modules
        open_persistence_layer("memory://")
        assert "aidem.persistence.memory" in sys.modules
        assert "aidem.persistence.sqlite" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- Parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite:///records.sqlite3?mode=ro", "'mode' of this URL is not known; write in_application_database"),
        ("sqlite:///records.sqlite3?in_application_database=1", "must be true or false"),
        ("dynamodb://table?secret_attr=x", "'secret_attr' of this URL is not known; write data_attr, "),
        ("dynamodb://table?region=a&region=b", "'region' is in this URL more than once"),
        ("dynamodb://table?owner_attr=", "one of them is empty"),
        ("dynamodb://?region=a", "names no persistence layer"),
        ("redis://host/0?owner_attr=a&owner_attr=b", "'owner_attr' is in this URL more than once"),
        ("redis://host/0?owner_attr=fence", "used more than once"),
        ("redis://host/0?owner_attr=a&secret=b", "no option that redis-py does not know"),
    ],
)
def test_a_parameter_that_is_not_known_is_refused(url: str, message: str) -> None:
    with pytest.raises(IdempotencyPersistenceConfigError, match=message):
        open_persistence_layer(url)


async def test_records_can_be_in_the_database_of_an_application(tmp_path: Path) -> None:
    layer = open_persistence_layer(f"sqlite:///{tmp_path}/app.sqlite3?in_application_database=true")
    async with layer:
        await layer.acquire(claim_of("key", now=0), now=0)
    with closing(sqlite3.connect(tmp_path / "app.sqlite3")) as connection:
        assert connection.execute("SELECT id FROM aidem_records").fetchall() == [("key",)]
