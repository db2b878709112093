"""How a connection is made: what of redis-py's options counts, in one round trip; which clients are refused."""

from __future__ import annotations

import asyncio
import importlib
import socket
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest
import redis.credentials
from redis.asyncio import Redis
from redis.asyncio.connection import Connection, ConnectionPool, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.credentials import CredentialProvider

from aidem.exceptions import IdempotencyPersistenceConfigError, IdempotencyPersistenceConnectionError
from aidem.persistence.redis import RedisPersistenceLayer
from tests.support.proxy import Proxy
from tests.support.redis import FakeServer, claimed, client_of, completed, fake_server, until
from tests.support.servers import RedisServer, started

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    rights = ("on", ">word", "~*", "&*", "+@all")
    with started("valkey", "--unixsocket", "valkey.sock", "--user", "payments", *rights) as server:
        yield server


@pytest.fixture
async def fake() -> AsyncGenerator[FakeServer]:
    async with fake_server(lambda _command: b"$-1\r\n") as fake:
        yield fake


# --- What counts ----------------------------------------------------------------------------------------------------


async def test_the_handshake_is_one_write_with_all_that_the_options_say(server: RedisServer) -> None:
    async with Proxy.to(server.port) as proxy, client_of(server) as client:
        url = f"redis://payments:word@127.0.0.1:{proxy.port}/3?client_name=mine&protocol=3"
        layer = RedisPersistenceLayer(url)
        assert await layer.get("key") is None
        (mine,) = [entry for entry in await client.client_list() if entry["name"] == "mine"]
        assert (mine["user"], mine["db"], mine["resp"]) == ("payments", "3", "2")
        assert mine["lib-name"] == "redis-py"
        handshake, _ = proxy.requests
        order = [handshake.index(part) for part in (b"AUTH", b"SETNAME", b"LIB-NAME", b"LIB-VER", b"SELECT")]
        assert order == sorted(order)
        await layer.aclose()


def library(name: str | None) -> dict[str, Any]:
    """Return the options by which a client says what it is; None: nothing."""
    try:
        about = importlib.import_module("redis.driver_info").DriverInfo
    except ModuleNotFoundError:  # redis-py before 7
        return {"lib_name": name, "lib_version": None}
    return {"driver_info": name and about(name=name, lib_version=None)}


async def test_a_client_says_what_the_server_shows_of_it(server: RedisServer) -> None:
    async with (
        client_of(server) as client,
        Redis(port=server.port, client_name="shown", **library("payments")) as own,
        RedisPersistenceLayer(client=own),
    ):
        (mine,) = [entry for entry in await client.client_list() if entry["name"] == "shown"]
        assert (mine["lib-name"], mine["lib-ver"]) == ("payments", "")


async def test_there_is_no_handshake_where_there_is_nothing_to_say(fake: FakeServer) -> None:
    async with Redis(port=fake.port, **library(None)) as own:
        layer = RedisPersistenceLayer(client=own)
        assert await layer.get("key") is None
        assert fake.commands == [[b"GET", b"key"]]
        await layer.aclose()


@pytest.mark.parametrize("path", ["url", "client"])
async def test_a_server_is_reached_by_a_unix_socket(server: RedisServer, path: str) -> None:
    place = str(server.directory / "valkey.sock")
    own: Any = Redis(unix_socket_path=place, db=2)
    layer = RedisPersistenceLayer(f"unix://{place}?db=2") if path == "url" else RedisPersistenceLayer(client=own)
    async with layer, RedisPersistenceLayer(f"redis://127.0.0.1:{server.port}/2") as elsewhere:
        claim = await claimed(layer, path)
        waiting = asyncio.ensure_future(elsewhere.wait_for_change(path, 50))
        await layer.wait_for_change(path, 0.2)
        assert await completed(layer, claim)
        await asyncio.wait_for(waiting, 20)
        assert await own.exists(path) == 1
    await own.aclose()
    missing = RedisPersistenceLayer(f"unix://{place}.missing")
    with pytest.raises(IdempotencyPersistenceConnectionError, match=r"valkey\.sock\.missing cannot be reached \(FileN"):
        await missing.get("key")
    await missing.aclose()


class Rotating(getattr(redis.credentials, "StreamingCredentialProvider", CredentialProvider)):  # type: ignore[misc]
    """Says a password that may change; as a streaming provider of redis-py does, where that knows such.

    Attributes:
        asked: How often it was asked.
        callback: Whom it would tell of a new password: the client of the user, and nobody else.
    """

    def __init__(self) -> None:
        self.asked = 0
        self.callback: object = "of the user"

    def get_credentials(self) -> tuple[str, str]:
        self.asked += 1
        return "payments", "word"

    async def get_credentials_async(self) -> tuple[str, str]:
        await asyncio.sleep(0)
        return self.get_credentials()

    def on_next(self, callback: object) -> None:
        self.callback = callback

    def on_error(self, callback: object) -> None:
        self.callback = callback

    def is_streaming(self) -> bool:
        return True


class Plain:
    """A provider of the kind that redis-py 5.2 asks for."""

    def __init__(self) -> None:
        self.asked = 0

    def get_credentials(self) -> tuple[str, str]:
        self.asked += 1
        return "payments", "word"


