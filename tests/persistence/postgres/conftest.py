"""One server for all of these tests, and a table in it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest

from aidem.persistence.postgres import PostgresPersistenceLayer
from tests.support.postgres import PgBouncer, PostgresServer, connected, pgbouncer_to, started


@pytest.fixture(scope="session")
def server() -> Iterator[PostgresServer]:
    with started() as server:
        asyncio.run(_with_table(server))
        yield server


@pytest.fixture(scope="session")
def pgbouncer(server: PostgresServer) -> Iterator[PgBouncer]:
    with pgbouncer_to(server) as pgbouncer:
        yield pgbouncer


@pytest.fixture
async def client(server: PostgresServer) -> AsyncGenerator[Any]:
    """A connection that sees what is stored, which is nothing at first."""
    async with connected(server.url) as client:
        await client.execute("TRUNCATE aidem_records")
        yield client


@pytest.fixture
async def layer(server: PostgresServer, client: Any) -> AsyncGenerator[PostgresPersistenceLayer]:
    layer = PostgresPersistenceLayer(server.url)
    yield layer
    await layer.aclose()


async def _with_table(server: PostgresServer) -> None:
    layer = PostgresPersistenceLayer(server.url)
    await layer.create_table()
    await layer.aclose()
