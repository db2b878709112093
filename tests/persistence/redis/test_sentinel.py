"""Records at the primary that sentinels name; what happens when it changes is in `test_redis_failover`."""

from __future__ import annotations

import asyncio
import gc
import logging
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff

from aidem.exceptions import IdempotencyPersistenceConfigError, IdempotencyPersistenceConnectionError
from aidem.persistence import PersistenceLayer, open_persistence_layer
from aidem.persistence.redis import RedisPersistenceLayer
from aidem.persistence.redis._deployment import sentinels_of_url
from aidem.persistence.redis._wire import pack
from aidem.testing import FakeClock, ScanConformance, TakeOverConformance
from tests.support.redis import FORKING, FakeServer, claimed, completed, fake_server, no_complaints, until
from tests.support.redis_clusters import SERVICE, Watched, told, watched

pytestmark = [pytest.mark.server, pytest.mark.timeout(120)]
ROOT = Path(__file__).parents[3]
NOTHING = b"$-1\r\n"


@pytest.fixture(scope="module", params=["redis", "valkey"])
def service(request: pytest.FixtureRequest) -> Iterator[Watched]:
    with watched(request.param) as service:
        yield service


class TestConformance(TakeOverConformance, ScanConformance):
    pytestmark: ClassVar = [*TakeOverConformance.pytestmark, pytest.mark.server]
    service: Watched

    @pytest.fixture(autouse=True)
    def _of_this_service(self, service: Watched) -> None:
        self.service = service

    async def make_layer(self, clock: FakeClock) -> PersistenceLayer:
        return RedisPersistenceLayer(self.service.url, mode="sentinel", clock=clock)


async def until_connections(service: Watched, name: str, count: int) -> None:
    async def has_happened() -> bool:
        return bool(told(service.primary, "CLIENT", "LIST").count(f" name={name} ") == count)

    await until(has_happened)


# --- How it is named ------------------------------------------------------------------------------------------------


async def test_a_url_names_sentinels_of_which_some_may_be_gone(service: Watched, vacant_port: int) -> None:
    url = service.url.replace("redis+sentinel://", f"redis+sentinel://127.0.0.1:{vacant_port},").replace("/0", "/2")
    layer: Any = open_persistence_layer(f"{url}?client_name=named")
    async with layer:
        key = "named by a URL"
        await layer.forget(key)
        assert (await claimed(layer, key)).owner == "ours"
        await until_connections(service, "named", 1)
        assert told(service.primary, "EXISTS", key) == 0  # that is another database
        await layer.forget(key)


def test_a_url_says_what_is_for_the_primary_and_what_for_the_sentinels() -> None:
    url = (
        "rediss+sentinel://app:p%40ss@a:1,b,[::1]:3/records/4"
        "?client_name=me&sentinel_username=look&sentinel_password=w%26rd&ssl_ca_certs=/ca.pem"
    )
    sentinels, name, primary = sentinels_of_url(url)
    assert name == "records"
    assert [sentinel.address for sentinel in sentinels] == ["a:1", "b:26379", "::1:3"]
    tls = {"ssl_ca_certs": "/ca.pem", "ssl_check_hostname": True}
    for sentinel in sentinels:
        assert sentinel._options.items() >= ({"username": "look", "password": "w&rd"} | tls).items()
        assert "client_name" not in sentinel._options
    moved = primary.at("c", 5)
    assert moved.address == "c:5"
    ours = {"username": "app", "password": "p@ss", "db": 4, "client_name": "me"}
    assert moved._options.items() >= (ours | tls).items()


@pytest.mark.parametrize("url", ["redis+sentinel://host:26379", "redis+sentinel:///records", "redis+sentinel://a,/r"])
def test_a_url_without_sentinels_or_service_is_refused(url: str) -> None:
    with pytest.raises(IdempotencyPersistenceConfigError, match=r"redis\+sentinel://host:26379,host2:26379/service/0"):
        RedisPersistenceLayer(url)


@pytest.mark.parametrize(
    "options",
    [
        {"url": "redis://localhost", "mode": "sentinel"},
        {"host": "localhost", "mode": "sentinel"},
        {"client": Redis(), "mode": "sentinel"},
        {"url": "redis+cluster://localhost", "mode": "sentinel"},
    ],
)
def test_a_server_is_not_a_sentinel(options: dict[str, Any]) -> None:
    with pytest.raises(IdempotencyPersistenceConfigError, match=r"mode='sentinel' needs the sentinels.*master_for"):
        RedisPersistenceLayer(**options)
    with pytest.raises(IdempotencyPersistenceConfigError, match=r"mode='cluster' needs .*RedisCluster"):
        RedisPersistenceLayer("redis+sentinel://localhost/records", mode="cluster")


