"""The servers that the options of the layer, a URL or a client of redis-py name."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, cast
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.connection import Connection, ConnectionPool, SSLConnection
from redis.asyncio.sentinel import SentinelConnectionPool, SentinelManagedConnection, SentinelManagedSSLConnection
from redis.exceptions import RedisError

from aidem.exceptions import IdempotencyPersistenceConfigError
from aidem.persistence.redis._cluster import Cluster
from aidem.persistence.redis._connections import Connections
from aidem.persistence.redis._line import Line
from aidem.persistence.redis._listener import Listener
from aidem.persistence.redis._server import Endpoint, Primary, Server

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from aidem.persistence.redis._cluster import Address

Mode = Literal["standalone", "cluster", "sentinel"]

_SENTINEL_FORM: Final = "redis+sentinel://host:26379,host2:26379/service/0"


class Deployment(Protocol):
    """The server or servers that keep the records.

    Attributes:
        mode: How they do that.
    """

    mode: Mode

    def connections(self, *, timeout_seconds: float) -> Connections:
        """Return the connections of the running event loop; nothing is connected yet."""
        ...


class Single:
    """One server, or the primary that sentinels name."""

    def __init__(self, endpoint: Endpoint, *, mode: Mode) -> None:
        self._endpoint = endpoint
        self.mode: Mode = mode

    def connections(self, *, timeout_seconds: float) -> Connections:
        """Return a line and a listener."""
        return Connections(
            Line(self._endpoint, timeout_seconds=timeout_seconds),
            Listener(self._endpoint, timeout_seconds=timeout_seconds),
        )


class Sharded:
    """The nodes of a cluster."""

    def __init__(self, seeds: Sequence[Server], *, remap: Callable[[str, int], Address] | None = None) -> None:
        self._seeds = seeds
        self._remap = remap
        self.mode: Mode = "cluster"

    def connections(self, *, timeout_seconds: float) -> Connections:
        """Return lines to the nodes, and a listener at one of them."""
        cluster = Cluster(self._seeds, timeout_seconds=timeout_seconds, remap=self._remap)
        return Connections(cluster, Listener(cluster, timeout_seconds=timeout_seconds))


def deployment_of(client: object, *, url: str, mode: Mode, ssl: bool, **options: Any) -> Deployment:
    """Return the servers that the options name.

    Raises:
        IdempotencyPersistenceConfigError: They name none, or servers that do not fit the mode.
    """
    if client is not None:
        found = _of_client(client)
    elif url:
        found = _of_url(url, mode=mode)
    else:
        if not options["host"]:
            raise IdempotencyPersistenceConfigError("RedisPersistenceLayer needs a server: give it url, host or client")
        if ssl:
            options |= {"connection_class": SSLConnection, "ssl_check_hostname": True}
        server = _server_of(ConnectionPool(**{name: value for name, value in options.items() if value}))
        found = Sharded([server]) if mode == "cluster" else Single(server, mode="standalone")
    if mode not in {"standalone", found.mode}:
        raise IdempotencyPersistenceConfigError(f"mode={mode!r} needs {_NEEDS[mode]}")
    return found


def is_lock_respected(shared_with_powertools: bool | None, *, mode: Mode) -> bool:  # noqa: FBT001 - an option's value
    """Return whether the lock of Powertools is respected and set.

    Raises:
        IdempotencyPersistenceConfigError: It is asked for in a cluster.
    """
    if shared_with_powertools and mode == "cluster":
        raise IdempotencyPersistenceConfigError(
            "shared_with_powertools=True cannot be kept in a cluster, where the lock of Powertools is in another slot "
            "than its record; leave it out, and see docs/redis.md for what that means"
        )
    return mode != "cluster" if shared_with_powertools is None else shared_with_powertools


def _of_client(client: object) -> Deployment:
    if isinstance(client, RedisCluster):
        manager: Any = client.nodes_manager
        # A client that reads from replicas has a redis_connect_func for them; aidem connects to primaries only.
        seeds = [_server_of(node, without="redis_connect_func") for node in manager.startup_nodes.values()]
        return Sharded(seeds, remap=manager.remap_host_port)
    if not isinstance(client, Redis):
        raise IdempotencyPersistenceConfigError(
            "client must be a redis.asyncio.Redis or RedisCluster, "
            f"not {type(client).__module__}.{type(client).__qualname__}"
        )
    pool: Any = client.connection_pool
    if not isinstance(client.connection_pool, SentinelConnectionPool):
        return Single(_server_of(pool), mode="standalone")
    if not pool.is_master:
        raise IdempotencyPersistenceConfigError("this client leads to replicas; make it with Sentinel.master_for")
    kinds: dict[Any, Any] = {SentinelManagedConnection: Connection, SentinelManagedSSLConnection: SSLConnection}
    kind = kinds.get(pool.connection_class, pool.connection_class)
    options = {name: value for name, value in pool.connection_kwargs.items() if name != "connection_pool"}
    sentinels: Any = pool.sentinel_manager
    primary = Primary(
        [_server_of(sentinel.connection_pool) for sentinel in sentinels.sentinels],
        service=pool.service_name,
        like=Server(kind, options),
        other_sentinels=sentinels.min_other_sentinels,
    )
    return Single(primary, mode="sentinel")


def _server_of(pool: Any, *, without: str = "") -> Server:
    """Return the server of a pool, or of a node of a cluster, which has the same attributes."""
    options = {name: value for name, value in pool.connection_kwargs.items() if name != without}
    return Server(pool.connection_class, options)


def _of_url(url: Any, *, mode: Mode) -> Deployment:
    if not isinstance(url, str):
        raise IdempotencyPersistenceConfigError(
            "url must be text, such as redis://host:6379/0; a client is passed as client="
        )
    kind = url.partition("://")[0].partition("+")[2]
    if kind == "sentinel":
        sentinels, service, like = sentinels_of_url(url)
        return Single(Primary(sentinels, service=service, like=like), mode="sentinel")
    if kind == "cluster" or mode == "cluster":
        return Sharded(servers_of_url(url))
    return Single(*servers_of_url(url), mode="standalone")


_NEEDS: Final = {
    "cluster": "a client of the kind redis.asyncio.RedisCluster, or a URL of a node: redis+cluster://host:6379",
    "sentinel": f"the sentinels: write {_SENTINEL_FORM}, or give it client=Sentinel(...).master_for(service)",
}


# --- URLs -----------------------------------------------------------------------------------------------------------

SENTINEL_PORT: Final = 26379
ENCODED: Final = "@ : / ? # [ ] %"
FORMS: Final = (
    "redis://host:6379/0, or rediss:// for TLS; unix:///path/to/socket; redis+cluster://host:6379,host2:6379; "
    "redis+sentinel://host:26379,host2:26379/service/0"
)


def servers_of_url(url: str) -> list[Server]:
    """Return the server of a URL, or the nodes of a cluster.

    Raises:
        IdempotencyPersistenceConfigError: It names none.
    """
    with _readable():
        kind = url.partition("://")[0].partition("+")[2]
        if kind != "cluster":
            return [_server(url)]
        parts = _split(url)
        user, hosts = _places(parts)
        return [_server(_part(parts, f"{user}{host}{parts.path}?{parts.query}")) for host in hosts]


def sentinels_of_url(url: str) -> tuple[list[Server], str, Server]:
    """Return the sentinels, the name of the service, and a server that differs from its primary only in its place.

    User and options are those of the primary. Options that begin with `sentinel_` are for the sentinels, and those that
    begin with `ssl_` for both.

    Raises:
        IdempotencyPersistenceConfigError: It does not name them.
    """
    with _readable():
        parts = _split(url)
        service, _, database = parts.path.strip("/").partition("/")
        if not service:
            raise ValueError
        user, hosts = _places(parts)
        options = parse_qsl(parts.query)
        theirs = [(name.removeprefix("sentinel_"), value) for name, value in options if name.startswith(_FOR_SENTINELS)]
        ours = [(name, value) for name, value in options if not name.startswith("sentinel_")]
        sentinels = [_server(_part(parts, f"{host}?{urlencode(theirs)}"), port=SENTINEL_PORT) for host in hosts]
        return sentinels, service, _server(_part(parts, f"{user}{hosts[0]}/{database}?{urlencode(ours)}"))


_FOR_SENTINELS: Final = ("sentinel_", "ssl_")


@contextmanager
def _readable() -> Generator[None]:
    try:
        yield
    except (ValueError, TypeError, RedisError):
        # Without its cause: the URL may hold a password, and the messages of redis-py and Python quote it.
        raise IdempotencyPersistenceConfigError(
            f"this URL names no Redis server; write {FORMS}. Use no option that redis-py does not know, and "
            f"percent-encode {ENCODED} in a username and a password, as urllib.parse.quote(password, safe='') does"
        ) from None


def _split(url: str) -> SplitResult:
    """Return the parts of a URL; raise ValueError where a password may not be percent-encoded."""
    parts = urlsplit(url)
    if "@" in parts.path or parts.fragment or url.endswith("#"):
        raise ValueError
    parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    return parts


def _places(parts: SplitResult) -> tuple[str, list[str]]:
    """Return the user and the password with the at sign, if there are any, and each host with its port."""
    user, at, places = parts.netloc.rpartition("@")
    hosts = places.split(",")
    if not all(hosts):
        raise ValueError
    return f"{user}{at}", hosts


def _part(parts: SplitResult, rest: str) -> str:
    """Return the URL of one of the servers."""
    return f"{parts.scheme.partition('+')[0]}://{rest}"


def _server(url: str, **defaults: Any) -> Server:
    parts = _split(url)
    if parts.scheme != "unix" and not parts.path.strip("/").isdecimal() and parts.path not in {"", "/"}:
        raise ValueError  # redis-py would take the database 0
    pool: ConnectionPool = cast("Any", ConnectionPool).from_url(url)
    cast("Any", pool).make_connection()  # it is not connected, but refuses options that it does not know
    if issubclass(pool.connection_class, SSLConnection):
        defaults["ssl_check_hostname"] = True
    return Server(pool.connection_class, defaults | pool.connection_kwargs)
