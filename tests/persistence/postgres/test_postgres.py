"""What the layer does at the server, beyond the contract: statements, what they write, purge, and what is refused."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from typing import Any

import pytest

from aidem._rules.lifecycle import Blocked, Claimed
from aidem._rules.record import RecordStatus
from aidem.exceptions import (
    IdempotencyInvalidStatusError,
    IdempotencyPersistenceConfigError,
    IdempotencyPersistenceConnectionError,
    IdempotencyPersistenceLayerError,
    IdempotencySerializationError,
)
from aidem.persistence import open_persistence_layer
from aidem.persistence.postgres import MAX_RESULT_CHARACTERS, PostgresPersistenceLayer
from aidem.testing import FakeClock, claim_of, completed_of
from tests.support.postgres import PostgresServer, acquired, claimed, completed, failing, until
from tests.support.proxy import Proxy

pytestmark = pytest.mark.server
CLAIMERS = 200


def without_purge(layer: PostgresPersistenceLayer) -> PostgresPersistenceLayer:
    layer._next_purge_at = math.inf
    return layer


async def purged(layer: PostgresPersistenceLayer, key: str) -> None:
    """Purge once, by a claim, which needs no less than that no purge was started within a second."""
    layer._next_purge_at = 0.0
    await claimed(layer, key)
    await layer.aclose()  # which waits for what is under way


# --- Statements -------------------------------------------------------------------------------------------------------


async def test_a_claim_a_completion_and_a_replay_are_one_round_trip_each(server: PostgresServer, client: Any) -> None:
    async with Proxy.to(server.port) as proxy:
        layer = without_purge(PostgresPersistenceLayer(server.url.replace(f":{server.port}", f":{proxy.port}")))
        for key in ("warm", "key"):
            proxy.requests.clear()
            claim = await claimed(layer, key)
            assert await completed(layer, claim)
            assert isinstance(await acquired(layer, key, "another"), Blocked)
            assert await layer.renew(claim, now=0) is None
            assert not await layer.release(claim)
        assert len(proxy.requests) == 5
        await layer.aclose()


async def test_a_replay_writes_nothing(layer: PostgresPersistenceLayer, client: Any) -> None:
    """Neither to the log, nor a lock to the row, nor does it take a transaction id."""
    facts = "SELECT pg_current_wal_insert_lsn(), pg_snapshot_xmax(pg_current_snapshot()), xmin, xmax FROM aidem_records"
    await completed(layer, await claimed(without_purge(layer)))
    before = await client.fetchrow(facts)
    for number in range(20):
        assert isinstance(await acquired(layer, owner=f"{number}"), Blocked)
    assert await client.fetchrow(facts) == before
    await claimed(layer, "another")
    [after, *_] = await client.fetch(facts)
    assert after[0] > before[0], "this would not have been noticed"
    assert after[1] > before[1]


async def test_a_claim_that_blocks_is_left_without_a_lock_too(layer: PostgresPersistenceLayer, client: Any) -> None:
    await claimed(without_purge(layer))
    before = await client.fetchrow("SELECT pg_current_wal_insert_lsn(), xmin, xmax FROM aidem_records")
    assert isinstance(await acquired(layer, owner="another"), Blocked)
    assert await client.fetchrow("SELECT pg_current_wal_insert_lsn(), xmin, xmax FROM aidem_records") == before


async def test_updates_are_heap_only(server: PostgresServer, client: Any) -> None:
    """What is indexed stays as it is from the claim on, so no index entry is written again."""
    layer = without_purge(PostgresPersistenceLayer(server.url, table="hot"))
    await layer.create_table()
    for number in range(20):
        claim = await claimed(layer, f"{number}")
        await layer.renew(claim_of(f"{number}", now=0, lease_seconds=100, kept_seconds=200), now=0)
        await completed(layer, claim)
    await client.execute("SELECT pg_stat_force_next_flush()")

    async def are_counted() -> bool:
        await client.execute("SELECT pg_stat_clear_snapshot()")
        return bool(await client.fetchval("SELECT n_tup_upd >= 40 FROM pg_stat_user_tables WHERE relname = 'hot'"))

    await layer.aclose()  # a session reports its counts at its end
    await until(are_counted)
    counts = "SELECT n_tup_hot_upd::float / n_tup_upd FROM pg_stat_user_tables WHERE relname = 'hot'"
    assert await client.fetchval(counts) > 0.9
    await client.execute("DROP TABLE hot")


async def test_among_many_claimers_a_lost_race_is_rare_and_one_gets_the_key(
    server: PostgresServer, client: Any
) -> None:
    async with Proxy.to(server.port) as proxy:
        layers = [
            without_purge(PostgresPersistenceLayer(server.url.replace(f":{server.port}", f":{proxy.port}")))
            for _ in range(4)
        ]
        for layer in layers:  # warm, so that they meet
            await asyncio.gather(*(claimed(layer, f"{id(layer)} {number}") for number in range(10)))
        proxy.requests.clear()
        answers = await asyncio.gather(*(acquired(layers[number % 4], owner=f"{number}") for number in range(CLAIMERS)))
        assert [type(answer) for answer in answers].count(Claimed) == 1
        assert len({answer.record for answer in answers}) == 1
        assert len(proxy.requests) <= 1.5 * CLAIMERS
        for layer in layers:
            await layer.aclose()


async def test_the_clock_is_that_of_the_statement_not_of_a_transaction(server: PostgresServer, client: Any) -> None:
    """`now()` would stand still, and a lease last for ever, for whoever asks within a transaction."""
    layer = without_purge(PostgresPersistenceLayer(server.url, max_connections=1))
    await claimed(layer, lease_seconds=0)
    [connection] = layer._sources.here()._open  # type: ignore[attr-defined]
    async with connection.driver.transaction():
        await layer.get("key")  # from here on now() stands still
        await claimed(layer, "short", lease_seconds=0)
        await asyncio.sleep(0.01)
        answer = await acquired(layer, "short", "another")
        assert isinstance(answer, Claimed)
        assert answer.taken_over
    await layer.aclose()


# --- Another try ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["40001", "40P01"])
async def test_a_statement_that_could_not_be_serialized_is_sent_again(
    layer: PostgresPersistenceLayer, client: Any, state: str
) -> None:
    async with failing(client, state, times=6):
        claim = await claimed(layer)
        assert await client.fetchval("SELECT last_value FROM failures") == 7
        assert await completed(layer, claim)


async def test_a_statement_that_is_never_serialized_fails_in_time_and_was_not_applied(
    server: PostgresServer, client: Any
) -> None:
    layer = PostgresPersistenceLayer(server.url, timeout_seconds=2.0)
    async with failing(client, "40001"):
        with pytest.raises(IdempotencyPersistenceConnectionError, match="kept failing to serialize") as failed:
            await claimed(layer)
        assert not failed.value.may_be_applied
        assert await client.fetchval("SELECT last_value FROM failures") > 3
    await layer.aclose()


# --- What is left of records ------------------------------------------------------------------------------------------


async def test_a_key_that_was_released_keeps_its_fence_until_it_is_purged(
    layer: PostgresPersistenceLayer, client: Any
) -> None:
    claim = await claimed(without_purge(layer), payload_hash="hash")
    await client.execute("UPDATE aidem_records SET fence = fence + 1000000000")  # as of a server whose clock was ahead
    assert await layer.release(claim)
    assert await layer.get("key") is None
    row = dict(await client.fetchrow("SELECT * FROM aidem_records"))
    assert {name for name, value in row.items() if value is not None} == {
        *("id", "status", "expiration", "fence", "purge_after"),
    }
    assert (await claimed(layer, owner="another")).fence == claim.fence + 1000000001


async def test_an_outcome_over_a_record_that_has_expired_or_was_released_lowers_no_fence(
    layer: PostgresPersistenceLayer, client: Any
) -> None:
    old = await claimed(without_purge(layer))
    await client.execute("UPDATE aidem_records SET fence = fence + 1000000000")
    await layer.release(old)
    assert await completed(layer, old)
    assert await client.fetchval("SELECT fence FROM aidem_records") == old.fence + 1000000000


async def test_a_claim_without_expiry_is_released_and_purged_like_others(
    layer: PostgresPersistenceLayer, client: Any
) -> None:
    record = claim_of("key", now=0).replace(expiry_timestamp=None)
    answer = await without_purge(layer).acquire(record, now=0)
    assert isinstance(answer, Claimed)
    assert answer.record.expiry_timestamp is None
    assert await client.fetchval("SELECT purge_after FROM aidem_records") is None
    assert await layer.release(answer.record)
    await client.execute("UPDATE aidem_records SET expiration = expiration - 5, purge_after = purge_after - 5")
    await purged(layer, "another")
    assert await client.fetchval("SELECT count(*) FROM aidem_records WHERE id = 'key'") == 0


async def test_what_has_expired_is_purged_and_what_was_completed_later_is_not(
    server: PostgresServer, client: Any
) -> None:
    clock = FakeClock()
    layer = PostgresPersistenceLayer(server.url, clock=clock)
    for key in ("expired", "released", "completed", "renewed", "running"):
        await layer.acquire(claim_of(key, now=clock(), kept_seconds=60), now=clock())
    await layer.release(claim_of("released", now=clock()))
    clock.advance(100)
    done = completed_of(claim_of("completed", now=clock()), now=clock(), kept_seconds=60)
    assert await layer.complete(done, now=clock())
    renewal = claim_of("renewed", now=clock(), lease_seconds=50, kept_seconds=60)
    assert await layer.renew(renewal, now=clock()) is not None
    clock.advance(30)
    layer._next_purge_at = 0.0
    await layer.acquire(claim_of("new", now=clock(), kept_seconds=60), now=clock())
    await layer.aclose()
    left = {key for (key,) in await client.fetch("SELECT id FROM aidem_records")}
    assert left == {"completed", "renewed", "new"}


async def test_a_purge_takes_more_than_was_claimed_since_the_last_one_and_comes_once_a_second(
    layer: PostgresPersistenceLayer, client: Any
) -> None:
    insert = (
        "INSERT INTO aidem_records (id, status, fence, expiration, purge_after) SELECT i, 'COMPLETED', 1, 1, 1 FROM"
    )
    await client.execute(f"{insert} generate_series(1, 1500) i")
    without_purge(layer)
    await asyncio.gather(*(claimed(layer, f"new {number}") for number in range(99)))
    assert await client.fetchval("SELECT count(*) FROM aidem_records WHERE expiration = 1") == 1500
    await purged(layer, "one more")
    assert await client.fetchval("SELECT count(*) FROM aidem_records WHERE expiration = 1") == 300
    await claimed(layer, "at once")
    await layer.aclose()
    assert await client.fetchval("SELECT count(*) FROM aidem_records WHERE expiration = 1") == 300


async def test_a_purge_that_fails_is_logged_once_and_fails_no_call(
    layer: PostgresPersistenceLayer, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await client.execute(
        "INSERT INTO aidem_records (id, status, fence, expiration, purge_after) VALUES ('a', '', 1, 1, 1)"
    )
    await client.execute("CREATE TABLE refers (id text REFERENCES aidem_records)")
    await client.execute("INSERT INTO refers VALUES ('a')")
    caplog.set_level(logging.WARNING, "aidem")
    try:
        for number in range(2):
            await purged(layer, f"{number}")
    finally:
        await client.execute("DROP TABLE refers")
    [record] = caplog.records
    assert "records that have expired could not be removed: PostgreSQL answered SQLSTATE 23503" in record.getMessage()


# --- What is refused --------------------------------------------------------------------------------------------------


async def test_a_record_that_this_aidem_does_not_know_is_refused(layer: PostgresPersistenceLayer, client: Any) -> None:
    await client.execute("INSERT INTO aidem_records (id, status, fence) VALUES ('key', 'PAUSED', 1)")
    with pytest.raises(IdempotencyInvalidStatusError, match=r"'PAUSED'.*forget") as refused:
        await acquired(layer)
    assert refused.value.key == "key"
    await layer.forget("key")
    await claimed(layer)


async def test_what_cannot_be_read_is_left_out_of_a_scan_and_what_was_released_is_not_purged_as_a_record(
    layer: PostgresPersistenceLayer, client: Any
) -> None:
    without_purge(layer)
    await claimed(layer, "key")
    await layer.release(await claimed(layer, "released"))
    await client.execute("INSERT INTO aidem_records (id, status, fence) VALUES ('unknown', 'PAUSED', 1)")
    assert [record.idempotency_key async for record in layer.scan()] == ["key"]
    await client.execute("UPDATE aidem_records SET expiration = 1")
    assert await layer.purge() == 2
    assert await client.fetchval("SELECT count(*) FROM aidem_records") == 0


async def test_a_scan_of_a_prefix_reads_no_more_pages_than_it_has(server: PostgresServer, client: Any) -> None:
    await client.execute(
        "INSERT INTO aidem_records (id, status, fence) "
        "SELECT prefix || i, 'COMPLETED', 1 FROM generate_series(1, 1000) i, unnest(ARRAY['a#', 'b#', 'c#']) prefix"
    )
    async with Proxy.to(server.port) as proxy:
        layer = PostgresPersistenceLayer(server.url.replace(f":{server.port}", f":{proxy.port}"))
        assert len([record async for record in layer.scan(prefix="b#", limit=1)]) == 1
        proxy.requests.clear()
        assert len([record async for record in layer.scan(prefix="b#")]) == 1000
        assert len(proxy.requests) == 11
        await layer.aclose()


async def test_a_result_that_is_too_large_is_refused_before_it_is_sent(layer: PostgresPersistenceLayer) -> None:
    claim = await claimed(layer)
    with pytest.raises(IdempotencySerializationError, match="67108865 characters"):
        await completed(layer, claim, "x" * (MAX_RESULT_CHARACTERS + 1))


async def test_a_large_result_is_kept(layer: PostgresPersistenceLayer) -> None:
    text = json.dumps("long " * 1_000_000)
    assert await completed(layer, await claimed(layer), text)
    answer = await acquired(layer)
    assert answer.record.response_data == text
    assert answer.record.status is RecordStatus.COMPLETED


@pytest.mark.parametrize(
    ("key", "problem"), [("a\0b", "NUL character"), ("".join(map(chr, range(256, 10_000))), "too long for an index")]
)
async def test_a_key_that_cannot_be_stored_is_refused(layer: PostgresPersistenceLayer, key: str, problem: str) -> None:
    with pytest.raises(IdempotencyPersistenceConfigError, match=problem):
        await acquired(layer, key)


async def test_a_url_names_the_layer(server: PostgresServer, client: Any) -> None:
    for scheme in ("postgresql", "postgres"):
        layer = open_persistence_layer(server.url.replace("postgresql", scheme))
        assert isinstance(layer, PostgresPersistenceLayer)
        async with layer:
            await claimed(layer, scheme)


@pytest.mark.parametrize("url", ["", "postgres", "postgresql+asyncpg://user:secret@host/", "mysql://user:secret@host/"])
def test_a_url_of_something_else_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(IdempotencyPersistenceConfigError, match="needs a URL") as refused:
        PostgresPersistenceLayer(url)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"url": object()}, "url must be text"),
        ({"url": "postgresql://host/", "max_connections": 0}, "max_connections=0: it must be 1 or more"),
        ({"url": "postgresql://host/", "pool": object()}, "pass no url and no prepared_statements beside it"),
        ({"pool": object(), "prepared_statements": True}, "pass no url and no prepared_statements beside it"),
        ({"pool": object()}, r"asyncpg.Pool, a .* not builtins\.object"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(IdempotencyPersistenceConfigError, match=problem):
        PostgresPersistenceLayer(**options)


async def test_a_url_that_the_driver_does_not_take_is_refused_and_not_shown() -> None:
    layer = PostgresPersistenceLayer("postgresql://user:secret@host:port/")
    with pytest.raises(IdempotencyPersistenceConfigError, match="does not take the URL") as refused:
        await layer.open()
    assert "secret" not in str(refused.value)


async def test_two_layers_share_a_table(server: PostgresServer, layer: PostgresPersistenceLayer, client: Any) -> None:
    async with PostgresPersistenceLayer(server.url) as other:
        claim = await claimed(layer)
        assert (await acquired(other, owner="another")).record == claim
        assert await completed(other, claim)
        assert isinstance(await acquired(layer), Blocked)


async def test_an_unexpected_answer_of_the_server_is_named_by_its_state(
    layer: PostgresPersistenceLayer, client: Any
) -> None:
    async with failing(client, "P0001"):
        with pytest.raises(
            IdempotencyPersistenceLayerError, match="SQLSTATE P0001, which aidem did not expect"
        ) as failed:
            await acquired(layer)
    assert type(failed.value) is IdempotencyPersistenceLayerError
    assert failed.value.may_be_applied
    assert "for a test" not in str(failed.value)
