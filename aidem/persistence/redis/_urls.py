"""The servers that a URL names; redis-py reads the parts of it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, cast
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

from redis.asyncio.connection import ConnectionPool, SSLConnection
from redis.exceptions import RedisError

from aidem.exceptions import IdempotencyPersistenceConfigError
from aidem.persistence.redis._server import Server

if TYPE_CHECKING:
    from collections.abc import Generator

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
    """Return the sentinels, the service they look after, and a server that differs from its primary in its place alone.

    User and options are those of the primary. What begins with `sentinel_` is for the sentinels, and `ssl_` for both.

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
        # Without its cause: the URL may hold a password, and what redis-py and Python say of it quotes the URL.
        raise IdempotencyPersistenceConfigError(
            f"this URL names no Redis server; write {FORMS}. Use no option that redis-py does not know, and "
            f"percent-encode {ENCODED} in a username and a password, as urllib.parse.quote(password, safe='') does"
        ) from None


def _split(url: str) -> SplitResult:
    """Return the parts of a URL; a password that is not percent-encoded would be taken for something else."""
    parts = urlsplit(url)
    if "@" in parts.path or parts.fragment or url.endswith("#"):
        raise ValueError
    parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    return parts


def _places(parts: SplitResult) -> tuple[str, list[str]]:
    """Return the user with an at sign, if there is one, and each host with its port."""
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
