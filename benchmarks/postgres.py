"""PostgreSQL: against the same statements by hand on asyncpg's pool, and against idemkit."""

from __future__ import annotations

import asyncio
import json
import warnings
from contextlib import AsyncExitStack, ExitStack
from typing import TYPE_CHECKING, Any

import asyncpg
import idemkit
from idemkit.backends.postgres import init_pg

from aidem import idempotent_function
from aidem.persistence.postgres import PostgresPersistenceLayer
from aidem.persistence.postgres._statements import Statements, Verdict
from aidem.persistence.postgres._table import Table
from benchmarks._measure import first_and_replay, fresh_keys, race, spread
from benchmarks._rows import Row, at_least, at_most, exactly
from benchmarks._servers import postgres_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks._measure import Call, Effort, Stopwatch

RAW = "asyncpg's pool"
WITHOUT_RESET = "a pool without reset"
IDEMKIT = "idemkit"
COUNTED_CALLS = 100
OWNER = "0123456789abcdef0123456789abcdef"
KEPT_MILLISECONDS, LEASE_MILLISECONDS = 3_600_000, 30_000

warnings.filterwarnings("ignore", message=".* has no scope")


def rows(effort: Effort) -> Iterator[Row]:
    with postgres_server() as url, asyncio.Runner() as runner, ExitStack() as cleanup:
        stack = AsyncExitStack()
        cleanup.callback(lambda: runner.run(stack.aclose()))
        ours, calls = runner.run(_ours(url, stack)), effort.calls(1000)

        def contender(call: Call, *tasks: int) -> Callable[[Stopwatch], None]:
            return lambda stopwatch: runner.run(first_and_replay(stopwatch, call, calls=calls, tasks=tasks))

        result = race(
            {
                "aidem": contender(ours, 32, 1),
                RAW: contender(runner.run(_raw(url, stack)), 32, 1),
                WITHOUT_RESET: contender(runner.run(_raw(url, stack, connection_class=_NeverReset)), 32, 1),
                IDEMKIT: contender(runner.run(_idemkit(url, stack)), 32, 1),
            },
            rounds=effort.rounds(11),
        )
        for what, lap in (("first calls", "first"), ("replays", "replay")):
            for against in (RAW, WITHOUT_RESET, IDEMKIT):
                is_judged = against == RAW
                yield result.rates(
                    f"{what}, 32 tasks",
                    lap=f"{lap}/32",
                    against=against,
                    by="wall",
                    target=at_least(1.0) if is_judged else None,
                )
                yield result.times(
                    f"{what}, one task",
                    lap=f"{lap}/1",
                    against=against,
                    by="wall",
                    target=at_most(1.1) if is_judged else None,
                )
        first, replay = runner.run(_statements(url, ours))
        yield Row(what="statements of a first call", ours=first, unit="statements", target=exactly(2))
        yield Row(what="statements of a replay", ours=replay, unit="statements", target=exactly(1))


async def _ours(url: str, stack: AsyncExitStack) -> Call:
    layer = PostgresPersistenceLayer(url)
    await layer.create_table()
    await stack.enter_async_context(layer)

    @idempotent_function(data_keyword_argument="order", persistence_store=layer)
    async def pay(order: str) -> dict[str, bool]:  # noqa: ARG001 - the key
        return {"paid": True}

    return pay


class _NeverReset(asyncpg.Connection):
    def get_reset_query(self) -> str:
        return ""


async def _raw(url: str, stack: AsyncExitStack, **options: Any) -> Call:
    """Run our own statements, on a pool as one would have it, with as many connections as the layer has."""
    table = Table("written_by_hand")
    statements = Statements(table)
    pool = await stack.enter_async_context(asyncpg.create_pool(url, min_size=10, max_size=10, **options))
    for statement in table.statements():
        await pool.execute(statement)

    async def pay(order: str) -> object:
        key = f"test-func.benchmarks.postgres.pay#{order:0>64}"
        row = await pool.fetchrow(
            statements.acquire.text, key, None, OWNER, KEPT_MILLISECONDS, LEASE_MILLISECONDS, None, None, None
        )
        if row[1] == Verdict.REFUSED:
            return json.loads(row[6])
        result = {"paid": True}
        await pool.fetchrow(
            statements.complete.text, key, None, OWNER, KEPT_MILLISECONDS, json.dumps(result), None, None, row[9], None
        )
        return result

    return pay


async def _idemkit(url: str, stack: AsyncExitStack) -> Call:
    await init_pg(url)
    backend = await stack.enter_async_context(idemkit.PostgresBackend.from_url(url))

    @idemkit.idempotent(backend=backend, config=idemkit.MethodConfig(key_fields=["order"]))
    async def pay(order: str) -> dict[str, bool]:  # noqa: ARG001 - the key
        return {"paid": True}

    return pay


async def _statements(url: str, call: Call) -> list[float]:
    """Return how many statements the server has executed for a first call, and for a replay; without the purge."""
    keys, counts = fresh_keys(COUNTED_CALLS), []
    connection = await asyncpg.connect(url)
    for _ in ("first", "replay"):
        await connection.execute("SELECT pg_stat_statements_reset()")
        await spread(call, keys, tasks=32)
        await asyncio.sleep(0.1)
        count = await connection.fetchval(
            "SELECT sum(calls) FROM pg_stat_statements WHERE query LIKE '%aidem_records%' AND query NOT LIKE '%DELETE%'"
        )
        counts.append(float(count) / COUNTED_CALLS)
    await connection.close()
    return counts