@pytest.mark.parametrize("is_used", [False, True])
async def test_a_client_of_the_user_is_taken_as_a_pattern_and_left_alone(
    service: Watched, is_used: bool, vacant_port: int
) -> None:
    places = [("127.0.0.1", vacant_port), ("127.0.0.1", service.sentinels[0].port)]
    sentinel = Sentinel(places, sentinel_kwargs={"retry": Retry(NoBackoff(), 0)})
    client = sentinel.master_for(SERVICE, client_name="pattern", decode_responses=True)
    if is_used:
        await client.set("of the user", "1")
    pool: Any = client.connection_pool
    order = list(sentinel.sentinels)
    before = (pool.master_address, told(service.primary, "CLIENT", "LIST").count(" name=pattern "))
    async with RedisPersistenceLayer(client=client) as layer:
        key = f"by a client, {is_used}"
        await layer.forget(key)
        assert await completed(layer, await claimed(layer, key))
    assert sentinel.sentinels == order
    assert pool.master_address == before[0]
    await until_connections(service, "pattern", before[1])
    assert await client.set("of the user", "2")
    for each in (client, *sentinel.sentinels):
        await each.aclose()


async def test_a_client_of_the_user_may_want_tls_or_more_sentinels_and_must_not_lead_to_replicas(
    service: Watched,
) -> None:
    sentinel = Sentinel([("127.0.0.1", service.sentinels[0].port)], min_other_sentinels=1)
    layer = RedisPersistenceLayer(client=sentinel.master_for(SERVICE), timeout_seconds=1.5)
    with pytest.raises(IdempotencyPersistenceConnectionError, match="cut off from the others; see min_other_sentinels"):
        await layer.get("key")
    await layer.aclose()
    with pytest.raises(
        IdempotencyPersistenceConfigError, match=r"leads to replicas; make it with Sentinel\.master_for"
    ):
        RedisPersistenceLayer(client=sentinel.slave_for(SERVICE))
    sentinel = Sentinel([("127.0.0.1", service.sentinels[0].port)])
    layer = RedisPersistenceLayer(client=sentinel.master_for(SERVICE, ssl=True), timeout_seconds=1)
    with pytest.raises(IdempotencyPersistenceConnectionError):
        await layer.get("key")
    await layer.aclose()


# --- Passwords and settings -----------------------------------------------------------------------------------------


async def test_sentinels_may_have_a_password_of_their_own() -> None:
    with watched("redis") as service:
        told(service.primary, "CONFIG", "SET", "requirepass", "theirs")
        told(service.sentinels[0], "ACL", "SETUSER", "default", "resetpass", ">ours")
        url = service.url.replace("//", "//:theirs@")
        async with RedisPersistenceLayer(f"{url}?sentinel_password=ours") as layer:
            assert (await claimed(layer)).owner == "ours"
        refused = RedisPersistenceLayer(url)
        with pytest.raises(IdempotencyPersistenceConfigError, match=r"sentinel 127\.0\.0\.1:\d+: .*NOAUTH"):
            await refused.open()
        await refused.aclose()