@pytest.mark.parametrize("kind", [Rotating, Plain])
async def test_a_credential_provider_is_asked_for_each_connection(server: RedisServer, kind: type[Any]) -> None:
    provider = kind()
    async with (
        client_of(server) as client,
        Redis(port=server.port, credential_provider=provider, client_name=kind.__name__, protocol=3) as own,
    ):
        before = getattr(provider, "callback", None)
        layer = RedisPersistenceLayer(client=own)
        assert await layer.get("key") is None
        assert provider.asked == 1
        (mine,) = [entry for entry in await client.client_list() if entry["name"] == kind.__name__]
        assert mine["user"] == "payments"
        await client.client_kill_filter(_id=mine["id"])

        async def is_served_again() -> bool:
            try:
                await layer.get("key")
            except IdempotencyPersistenceConnectionError:
                return False
            return provider.asked == 2

        await until(is_served_again)
        if kind is Rotating:
            await layer.wait_for_change("key", 0.2)
            assert provider.asked == 3
            assert [name for name in await client.pubsub_channels() if name.startswith("aidem:")]
        assert getattr(provider, "callback", None) == before
        await layer.aclose()


async def test_options_of_the_socket_count_and_one_that_it_does_not_take_is_an_error(server: RedisServer) -> None:
    for options, is_taken in (({socket.TCP_KEEPIDLE: 30}, True), ({-1: 1}, False)):
        own = Redis(port=server.port, client_name="kept", socket_keepalive=True, socket_keepalive_options=options)
        layer = RedisPersistenceLayer(client=own)
        if is_taken:
            assert await layer.get("key") is None
        else:
            with pytest.raises(IdempotencyPersistenceConnectionError, match=r"cannot be reached \(OSError\)"):
                await layer.get("key")
        await layer.aclose()
        async with client_of(server) as client:

            async def is_closed(client: Any = client) -> bool:
                return not [entry for entry in await client.client_list() if entry["name"] == "kept"]

            await until(is_closed)


# --- What a server answers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "kind", "message"),
    [
        (b"-LOADING Redis is loading the dataset in memory\r\n", IdempotencyPersistenceConnectionError, "LOADING"),
        (b"-ERR DB index is out of range\r\n", IdempotencyPersistenceConfigError, "refuses this user or database"),
        (b"-NOPERM no\r\n", IdempotencyPersistenceConfigError, "its ACL denies"),
        (b"-WRONGPASS no\r\n", IdempotencyPersistenceConfigError, "does not accept the username or the password"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", IdempotencyPersistenceConnectionError, "what answers is not Redis"),
    ],
)
async def test_what_is_refused_in_the_handshake_is_said_and_nothing_was_applied(
    fake: FakeServer, reply: bytes, kind: type[Exception], message: str
) -> None:
    fake.answer = lambda _command: reply
    layer = RedisPersistenceLayer(f"redis://127.0.0.1:{fake.port}/5")
    with pytest.raises(kind, match=rf"^Redis at 127.0.0.1:{fake.port} cannot be .*{message}") as refused:
        await layer.get("key")
    assert type(refused.value) is kind
    assert "may have been applied" not in str(refused.value)
    assert b"GET" not in [command[0] for command in fake.commands]

    async def is_closed() -> bool:
        return fake.open_connections == 0

    await until(is_closed)
    await layer.aclose()


async def test_a_server_that_does_not_know_what_it_is_told_of_the_library_is_used_all_the_same() -> None:
    async with fake_server(lambda _command: b"$-1\r\n", greeted=b"-ERR unknown subcommand 'SETINFO'\r\n") as fake:
        layer = RedisPersistenceLayer(fake.url)
        assert await layer.get("key") is None
        await layer.aclose()
        layer = RedisPersistenceLayer(f"{fake.url}?client_name=mine")
        with pytest.raises(
            IdempotencyPersistenceConfigError, match="refuses"
        ):  # a name that was asked for is not left out
            await layer.get("key")
        await layer.aclose()


# --- Who is refused -------------------------------------------------------------------------------------------------


class Tunnelled(Connection):
    """A connection of the user's own kind."""


async def greet(_connection: object) -> None:
    raise AssertionError("never called")


@pytest.mark.parametrize(
    "client",
    [
        Redis(connection_pool=ConnectionPool(connection_class=Tunnelled)),
        Sentinel([("localhost", 1)], connection_class=Tunnelled).master_for("records"),
        Sentinel([("localhost", 1)]).master_for(
            "records", connection_pool_class=SentinelConnectionPool, connection_class=Tunnelled
        ),
    ],
)
def test_a_client_that_connects_in_its_own_way_is_refused_before_anything_is_sent(client: Any) -> None:
    with pytest.raises(IdempotencyPersistenceConfigError, match=r"test_handshake\.Tunnelled, with which this client"):
        RedisPersistenceLayer(client=client)


@pytest.mark.parametrize(
    "client",
    [
        Redis(redis_connect_func=greet),
        Redis(unix_socket_path="/run/redis.sock", redis_connect_func=greet),
        Sentinel([("localhost", 1)]).master_for("records", redis_connect_func=greet),
        Sentinel([("localhost", 1)], sentinel_kwargs={"redis_connect_func": greet}).master_for("records"),
    ],
)
def test_a_client_that_shakes_hands_in_its_own_way_is_refused_before_anything_is_sent(client: Any) -> None:
    with pytest.raises(IdempotencyPersistenceConfigError, match="this client has a redis_connect_func"):
        RedisPersistenceLayer(client=client)


@pytest.mark.parametrize(
    "client",
    [
        Redis(connection_pool=ConnectionPool(connection_class=SSLConnection)),
        Redis(connection_pool=ConnectionPool(connection_class=UnixDomainSocketConnection, path="/run/redis.sock")),
        Sentinel([("localhost", 1)]).master_for("records", ssl=True),
    ],
)
def test_a_client_that_connects_as_redis_py_does_is_taken(client: Any) -> None:
    RedisPersistenceLayer(client=client)
