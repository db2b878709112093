"""Records that an open transaction holds: nobody waits for it, and nobody takes them over, lapsed or not."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from aidem._rules.lifecycle import Blocked, Claimed
from aidem.exceptions import IdempotencyHeldByTransactionError, IdempotencyPersistenceConnectionError
from aidem.persistence.postgres import PostgresPersistenceLayer, _questions
from aidem.testing import claim_of
from tests.support.postgres import PostgresServer, acquired, claimed, completed, connected, until

pytestmark = pytest.mark.server
AT_ONCE_SECONDS = 4.5
"""Less than the transaction lasts and the layer would wait, and more than a slow machine takes."""
TIMEOUT_SECONDS = 2.0
"""How long is waited in vain."""

UPDATE = "UPDATE aidem_records SET status = 'COMPLETED', data = '1' WHERE id = 'key'"
LOCK = "SELECT FROM aidem_records WHERE id = 'key' FOR UPDATE"


@pytest.fixture
async def holder(server: PostgresServer, client: Any) -> AsyncGenerator[Any]:
    """A connection with an open transaction."""
    async with connected(server.url) as holder:
        transaction = holder.transaction()
        await transaction.start()
        yield holder
        if holder.is_in_transaction():
            await transaction.rollback()


async def test_a_claim_that_is_held_blocks_with_the_record_as_found_though_it_has_lapsed(
    layer: PostgresPersistenceLayer, holder: Any, client: Any
) -> None:
    claim = await claimed(layer, lease_seconds=0)
    await asyncio.sleep(0.01)
    await holder.execute(UPDATE)
    async with asyncio.timeout(AT_ONCE_SECONDS):
        answers = await asyncio.gather(*(acquired(layer, owner=f"{number}") for number in range(10)))
    assert {answer.record for answer in answers} == {claim}
    end = (claim.in_progress_expiry_timestamp or 0) / 1000
    assert all(isinstance(answer, Blocked) and end < (answer.now or 0) for answer in answers)


async def test_a_claim_that_is_held_blocks_though_it_has_expired(
    layer: PostgresPersistenceLayer, holder: Any, client: Any
) -> None:
    await claimed(layer, lease_seconds=0)
    await client.execute("UPDATE aidem_records SET expiration = 1")
    await holder.execute(UPDATE)
    async with asyncio.timeout(AT_ONCE_SECONDS):
        assert isinstance(await acquired(layer, owner="another"), Blocked)
    await holder.execute("ROLLBACK")
    assert isinstance(await acquired(layer, owner="another"), Claimed)


async def test_a_claim_that_was_held_and_is_free_again_is_taken_over_and_one_that_was_completed_is_replayed(
    layer: PostgresPersistenceLayer, holder: Any
) -> None:
    await claimed(layer, lease_seconds=0)
    await asyncio.sleep(0.01)
    await holder.execute(UPDATE)
    await holder.execute("ROLLBACK; BEGIN")
    answer = await acquired(layer, owner="another", lease_seconds=0)
    assert isinstance(answer, Claimed)
    assert answer.taken_over
    await holder.execute(UPDATE)
    await holder.execute("COMMIT")
    assert (await acquired(layer, owner="a third")).record.response_data == "1"


async def test_a_claim_that_another_makes_at_the_same_moment_is_found(
    layer: PostgresPersistenceLayer, holder: Any, client: Any
) -> None:
    claim = await claimed(layer, "of another key")
    copied = 'jsonb_populate_record(NULL::aidem_records, to_jsonb(r) || \'{"id": "key"}\')'
    await holder.execute(f"INSERT INTO aidem_records SELECT ({copied}).* FROM aidem_records r")
    acquiring = asyncio.create_task(acquired(layer, owner="another"))
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"

    async def is_waiting() -> bool:
        return bool(await client.fetchval(waiting) == 1)

    await until(is_waiting)  # for the key; then its statement finds it taken, by a record that it does not see
    await holder.execute("COMMIT")
    answer = await acquiring
    assert isinstance(answer, Blocked)
    assert answer.record == claim.replace(idempotency_key="key")


async def test_a_claim_that_is_held_is_not_taken_over_by_an_operator_with_force_neither(
    layer: PostgresPersistenceLayer, holder: Any
) -> None:
    claim = await claimed(layer, lease_seconds=0)
    resolver = claim_of("key", now=time.time(), owner="operator")
    await holder.execute(UPDATE)
    async with asyncio.timeout(AT_ONCE_SECONDS):
        for force in (False, True):
            assert await layer.take_over(claim, resolver, now=time.time(), force=force) is None
    await holder.execute("ROLLBACK")
    assert (await layer.take_over(claim, resolver, now=time.time()) or claim).owner == "operator"


@pytest.mark.parametrize("statement", [UPDATE, LOCK])
async def test_renew_and_release_say_at_once_that_a_transaction_holds_the_claim_and_change_nothing(
    layer: PostgresPersistenceLayer, holder: Any, statement: str
) -> None:
    claim = await claimed(layer)
    await holder.execute(statement)
    async with asyncio.timeout(AT_ONCE_SECONDS):
        for operation in (
            layer.renew(claim_of("key", now=time.time(), lease_seconds=99), now=time.time()),
            layer.release(claim),
        ):
            with pytest.raises(IdempotencyHeldByTransactionError, match="an open transaction holds") as held:
                await operation
            assert not held.value.may_be_applied
            assert held.value.record == claim
    await holder.execute("ROLLBACK")
    assert await layer.get("key") == claim
    assert await layer.release(claim)


async def test_whoever_is_not_the_owner_is_told_so_though_a_transaction_holds_the_claim(
    layer: PostgresPersistenceLayer, holder: Any
) -> None:
    claim = await claimed(layer)
    await holder.execute(UPDATE)
    other = claim.replace(owner="another")
    async with asyncio.timeout(AT_ONCE_SECONDS):
        assert await layer.renew(other, now=time.time()) is None
        assert not await layer.release(other)
        assert not await completed(layer, other)
        assert await layer.get("key") == claim


async def test_a_claim_that_another_statement_holds_for_a_moment_is_renewed_and_released(
    layer: PostgresPersistenceLayer, holder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_questions, "PAUSES_SECONDS", (0.01,) * 1000)  # the moment may be long
    claim = await claimed(layer)
    source: Any = layer._sources.here()
    renewal = claim_of("key", now=time.time(), lease_seconds=99)
    for operation in (lambda: layer.renew(renewal, now=time.time()), lambda: layer.release(claim)):
        await holder.execute(LOCK)
        answer = asyncio.ensure_future(operation())
        while not (source._paused or answer.done()):  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0)
        await holder.execute("ROLLBACK; BEGIN")
        assert await answer


async def test_an_outcome_that_has_expired_and_is_locked_is_never_replayed(
    server: PostgresServer, holder: Any, client: Any
) -> None:
    layer = PostgresPersistenceLayer(server.url, timeout_seconds=TIMEOUT_SECONDS)
    await completed(layer, await claimed(layer))
    await client.execute("UPDATE aidem_records SET expiration = 1")
    await holder.execute(LOCK)
    with pytest.raises(IdempotencyPersistenceConnectionError, match="has held the record for 2 s") as refused:
        await acquired(layer, owner="another")
    assert not refused.value.may_be_applied
    await holder.execute("ROLLBACK")
    assert isinstance(await acquired(layer, owner="another"), Claimed)
    await layer.aclose()


async def test_a_purge_leaves_what_is_held_and_takes_the_rest(
    layer: PostgresPersistenceLayer, holder: Any, client: Any
) -> None:
    layer._next_purge_at = math.inf
    for key in ("key", "other"):
        await claimed(layer, key)
    await client.execute("UPDATE aidem_records SET expiration = 1, purge_after = 1")
    await holder.execute(UPDATE)
    layer._next_purge_at = 0.0
    await claimed(layer, "new")
    async with asyncio.timeout(AT_ONCE_SECONDS):
        await layer.aclose()
    assert {key for (key,) in await client.fetch("SELECT id FROM aidem_records")} == {"key", "new"}


async def test_to_forget_waits_for_the_transaction_as_long_as_the_timeout_allows(
    server: PostgresServer, holder: Any, client: Any
) -> None:
    layer = PostgresPersistenceLayer(server.url, timeout_seconds=TIMEOUT_SECONDS)
    await claimed(layer)
    await holder.execute(LOCK)
    with pytest.raises(IdempotencyPersistenceConnectionError, match="did not answer within 2 s"):
        await layer.forget("key")
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%DELETE%'"
    await layer.aclose()

    async def is_cancelled() -> bool:
        return bool(await client.fetchval(waiting) == 0)

    await until(is_cancelled)  # the statement that was given up, at the server
    await holder.execute("ROLLBACK")
    await layer.forget("key")
    assert await layer.get("key") is None
    await layer.aclose()
