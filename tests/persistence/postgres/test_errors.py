"""What servers, poolers and drivers say, and what callers get to hear."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import sys
from typing import Any

import asyncpg
import pytest
from sqlalchemy.exc import OperationalError

from aidem.exceptions import (
    IdempotencyPersistenceConfigError,
    IdempotencyPersistenceConnectionError,
    IdempotencyPersistenceLayerError,
)
from aidem.persistence.postgres import PostgresPersistenceLayer, _errors
from aidem.persistence.postgres._table import Table
from tests.support.listening import listening
from tests.support.postgres import PgBouncer, PostgresServer, acquired, claimed, failing, make_database

pytestmark = pytest.mark.server
CONNECTION = IdempotencyPersistenceConnectionError
CONFIG = IdempotencyPersistenceConfigError


@pytest.mark.parametrize(
    ("state", "kind", "text", "may_be_applied"),
    [
        ("53100", CONNECTION, "its disk is full", False),
        ("53200", CONNECTION, "lacks resources", False),
        ("53300", CONNECTION, "no connection to spare", False),
        ("57014", CONNECTION, "the statement was cancelled", True),
        ("57P01", CONNECTION, "was shut down", True),
        ("58030", CONNECTION, "cannot read or write its files", False),
        ("25006", CONNECTION, "takes no writes", False),
        ("55P03", CONNECTION, "lock_timeout", False),
        ("08006", CONNECTION, "the connection failed", True),
        ("42501", CONFIG, "GRANT SELECT", False),
        ("42703", CONFIG, "CREATE TABLE IF NOT EXISTS", False),
        ("42P10", CONFIG, "CREATE TABLE IF NOT EXISTS", False),
        ("23514", CONFIG, "not with the columns that aidem needs", False),
        ("28P01", CONFIG, "does not accept the user or the password", False),
        ("XX000", IdempotencyPersistenceLayerError, "did not expect", True),
    ],
)
async def test_an_error_of_the_server_is_translated_by_its_state(  # noqa: PLR0917 - a row of the table
    server: PostgresServer, client: Any, state: str, kind: type[Exception], text: str, may_be_applied: bool
) -> None:
    layer = PostgresPersistenceLayer(server.url)
    async with failing(client, state):
        with pytest.raises(IdempotencyPersistenceLayerError, match=text) as failed:
            await acquired(layer)
    assert type(failed.value) is kind
    assert failed.value.may_be_applied is may_be_applied
    assert isinstance(failed.value.__cause__, asyncpg.PostgresError)
    assert "for a test" not in str(failed.value)
    await claimed(layer)
    await layer.aclose()


async def test_a_server_that_does_not_listen_is_an_outage_in_which_nothing_was_applied(vacant_port: int) -> None:
    layer = PostgresPersistenceLayer(f"postgresql://user:secret@127.0.0.1:{vacant_port}/")
    for _ in range(2):
        with pytest.raises(CONNECTION, match="cannot be reached") as failed:
            await acquired(layer)
        assert not failed.value.may_be_applied
        assert "secret" not in str(failed.value)


async def test_each_of_many_callers_gets_an_error_of_its_own(vacant_port: int) -> None:
    layer = PostgresPersistenceLayer(f"postgresql://127.0.0.1:{vacant_port}/")
    errors = await asyncio.gather(*(acquired(layer, f"{n}") for n in range(30)), return_exceptions=True)
    assert len({id(error) for error in errors}) == 30
    assert {type(error) for error in errors} == {CONNECTION}
    assert all(isinstance(error, CONNECTION) and not error.may_be_applied for error in errors)


async def test_a_server_that_does_not_answer_is_an_outage(server: PostgresServer) -> None:
    asked = asyncio.Event()

    async def say_nothing(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        asked.set()
        await asyncio.Event().wait()

    async with listening(say_nothing) as port:
        layer = PostgresPersistenceLayer(f"postgresql://127.0.0.1:{port}/?sslmode=disable", timeout_seconds=1)
        with pytest.raises(CONNECTION, match="no answer within 1 s") as failed:
            await layer.open()
        assert not failed.value.may_be_applied
        assert asked.is_set()


async def test_a_database_that_does_not_exist_is_a_wrong_setting(server: PostgresServer) -> None:
    layer = PostgresPersistenceLayer(server.url.replace("/postgres", "/nowhere"))
    with pytest.raises(CONFIG, match="the database does not exist"):
        await layer.open()


async def test_a_user_that_does_not_exist_is_a_wrong_setting(server: PostgresServer) -> None:
    layer = PostgresPersistenceLayer(server.url.replace("aidem@", "nobody:secret@"))
    with pytest.raises(CONFIG, match="does not accept the user or the password") as failed:
        await layer.open()
    assert "secret" not in str(failed.value)


async def test_a_server_that_speaks_no_tls_is_an_outage(server: PostgresServer) -> None:
    layer = PostgresPersistenceLayer(server.url.replace("sslmode=disable", "sslmode=require"))
    with pytest.raises(CONNECTION, match="sslmode"):
        await layer.open()


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ssl.SSLCertVerificationError("secret"), CONFIG, "does not trust its certificate"),
        (ssl.SSLError("secret"), CONNECTION, "cannot be reached"),
        (OSError("secret"), CONNECTION, "cannot be reached"),
    ],
)
def test_what_fails_while_connecting_is_translated(error: Exception, kind: type[Exception], text: str) -> None:
    failure = _errors.connecting_failed(error, Table("records"), timeout_seconds=5)
    assert type(failure) is kind
    assert text in str(failure)
    assert "secret" not in str(failure)
    assert not failure.may_be_applied


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OperationalError("secret", None, Exception("secret")), CONNECTION),
        (asyncpg.InterfaceError("secret"), CONNECTION),
        (asyncpg.InternalClientError("secret"), CONNECTION),
        (ConnectionResetError("secret"), CONNECTION),
        (ZeroDivisionError("secret"), IdempotencyPersistenceLayerError),
    ],
)
def test_what_a_driver_says_by_itself_is_translated(error: Exception, kind: type[Exception]) -> None:
    failure = _errors.translated(error, Table("records"))
    assert type(failure) is kind
    assert failure.may_be_applied
    assert failure.__cause__ is error
    assert "secret" not in str(failure)


async def test_a_server_that_takes_no_writes_is_an_outage(server: PostgresServer, client: Any) -> None:
    url = await make_database(server, "readonly")
    layer = PostgresPersistenceLayer(url)
    await layer.create_table()
    await layer.aclose()
    await client.execute("ALTER DATABASE readonly SET default_transaction_read_only = on")
    with pytest.raises(CONNECTION, match="takes no writes"):
        await acquired(layer)
    await layer.aclose()


async def test_prepared_statements_behind_an_old_pooler_fail_with_the_setting_that_helps(
    pgbouncer: PgBouncer, client: Any
) -> None:
    layer = PostgresPersistenceLayer(pgbouncer.url, prepared_statements=True)
    answers = await asyncio.gather(*(acquired(layer, f"{n % 7}", f"{n}") for n in range(100)), return_exceptions=True)
    failures = [answer for answer in answers if isinstance(answer, BaseException)]
    assert failures
    for failure in failures:
        assert isinstance(failure, CONFIG)
        assert "prepared_statements=False, or a pool of your own statement_cache_size=0" in str(failure)
    await layer.aclose()


def test_a_url_without_asyncpg_says_how_to_install_it() -> None:
    code = """if True:
        import sys
        sys.modules["asyncpg"] = None
        from aidem.persistence.postgres import PostgresPersistenceLayer
        try:
            PostgresPersistenceLayer("postgresql://host/")
        except ImportError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "needs asyncpg for a URL: install aidem-idempotency[postgres]" in done.stdout
