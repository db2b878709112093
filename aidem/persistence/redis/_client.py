"""What the options of the layer, or a client of the user, say of the servers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.connection import Connection, ConnectionPool, SSLConnection
from redis.asyncio.sentinel import SentinelConnectionPool

from aidem.exceptions import IdempotencyPersistenceConfigError
from aidem.persistence.redis._cluster import Cluster
from aidem.persistence.redis._connections import Connections
from aidem.persistence.redis._line import Line
from aidem.persistence.redis._listener import Listener
from aidem.persistence.redis._sentinel import Primary
from aidem.persistence.redis._server import Endpoint, Server
from aidem.persistence.redis._urls import sentinels_of_url, servers_of_url

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aidem.persistence.redis._shards import Address

Mode = Literal["standalone", "cluster", "sentinel"]

_SENTINEL_FORM: Final = "redis+sentinel://host:26379,host2:26379/service/0"


class Deployment(Protocol):
    """Servers that keep records together.

    Attributes:
        mode: In which way.
    """

    mode: Mode

    def connections(self, *, timeout_seconds: float) -> Connections:
        """Return what leads to them, for the running event loop; nothing is connected yet."""
        ...


class Single:
    """One server, or whichever one takes the writes at a time."""

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


def deployment_of(client: object, *, url: str, mode: Mode, **options: Any) -> Deployment:
    """Return what to connect to.

    Raises:
        IdempotencyPersistenceConfigError: The options do not name it, or something of another kind.
    """
    if client is not None:
        found = _of_client(client)
    elif url:
        found = _of_url(url, mode=mode)
    else:
        found = _of_host(mode=mode, **options)
    if mode not in {"standalone", found.mode}:
        raise IdempotencyPersistenceConfigError(f"mode={mode!r} needs {_NEEDS[mode]}")
    return found


def is_lock_respected(shared_with_powertools: bool | None, *, mode: Mode) -> bool:  # noqa: FBT001 - an option's value
    """Return whether the lock of Powertools is looked at and set.

    Raises:
        IdempotencyPersistenceConfigError: It cannot be.
    """
    if shared_with_powertools and mode == "cluster":
        raise IdempotencyPersistenceConfigError(
            "shared_with_powertools=True cannot be kept in a cluster, where the lock of Powertools is in another slot "
            "than its record; leave it out, and see docs/redis.md for what that means"
        )
    return mode != "cluster" if shared_with_powertools is None else shared_with_powertools


def _of_client(client: object) -> Deployment:
    if isinstance(client, RedisCluster):
        return _of_cluster_client(client)
    if not isinstance(client, Redis):
        raise IdempotencyPersistenceConfigError(
            "client must be a redis.asyncio.Redis or RedisCluster, "
            f"not {type(client).__module__}.{type(client).__qualname__}"
        )
    pool: Any = client.connection_pool
    if isinstance(pool, SentinelConnectionPool):
        return _of_sentinel_pool(pool)
    return Single(_server_of(pool), mode="standalone")


def _of_cluster_client(client: RedisCluster) -> Deployment:
    manager: Any = client.nodes_manager
    # What a client that reads from replicas does with its connections is nothing for ours, which write.
    seeds = [_server_of(node, without="redis_connect_func") for node in manager.startup_nodes.values()]
    return Sharded(seeds, remap=manager.remap_host_port)


def _of_sentinel_pool(pool: Any) -> Deployment:
    if not pool.is_master:
        raise IdempotencyPersistenceConfigError("this client leads to replicas; make it with Sentinel.master_for")
    kind = SSLConnection if issubclass(pool.connection_class, SSLConnection) else Connection
    options = {name: value for name, value in pool.connection_kwargs.items() if name != "connection_pool"}
    manager = pool.sentinel_manager
    primary = Primary(
        [_server_of(sentinel.connection_pool) for sentinel in manager.sentinels],
        service=pool.service_name,
        like=Server(kind, options),
        other_sentinels=manager.min_other_sentinels,
    )
    return Single(primary, mode="sentinel")


def _server_of(pool: Any, *, without: str = "") -> Server:
    """Return the server of a pool, or of a node, which has the same attributes."""
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


def _of_host(*, mode: Mode, host: str, ssl: bool, **options: Any) -> Deployment:
    if not host:
        raise IdempotencyPersistenceConfigError("RedisPersistenceLayer needs a server: give it url, host or client")
    given = {name: value for name, value in options.items() if value}
    more: dict[str, Any] = {"connection_class": SSLConnection, "ssl_check_hostname": True} if ssl else {}
    server = _server_of(ConnectionPool(host=host, **given, **more))
    return Sharded([server]) if mode == "cluster" else Single(server, mode="standalone")


_NEEDS: Final = {
    "cluster": "a client of the kind redis.asyncio.RedisCluster, or a URL of a node: redis+cluster://host:6379",
    "sentinel": f"the sentinels: write {_SENTINEL_FORM}, or give it client=Sentinel(...).master_for(service)",
}
