"""The table is made, recognised, and refused with what helps."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from aidem.exceptions import (
    IdempotencyPersistenceConfigError,
    IdempotencyPersistenceConnectionError,
    IdempotencyPersistenceLayerError,
)
from aidem.persistence.postgres import PostgresPersistenceLayer, _checks, table_ddl
from aidem.persistence.postgres._table import Table
from tests.support.postgres import PostgresServer, acquired, claimed, connected, make_database, started

pytestmark = pytest.mark.server
ROOT = Path(__file__).parents[3]


@pytest.fixture
async def url(server: PostgresServer) -> str:
    """An empty database."""
    return await make_database(server, "empty")


@pytest.fixture
async def empty(url: str) -> AsyncGenerator[Any]:
    async with connected(url) as client:
        yield client


@pytest.fixture
async def make_layer(url: str) -> AsyncGenerator[Callable[..., PostgresPersistenceLayer]]:
    layers = list[PostgresPersistenceLayer]()

    def make(url: str = url, **options: Any) -> PostgresPersistenceLayer:
        layers.append(PostgresPersistenceLayer(url, **options))
        return layers[-1]

    yield make
    for layer in layers:
        await layer.aclose()


MakeLayer = Callable[..., PostgresPersistenceLayer]


async def test_a_table_can_be_made_before_and_inside_async_with_and_more_than_once(
    make_layer: MakeLayer, empty: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with make_layer() as layer:
        assert "does not exist in this database" in caplog.text
        await layer.create_table()
        await claimed(layer)
    await make_layer().create_table()
    assert await empty.fetchval("SELECT count(*) FROM aidem_records") == 1


async def test_a_table_that_many_create_at_once_is_created(make_layer: MakeLayer, empty: Any) -> None:
    layers = [make_layer() for _ in range(20)]
    await asyncio.gather(*(layer.open() for layer in layers), return_exceptions=True)  # connected, so that they meet
    await asyncio.gather(*(layer.create_table() for layer in layers))
    await claimed(layers[0])


async def test_a_table_that_another_creates_at_the_same_moment_is_created(
    make_layer: MakeLayer, empty: Any, url: str
) -> None:
    layer = make_layer()
    async with connected(url) as observer:
        async with empty.transaction():
            await empty.execute(table_ddl())
            creating = asyncio.create_task(layer.create_table())
            waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            while not await observer.fetchval(waiting):  # noqa: ASYNC110 in the server
                await asyncio.sleep(0.01)
        await creating
    assert await claimed(layer)


async def test_the_ddl_for_a_migration_is_what_create_table_runs(make_layer: MakeLayer, empty: Any) -> None:
    await empty.execute("CREATE SCHEMA app")
    await empty.execute(table_ddl("app.Records"))
    async with make_layer(table="app.Records") as layer:
        await claimed(layer)
    assert await empty.fetchval('SELECT count(*) FROM app."Records"') == 1
    indexes = await empty.fetch("SELECT indexdef FROM pg_indexes WHERE schemaname = 'app' ORDER BY indexdef")
    assert [index[0].partition(" USING ")[2] for index in indexes] == ["btree (purge_after)", "btree (id)"]
    options = await empty.fetchval("SELECT reloptions FROM pg_class WHERE relname = 'Records'")
    assert options == ["fillfactor=70"]


def test_the_ddl_in_the_docs_is_that_of_the_code() -> None:
    assert table_ddl() in (ROOT / "docs" / "postgres.md").read_text(encoding="utf-8")


async def test_the_record_is_stored_under_the_names_of_the_wire_format_and_the_result_as_its_text(
    make_layer: MakeLayer, empty: Any
) -> None:
    await make_layer().create_table()
    await claimed(make_layer(), payload_hash="hash")
    row = dict(await empty.fetchrow("SELECT * FROM aidem_records"))
    assert row["purge_after"] == row["expiration"] + 60
    assert row["in_progress_expiration"] > row["expiration"] * 1000 - 60_000
    assert {name: row[name] for name in ("id", "status", "owner", "validation", "data", "outcome", "note")} == {
        "id": "key",
        "status": "INPROGRESS",
        "owner": "ours",
        "validation": "hash",
        "data": None,
        "outcome": None,
        "note": None,
    }


@pytest.mark.parametrize("name", ["", ".", "a.", ".b", "a.b.c", "a\0b", "x" * 52, "é" * 26])
def test_a_name_that_is_none_of_a_table_is_refused(name: str) -> None:
    with pytest.raises(IdempotencyPersistenceConfigError, match="names no table"):
        table_ddl(name)


async def test_a_name_cannot_leave_its_quotes(make_layer: MakeLayer, empty: Any) -> None:
    name = 'a"; DROP TABLE b; --'
    await empty.execute("CREATE TABLE b ()")
    layer = make_layer(table=name)
    await layer.create_table()
    await layer.open()
    await claimed(layer)
    assert await empty.fetchval("SELECT count(*) FROM b") == 0


# --- What is found at open() ------------------------------------------------------------------------------------------


async def test_a_missing_table_is_found_at_open_with_the_ddl_in_the_message(make_layer: MakeLayer) -> None:
    with pytest.raises(IdempotencyPersistenceConfigError) as found:
        await make_layer().open()
    assert "'aidem_records' does not exist in this database" in str(found.value)
    assert table_ddl() in str(found.value)


async def test_a_missing_table_is_found_by_the_first_use_too(make_layer: MakeLayer) -> None:
    with pytest.raises(IdempotencyPersistenceConfigError) as found:
        await acquired(make_layer())
    assert "SQLSTATE 42P01" in str(found.value)
    assert table_ddl() in str(found.value)


async def test_a_missing_column_is_found_with_the_statement_that_adds_it(make_layer: MakeLayer, empty: Any) -> None:
    await make_layer().create_table()
    await empty.execute("ALTER TABLE aidem_records DROP COLUMN note, DROP COLUMN fence")
    with pytest.raises(IdempotencyPersistenceConfigError) as found:
        await make_layer().open()
    *_, statement = str(found.value).split(":\n")
    assert statement == 'ALTER TABLE "aidem_records" ADD COLUMN fence bigint NOT NULL, ADD COLUMN note text;'
    await empty.execute(statement)
    await make_layer().open()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("ALTER TABLE aidem_records ALTER COLUMN data TYPE jsonb USING NULL", "has other types in data"),
        (
            "ALTER TABLE aidem_records ALTER COLUMN fence TYPE integer, ALTER COLUMN expiration TYPE numeric",
            "has other types in expiration, fence",
        ),
        ("ALTER TABLE aidem_records DROP CONSTRAINT aidem_records_pkey", "has no unique index on id"),
    ],
)
async def test_a_table_of_another_shape_is_refused_with_the_ddl(
    make_layer: MakeLayer, empty: Any, change: str, problem: str
) -> None:
    await make_layer().create_table()
    await empty.execute(change)
    with pytest.raises(IdempotencyPersistenceConfigError) as found:
        await make_layer().open()
    assert problem in str(found.value)
    assert table_ddl() in str(found.value)


async def test_a_table_of_somebody_whose_columns_are_varchar_with_more_of_them_is_taken(
    make_layer: MakeLayer, empty: Any
) -> None:
    await make_layer().create_table()
    await empty.execute("ALTER TABLE aidem_records ALTER COLUMN id TYPE varchar(200), ADD COLUMN created timestamptz")
    async with make_layer() as layer:
        await claimed(layer)


async def test_rights_that_are_missing_are_named(make_layer: MakeLayer, empty: Any, url: str) -> None:
    await make_layer().create_table()
    await empty.execute("DROP ROLE IF EXISTS reader")
    await empty.execute("CREATE ROLE reader LOGIN")
    with pytest.raises(IdempotencyPersistenceConfigError, match=r"or CREATE for create_table\(\)"):
        await make_layer(url.replace("aidem@", "reader@"), table="another").create_table()
    await empty.execute("GRANT SELECT, INSERT, UPDATE ON aidem_records TO reader")
    reader = make_layer(url.replace("aidem@", "reader@"))
    with pytest.raises(
        IdempotencyPersistenceConfigError, match='GRANT SELECT, INSERT, UPDATE, DELETE ON "aidem_records" TO'
    ):
        await reader.open()
    await claimed(reader)
    with pytest.raises(IdempotencyPersistenceConfigError, match="denies this user"):
        await reader.forget("key")
    await empty.execute("DROP OWNED BY reader; DROP ROLE reader")


async def test_what_endangers_records_is_logged_once(
    make_layer: MakeLayer, empty: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await make_layer().create_table()
    await empty.execute("ALTER TABLE aidem_records SET UNLOGGED")
    await empty.execute("ALTER DATABASE empty SET synchronous_commit = off")
    layer = make_layer()
    caplog.set_level(logging.WARNING, "aidem")
    for _ in range(2):
        await layer.open()
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [
        "PostgreSQL: table 'aidem_records' is not an ordinary one: PostgreSQL empties it after a crash",
        "PostgreSQL: fsync is off: a crash of its machine loses what was stored",  # as tests want it
        "PostgreSQL: synchronous_commit is off: a crash loses what was stored in the last moments",
    ]


async def test_a_diagnosis_tells_what_endangers_records(
    make_layer: MakeLayer, empty: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await make_layer().create_table()
    facts, problems = await make_layer().diagnose()
    assert facts["server"].startswith("PostgreSQL 1")
    assert facts["table"].startswith("aidem_records, ")
    assert facts["replicas"] == "0, none synchronous"
    assert facts["default_transaction_isolation"] == "read committed"
    as_tests_want_it = ["fsync is off", "full_page_writes is off", "autovacuum is off"]
    assert [problem.partition(":")[0] for problem in problems] == as_tests_want_it

    await empty.execute("ALTER TABLE aidem_records SET UNLOGGED")
    await empty.execute("ALTER TABLE aidem_records SET (autovacuum_enabled = false)")
    await empty.execute("ALTER DATABASE empty SET default_transaction_isolation = serializable")
    await empty.execute("ALTER DATABASE empty SET default_transaction_read_only = on")
    await empty.execute("ALTER DATABASE empty SET synchronous_commit = off")
    monkeypatch.setattr(time, "time", lambda: 0.0)
    facts, problems = await make_layer().diagnose()
    assert facts["default_transaction_isolation"] == "serializable"
    assert "autovacuum_enabled=false" in facts["options of the table"]
    expected = (
        *("is not an ordinary one", "fsync is off", "synchronous_commit is off", "behind the store's"),
        *("full_page_writes is off", "default_transaction_read_only is on"),
    )
    assert len(problems) == len(expected) + 1
    assert all(part in problem for part, problem in zip(expected, problems, strict=False))
    assert 'ALTER TABLE "aidem_records" RESET (autovacuum_enabled)' in problems[-1]


@pytest.mark.parametrize(
    ("options", "changed", "problem"),
    [
        ("none", {}, ""),
        ("fillfactor=70, autovacuum_enabled=false", {}, "autovacuum is off: table 'records' grows with every call"),
        ("none", {"autovacuum": "off"}, "autovacuum is off"),
        ("none", {"full_page_writes": "off"}, "full_page_writes is off"),
        ("none", {"default_transaction_read_only": "on"}, "default_transaction_read_only is on"),
    ],
)
def test_each_setting_that_endangers_records_is_a_problem_of_its_own(
    options: str, changed: dict[str, str], problem: str
) -> None:
    settings = dict.fromkeys(_checks.SETTINGS, "on") | {"default_transaction_read_only": "off"} | changed
    now_milliseconds, replicas, standby = int(time.time() * 1000), 2, "ANY 1 (a, b)"
    row = (now_milliseconds, replicas, options, "16 kB", 5, 1, "never", "17.2", standby, *settings.values())
    facts, problems = _checks.diagnosis(row, Table("records"), found=[])
    assert len(problems) == bool(problem)
    assert all(found.startswith(problem) for found in problems)
    assert facts["table"] == "records, 16 kB, about 5 rows and 1 dead ones, vacuumed never"
    assert facts["replicas"] == "2, synchronous: ANY 1 (a, b)"


async def test_a_replica_is_refused_whether_opened_or_not() -> None:
    with started("wal_level=replica") as standby:
        standby.stop()
        (standby.directory / "standby.signal").touch()
        standby.start()
        layer = PostgresPersistenceLayer(standby.url)
        for use in (layer.open, layer.create_table, lambda: layer.get("key")):
            with pytest.raises(IdempotencyPersistenceConnectionError, match="it is a replica") as refused:
                await use()
            assert not refused.value.may_be_applied
        await layer.aclose()
        async with asyncpg.create_pool(standby.url, min_size=1) as pool:
            with pytest.raises(IdempotencyPersistenceLayerError, match="it is a replica"):
                await PostgresPersistenceLayer(pool=pool).open()
