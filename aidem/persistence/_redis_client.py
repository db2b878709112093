"""What the options of the layer, or a client of the user, say of the server."""

from __future__ import annotations

from typing import Any, cast

from redis.asyncio import Redis
from redis.asyncio.connection import ConnectionPool, SSLConnection

from aidem.exceptions import IdempotencyPersistenceConfigError
from aidem.persistence._redis_server import Server


def server_of(client: object, *, url: str, host: str, ssl: bool, mode: str, **options: Any) -> Server:
    """Return the server to connect to.

    Raises:
        IdempotencyPersistenceConfigError: The options do not name one, or one of another kind.
    """
    if mode != "standalone":
        raise IdempotencyPersistenceConfigError(f"mode={mode!r} is not supported yet; use 'standalone'")
    if client is not None:
        if not isinstance(client, Redis):
            raise IdempotencyPersistenceConfigError(
                f"client must be a redis.asyncio.Redis, not {type(client).__module__}.{type(client).__qualname__}"
            )
        return Server(client.connection_pool)
    if url:
        return Server(_pool_of_url(url))
    if host:
        given = {name: value for name, value in options.items() if value}
        more: dict[str, Any] = {"connection_class": SSLConnection, "ssl_check_hostname": True} if ssl else {}
        return Server(ConnectionPool(host=host, **given, **more))
    raise IdempotencyPersistenceConfigError("RedisPersistenceLayer needs a server: give it url, host or client")


def _pool_of_url(url: str) -> ConnectionPool:
    try:
        pool: ConnectionPool = cast("Any", ConnectionPool).from_url(url)
    except ValueError as error:
        # The URL may hold a password, and redis-py's message the URL.
        raise IdempotencyPersistenceConfigError(
            "this URL names no Redis server; write redis://host:port/0, rediss://host:port/0 for TLS, "
            "or unix:///path/to/socket"
        ) from error
    if issubclass(pool.connection_class, SSLConnection):
        pool.connection_kwargs.setdefault("ssl_check_hostname", True)
    return pool
