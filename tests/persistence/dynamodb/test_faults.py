"""What goes over the wire, and what becomes of an operation whose request or reply is lost there."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import pytest
from botocore.config import Config

from aidem import IdempotencyConfig, idempotent_function
from aidem._rules.lifecycle import Claimed
from aidem._rules.record import DataRecord
from aidem.exceptions import IdempotencyPersistenceConnectionError, IdempotencySerializationError
from aidem.persistence.dynamodb import DynamoDBPersistenceLayer
from aidem.testing import claim_of, completed_of
from tests.support.aws_servers import Database
from tests.support.proxy import Proxy

pytestmark = [pytest.mark.server, pytest.mark.timeout(60, func_only=True)]

NOW = 1_800_000_000.0
IMPATIENT = Config(retries={"total_max_attempts": 1}, read_timeout=1.0)


@pytest.fixture
async def proxy(database: Database, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Proxy]:
    """Stand between the layer and the server; `database` itself goes to the server."""
    async with Proxy.to(database.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_DYNAMODB", f"http://127.0.0.1:{proxy.port}")
        yield proxy


@pytest.fixture
async def layer(table: str, proxy: Proxy) -> AsyncGenerator[DynamoDBPersistenceLayer]:
    """Retries as every client of AWS does, on a connection that is warm."""
    layer = DynamoDBPersistenceLayer(table)
    await layer.get("other")
    proxy.requests.clear()
    yield layer
    await layer.aclose()


@pytest.fixture
async def impatient(table: str, proxy: Proxy) -> AsyncGenerator[DynamoDBPersistenceLayer]:
    """Gives up at once."""
    layer = DynamoDBPersistenceLayer(table, boto_config=IMPATIENT)
    await asyncio.wait_for(answered(lambda: layer.get("other")), 30)
    proxy.requests.clear()
    yield layer
    proxy.heal()
    await layer.aclose()


async def answered(operation: Callable[[], Awaitable[Any]]) -> Any:
    """Ask until there is an answer, as an emulator may be slower than an impatient client bears."""
    while True:
        with contextlib.suppress(IdempotencyPersistenceConnectionError):
            return await operation()


def operations(proxy: Proxy) -> list[str]:
    """Return what was asked, in order."""
    return re.findall(r"X-Amz-Target: DynamoDB_20120810\.(\w+)", b"".join(proxy.requests).decode())


async def claimed(layer: DynamoDBPersistenceLayer, *, owner: str = "ours") -> DataRecord:
    answer = await layer.acquire(claim_of("key", now=NOW, owner=owner), now=NOW)
    assert isinstance(answer, Claimed)
    return answer.record


# --- Never a request more ---------------------------------------------------------------------------------------------


async def test_a_call_is_two_requests_and_a_replay_is_one(layer: DynamoDBPersistenceLayer, proxy: Proxy) -> None:
    @idempotent_function(data_keyword_argument="order", persistence_store=layer)
    async def pay(order: int) -> int:
        return order

    assert await pay(1) == 1
    assert operations(proxy) == ["UpdateItem", "UpdateItem"]
    proxy.requests.clear()
    assert await pay(1) == 1
    assert operations(proxy) == ["UpdateItem"]


async def test_a_body_that_fails_is_a_claim_and_a_delete(layer: DynamoDBPersistenceLayer, proxy: Proxy) -> None:
    @idempotent_function(persistence_store=layer)
    async def fail() -> None:
        raise LookupError

    with pytest.raises(LookupError):
        await fail()
    assert operations(proxy) == ["UpdateItem", "DeleteItem"]


async def test_opening_a_layer_is_one_look_at_the_table(layer: DynamoDBPersistenceLayer, proxy: Proxy) -> None:
    await layer.open()
    assert operations(proxy) == ["DescribeTable"]


async def test_a_look_at_a_record_sees_every_write_before_it(layer: DynamoDBPersistenceLayer, proxy: Proxy) -> None:
    await layer.get("key")
    assert b'"ConsistentRead": true' in b"".join(proxy.requests)


async def test_a_result_that_cannot_fit_is_not_even_sent(layer: DynamoDBPersistenceLayer, proxy: Proxy) -> None:
    record = await claimed(layer)
    proxy.requests.clear()
    with pytest.raises(IdempotencySerializationError, match="400 KB"):
        await layer.complete(completed_of(record, now=NOW, response_data="x" * 409_601), now=NOW)
    assert proxy.requests == []


# --- Applied, and the reply lost: the client asks again by itself -----------------------------------------------------


async def lose_the_reply(proxy: Proxy, operation: Callable[[], Awaitable[Any]]) -> Any:
    """Let the server apply the operation, lose its reply, and see the client ask once more."""
    proxy.requests.clear()
    before = proxy.dropped.replies
    proxy.cut_after_reply_is_dropped()
    answer = await operation()
    assert proxy.dropped.replies > before
    assert len(operations(proxy)) == 2
    return answer


async def test_w3_a_claim_whose_reply_was_lost_is_ours(
    layer: DynamoDBPersistenceLayer, proxy: Proxy, database: Database, table: str
) -> None:
    record = await lose_the_reply(proxy, lambda: claimed(layer))
    assert record == await layer.get("key")
    assert database.item(table)["fence"] == {"N": str(record.fence)}
    assert record.fence == NOW * 1000 + 1, "claimed once"


async def test_w3_a_claim_whose_reply_was_lost_is_not_confused_with_anothers(
    layer: DynamoDBPersistenceLayer, proxy: Proxy
) -> None:
    theirs = await claimed(layer, owner="theirs")
    answer = await lose_the_reply(proxy, lambda: layer.acquire(claim_of("key", now=NOW), now=NOW))
    assert not isinstance(answer, Claimed)
    assert answer.record == theirs


async def test_a_take_over_whose_reply_was_lost_is_ours(layer: DynamoDBPersistenceLayer, proxy: Proxy) -> None:
    found = await claimed(layer, owner="theirs")
    ours = claim_of("key", now=NOW)
    taken = await lose_the_reply(proxy, lambda: layer.take_over(found, ours, now=NOW, force=True))
    assert taken == await layer.get("key")
    assert taken is not None
    assert taken.fence == found.fence + 1, "taken over once"


async def test_w4_a_completion_whose_reply_was_lost_is_done(layer: DynamoDBPersistenceLayer, proxy: Proxy) -> None:
    record = await claimed(layer)
    assert await lose_the_reply(proxy, lambda: layer.complete(completed_of(record, now=NOW), now=NOW)) is True


async def test_a_renewal_whose_reply_was_lost_is_done(layer: DynamoDBPersistenceLayer, proxy: Proxy) -> None:
    record = await claimed(layer)
    longer = record.replace(expiry_timestamp=int(NOW) + 60)
    assert await lose_the_reply(proxy, lambda: layer.renew(longer, now=NOW)) == longer


async def test_a_release_whose_reply_was_lost_is_done(
    layer: DynamoDBPersistenceLayer, proxy: Proxy, database: Database, table: str
) -> None:
    record = await claimed(layer)
    assert await lose_the_reply(proxy, lambda: layer.release(record)) is True
    assert database.item(table) is None
    assert await layer.release(record) is False


async def test_a_release_that_is_retried_leaves_another_owner_alone(
    layer: DynamoDBPersistenceLayer, proxy: Proxy
) -> None:
    theirs = await claimed(layer, owner="theirs")
    assert await lose_the_reply(proxy, lambda: layer.release(theirs.replace(owner="ours"))) is False
    assert await layer.get("key") == theirs


@pytest.mark.parametrize("lost", [0, 1], ids=["claim", "completion"])
async def test_a_function_runs_once_though_a_reply_is_lost(
    lost: int, layer: DynamoDBPersistenceLayer, proxy: Proxy
) -> None:
    calls = 0

    @idempotent_function(persistence_store=layer)
    async def pay() -> str:
        nonlocal calls
        calls += 1
        if lost == 1:
            proxy.cut_after_reply_is_dropped()
        return "paid"

    if lost == 0:
        proxy.cut_after_reply_is_dropped()
    assert await pay() == "paid"
    assert proxy.dropped.replies > 0
    assert len(operations(proxy)) == 3
    assert await pay() == "paid"
    assert calls == 1


# --- Nobody answers ---------------------------------------------------------------------------------------------------


async def test_a_claim_whose_reply_never_comes_can_be_asked_for_again(
    impatient: DynamoDBPersistenceLayer, proxy: Proxy, database: Database, table: str
) -> None:
    proxy.drop(replies=True)
    with pytest.raises(IdempotencyPersistenceConnectionError, match="did not answer"):
        await claimed(impatient)
    while database.item(table) is None:  # noqa: ASYNC110 - the emulator may be slower than its client
        await asyncio.sleep(0.01)
    assert database.item(table)["owner"] == {"S": "ours"}
    proxy.heal()
    answer = await answered(lambda: impatient.acquire(claim_of("key", now=NOW), now=NOW))
    assert isinstance(answer, Claimed)
    assert answer.record.fence == NOW * 1000 + 1


@pytest.mark.parametrize("fault", ["cut", "refuse", "hold"])
async def test_a_server_out_of_reach_is_an_outage_that_a_call_may_survive(
    fault: str, impatient: DynamoDBPersistenceLayer, proxy: Proxy
) -> None:
    calls = list[str]()

    @idempotent_function(persistence_store=impatient, config=IdempotencyConfig(on_persistence_error="run"))
    async def unprotected() -> str:
        calls.append("unprotected")
        return "done"

    @idempotent_function(persistence_store=impatient)
    async def protected() -> None:
        calls.append("protected")

    if fault == "hold":
        proxy.hold()
    else:
        proxy.refuse()
    with pytest.raises(IdempotencyPersistenceConnectionError, match="the function was not run"):
        await protected()
    assert await unprotected() == "done"
    assert calls == ["unprotected"]


async def test_a_connection_that_was_cut_while_idle_is_made_anew(layer: DynamoDBPersistenceLayer, proxy: Proxy) -> None:
    record = await claimed(layer)
    before = proxy.connections
    proxy.cut()
    assert await layer.get("key") == record
    assert proxy.connections > before