async def test_opening_warns_where_a_primary_that_was_replaced_goes_on_by_itself(
    service: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    for count in (0, 1):
        told(service.primary, "CONFIG", "SET", "min-replicas-to-write", count)
        caplog.clear()
        async with RedisPersistenceLayer(service.url):
            pass
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert [warning for warning in warnings if "min-replicas-to-write is 0" in warning] == warnings[1:]
        assert len(warnings) == 2 - count
    told(service.primary, "CONFIG", "SET", "min-replicas-to-write", 0)


# --- Loops and processes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["idle", "connecting", "listening"])
def test_a_loop_that_ends_closes_its_connections_without_complaint(service: Watched, state: str) -> None:
    layer = RedisPersistenceLayer(f"{service.url}?client_name={state}")

    async def use() -> None:
        if state != "connecting":
            await layer.get("key")
        if state == "listening":
            await layer.wait_for_change("key", 0.05)
        assert layer.get("key") is not None

    for _ in range(2):
        asyncio.run(use())
        gc.collect()
        asyncio.run(until_connections(service, state, 0))


def test_a_forked_child_uses_a_connection_of_its_own(service: Watched) -> None:
    told(service.primary, "FLUSHALL")
    worker = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", FORKING, service.url],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert worker.stdout.split() == ["Claimed", "0", "Blocked"] * 3, worker.stderr
    assert worker.stderr == ""


# --- What sentinels and servers may answer: they are fakes ------------------------------------------------------------


class FakeSentinel:
    """Names a server; or answers what it is told to."""

    def __init__(self, server: FakeServer, named: int) -> None:
        self.port = server.port
        self.flags = "master"
        self.named = named
        self.reply: bytes | None = None
        self.asked = 0
        self.falls_silent_after: int | None = None
        server.answer = self._answer

    @property
    def url(self) -> str:
        return f"redis+sentinel://127.0.0.1:{self.port}/records"

    def _answer(self, command: list[bytes]) -> bytes | None:
        assert command == [b"SENTINEL", b"MASTER", b"records"]
        if self.asked == self.falls_silent_after:
            return None
        self.asked += 1
        if self.reply is not None:
            return self.reply
        said: dict[str, str | int] = {
            "ip": "127.0.0.1",
            "port": self.named,
            "flags": self.flags,
            "num-other-sentinels": 0,
        }
        return pack(tuple(word for pair in said.items() for word in pair))


@pytest.fixture
async def servers() -> AsyncGenerator[tuple[FakeServer, FakeServer]]:
    async with fake_server(lambda _command: NOTHING) as first, fake_server(lambda _command: NOTHING) as second:
        yield first, second


@pytest.fixture
async def sentinel(servers: tuple[FakeServer, FakeServer]) -> AsyncGenerator[FakeSentinel]:
    with no_complaints():
        async with fake_server(lambda _command: NOTHING) as server:
            yield FakeSentinel(server, servers[0].port)


async def test_a_primary_that_has_become_a_replica_is_left_for_the_one_that_is_named_then(
    sentinel: FakeSentinel, servers: tuple[FakeServer, FakeServer]
) -> None:
    layer = RedisPersistenceLayer(sentinel.url)
    await layer.get("key")
    servers[0].answer = lambda _command: b"-READONLY You can't write against a read only replica.\r\n"
    sentinel.named = servers[1].port
    with pytest.raises(IdempotencyPersistenceConnectionError, match="READONLY"):
        await layer.get("key")
    assert await layer.get("key") is None
    assert [command[0] for command in servers[1].commands][-1] == b"GET"
    await layer.aclose()


@pytest.mark.parametrize("flags", ["master,s_down", "s_down,o_down,master,disconnected"])
async def test_a_primary_that_is_seen_down_is_waited_for(
    sentinel: FakeSentinel, servers: tuple[FakeServer, FakeServer], flags: str
) -> None:
    layer = RedisPersistenceLayer(sentinel.url, timeout_seconds=20)
    sentinel.flags = flags
    asking = layer.get("key")

    async def was_asked_twice() -> bool:
        return sentinel.asked > 1

    await until(was_asked_twice)
    assert servers[0].commands == []
    sentinel.flags, sentinel.named = "master", servers[1].port
    assert await asking is None
    await layer.aclose()


async def test_a_primary_that_stays_down_is_an_error_that_says_who_sees_it_so(sentinel: FakeSentinel) -> None:
    layer = RedisPersistenceLayer(sentinel.url, timeout_seconds=1.5)
    sentinel.flags = "master,s_down"
    with pytest.raises(IdempotencyPersistenceConnectionError, match=r"sees the primary of 'records' down; wait"):
        await layer.get("key")
    await layer.aclose()


async def test_what_was_known_before_the_time_ran_out_is_what_is_said(sentinel: FakeSentinel) -> None:
    layer = RedisPersistenceLayer(sentinel.url, timeout_seconds=1.5)
    sentinel.flags, sentinel.falls_silent_after = "master,s_down", 1
    with pytest.raises(IdempotencyPersistenceConnectionError, match=r"sees the primary of 'records' down; wait"):
        await layer.get("key")
    await layer.aclose()


async def test_a_service_that_no_sentinel_knows_is_said_at_once(sentinel: FakeSentinel) -> None:
    layer = RedisPersistenceLayer(sentinel.url, timeout_seconds=50)
    sentinel.reply = b"-ERR No such master with that name\r\n"
    with pytest.raises(IdempotencyPersistenceConfigError, match="not a sentinel that knows a service 'records'"):
        await asyncio.wait_for(layer.get("key"), 20)
    await layer.aclose()


async def test_sentinels_that_cannot_be_reached_are_named(vacant_port: int) -> None:
    layer = RedisPersistenceLayer(f"redis+sentinel://127.0.0.1:{vacant_port}/records", timeout_seconds=1.5)
    with pytest.raises(
        IdempotencyPersistenceConnectionError, match=rf"sentinel 127\.0\.0\.1:{vacant_port}: .*cannot be"
    ):
        await layer.get("key")
    await layer.aclose()
