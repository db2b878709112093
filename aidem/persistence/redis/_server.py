"""How to connect: to one server, or to the primary that sentinels name.

A connection object of redis-py serves as parsed options, so that URLs, TLS, credentials and the rest mean what
redis-py's documentation says. aidem dials and shakes hands by itself, with all of the handshake in one round trip. For
messages of Pub/Sub redis-py makes the connection.
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, cast

from redis.asyncio import Redis
from redis.asyncio.connection import Connection, ConnectionPool, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.credentials import UsernamePasswordCredentialProvider

from aidem._runtime.cancellation import UncancellableFuture
from aidem.exceptions import (
    IdempotencyPersistenceConfigError,
    IdempotencyPersistenceConnectionError,
    IdempotencyPersistenceLayerError,
)
from aidem.persistence.redis._errors import CLOSED, ReplyError, connecting_failed
from aidem.persistence.redis._wire import Command, Question, Wire

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

    from redis.asyncio.client import PubSub
    from redis.asyncio.connection import AbstractConnection

T = TypeVar("T")

PAUSE_SECONDS: Final = 0.1
"""How long to wait before the sentinels are asked again during a failover."""

SHARES_AT_MOST: Final = 4
"""Among how many servers the time is divided, or each of many would have too little of it."""

# Options for a pool, and what aidem does in its own way or not at all.
_LEFT_OUT: Final = ("retry", "maint_", "oss_cluster_maint_", "health_check_interval")
_OURS: Final[dict[str, Any]] = {"protocol": 2, "socket_timeout": None, "decode_responses": False}


class Endpoint(Protocol):
    """What can be connected to: a server, or several of which one will do."""

    async def reach(self, attempt: Callable[[Server, float], Awaitable[T]], *, timeout_seconds: float) -> T:
        """Return the result of the first attempt that gets a connection.

        Args:
            attempt: Connects to a server within the seconds that it is given.
            timeout_seconds: How long all attempts may take.

        Raises:
            IdempotencyPersistenceLayerError: No attempt got a connection in this time.
        """
        ...


class Server:
    """One server.

    Args:
        connection_class: One of redis-py's.
        options: The arguments for it.

    Attributes:
        host: Its name or address.
        address: Where it is, for messages.

    Raises:
        IdempotencyPersistenceConfigError: aidem cannot make such a connection.
    """

    def __init__(self, connection_class: type[AbstractConnection], options: Mapping[str, Any]) -> None:
        if connection_class not in {Connection, SSLConnection, UnixDomainSocketConnection}:
            raise IdempotencyPersistenceConfigError(
                f"{connection_class.__module__}.{connection_class.__qualname__}, with which this client connects, "
                "connects in a way of its own, which aidem cannot follow: it connects by itself, as Connection, "
                "SSLConnection and UnixDomainSocketConnection of redis.asyncio do; give the layer a client of one of "
                "these or, in tests without a server, use aidem.persistence.memory.MemoryPersistenceLayer() instead"
            )
        if options.get("redis_connect_func") is not None:
            raise IdempotencyPersistenceConfigError(
                "this client has a redis_connect_func, which aidem cannot call, as it connects by itself; use "
                "username and password, credential_provider, client_name and db in its place"
            )
        self._class = connection_class
        self._options = {name: value for name, value in options.items() if not name.startswith(_LEFT_OUT)} | _OURS
        parsed: Any = connection_class(**self._options)
        self._parsed = parsed
        self.host: str = getattr(parsed, "host", "")
        is_local = connection_class is UnixDomainSocketConnection
        self.address: str = parsed.path if is_local else f"{self.host}:{parsed.port}"

    def at(self, host: str, port: int) -> Server:
        """Return a server that differs only in its place."""
        return Server(self._class, self._options | {"host": host, "port": port})

    async def reach(self, attempt: Callable[[Server, float], Awaitable[T]], *, timeout_seconds: float) -> T:
        """Return the result of the one attempt."""
        return await attempt(self, timeout_seconds)

    async def connect(self, wire: Wire, *, timeout_seconds: float) -> None:
        """Connect a wire and shake hands.

        Raises:
            IdempotencyPersistenceLayerError: It failed, or took longer.
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                greeting = await self._greeting()
                loop, options = asyncio.get_running_loop(), self._parsed
                if self._class is UnixDomainSocketConnection:
                    transport, _ = await loop.create_unix_connection(lambda: wire, options.path)
                else:
                    tls = options.ssl_context.get() if self._class is SSLConnection else None
                    transport, _ = await loop.create_connection(lambda: wire, options.host, options.port, ssl=tls)
                try:
                    if getattr(options, "socket_keepalive", False):
                        connected: socket.socket = transport.get_extra_info("socket")
                        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                        for option, value in options.socket_keepalive_options.items():
                            connected.setsockopt(socket.IPPROTO_TCP, option, value)
                    await _greet(wire, greeting)
                    if transport.is_closing():
                        raise ConnectionResetError  # noqa: TRY301 - nobody else would be told
                except BaseException:
                    transport.abort()
                    raise
        except Exception as error:
            raise connecting_failed(error, address=self.address, timeout_seconds=timeout_seconds) from error

    async def ask(self, *command: str, timeout_seconds: float) -> Any:
        """Return the reply to a command, on a connection that is made for it.

        Args:
            command: The command.
            timeout_seconds: How long connecting may take, and then how long the reply.

        Raises:
            IdempotencyPersistenceLayerError: It failed, or the reply is an error.
        """
        wire = Wire(_OneQuestion(), timeout_seconds=timeout_seconds)
        await self.connect(wire, timeout_seconds=timeout_seconds)
        try:
            question = Question(UncancellableFuture(loop=asyncio.get_running_loop()), *command)
            wire.send([question])
            await question.future.waiter()
            return question.future.result()
        finally:
            wire.abort()
            await asyncio.wait([wire.closed])

    async def subscriber(self, *, timeout_seconds: float) -> PubSub:
        """Return redis-py's connection for messages; it does not reconnect.

        Raises:
            IdempotencyPersistenceLayerError: Connecting failed, or took longer.
        """
        once = Retry(NoBackoff(), 0, supported_errors=())
        pool: ConnectionPool = ConnectionPool(connection_class=self._class, retry=once, **self._options)
        pubsub: PubSub = cast("Any", Redis(connection_pool=pool)).pubsub(ignore_subscribe_messages=True)
        try:
            async with asyncio.timeout(timeout_seconds):
                await cast("Any", pubsub).connect()
        except Exception as error:
            raise connecting_failed(error, address=self.address, timeout_seconds=timeout_seconds) from error
        return pubsub

    async def _greeting(self) -> list[tuple[str | int, ...]]:
        """Return the commands of the handshake, which redis-py would send, too."""
        options = self._parsed
        commands = list[tuple[str | int, ...]]()
        if options.credential_provider or options.username or options.password:
            provider = options.credential_provider or UsernamePasswordCredentialProvider(
                options.username, options.password
            )
            if hasattr(provider, "get_credentials_async"):  # not in redis-py 5.2
                commands.append(("AUTH", *await provider.get_credentials_async()))
            else:
                commands.append(("AUTH", *provider.get_credentials()))
        if options.client_name:
            commands.append(("CLIENT", "SETNAME", options.client_name))
        about = getattr(options, "driver_info", options)  # redis-py before 7 has no driver_info
        library = {
            "LIB-NAME": getattr(about, "formatted_name", None) or getattr(about, "lib_name", None),
            "LIB-VER": getattr(about, "lib_version", None),
        }
        commands += [("CLIENT", "SETINFO", name, value) for name, value in library.items() if value]
        if options.db:
            commands.append(("SELECT", options.db))
        return commands


class _OneQuestion:
    """The user of a wire that is made for one question."""

    def goes_on(self, command: Command[Any], error: ReplyError) -> bool:  # noqa: ARG002 - the signature of Owner
        """Return False."""
        return False

    def heard(self) -> None:
        """Do nothing."""

    def lost(self, wire: Wire) -> None:
        """Do nothing."""


async def _greet(wire: Wire, greeting: Sequence[tuple[str | int, ...]]) -> None:
    """Send the handshake and wait for all replies."""
    loop = asyncio.get_running_loop()
    commands = [Question(UncancellableFuture(loop=loop), *arguments) for arguments in greeting]
    if commands:
        wire.send(commands)
        await asyncio.wait([command.future for command in commands])
    for arguments, command in zip(greeting, commands, strict=True):
        error = command.future.exception()
        is_refused = error is not None and isinstance(error.__cause__, ReplyError)
        if error is not None and not (is_refused and "SETINFO" in arguments):  # a server before 7.2 has no SETINFO
            raise error


# --- Sentinels ------------------------------------------------------------------------------------------------------


class Primary:
    """The primary of a service, whichever server that is: the sentinels are asked each time a connection is made.

    redis-py's `Sentinel` would save about 20 lines, and bring a pool of connections where each event loop needs one.

    Args:
        sentinels: The sentinels, which are asked in this order.
        service: The name of the service.
        like: A server that differs from the primary only in its place.
        other_sentinels: How many others a sentinel must see to be believed. Default: 0.
    """

    def __init__(self, sentinels: Sequence[Server], *, service: str, like: Server, other_sentinels: int = 0) -> None:
        self._sentinels = sentinels
        self._service = service
        self._like = like
        self._other_sentinels = other_sentinels

    async def reach(self, attempt: Callable[[Server, float], Awaitable[T]], *, timeout_seconds: float) -> T:
        """Try the primary, again and again while a failover goes on."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
        last_start = deadline - timeout_seconds / 4
        failure: IdempotencyPersistenceConnectionError | None = None
        while True:
            try:
                primary = await first_of(self._sentinels, self._named_by, timeout_seconds=deadline - loop.time())
                # A server that hangs leaves the sentinels time to name another.
                return await attempt(primary, (deadline - loop.time()) / 2)
            except IdempotencyPersistenceConnectionError as error:
                if failure is None or loop.time() < deadline:
                    failure = error  # an attempt that runs out of time says less than the one before
                if loop.time() + PAUSE_SECONDS > last_start:
                    raise failure from failure.__cause__
            await asyncio.sleep(PAUSE_SECONDS)

    async def _named_by(self, sentinel: Server, timeout_seconds: float) -> Server:
        try:
            reply = await sentinel.ask("SENTINEL", "MASTER", self._service, timeout_seconds=timeout_seconds)
        except IdempotencyPersistenceLayerError as error:
            raise self._refusal(sentinel, error) from error
        fields: dict[bytes, bytes] = dict(zip(reply[::2], reply[1::2], strict=True))
        if {b"s_down", b"o_down"} & {*fields[b"flags"].split(b",")}:
            raise IdempotencyPersistenceConnectionError(
                f"sentinel {sentinel.address} sees the primary of {self._service!r} down; wait for the failover to end"
            )
        if int(fields[b"num-other-sentinels"]) < self._other_sentinels:
            raise IdempotencyPersistenceConnectionError(
                f"sentinel {sentinel.address} is cut off from the others; see min_other_sentinels"
            )
        return self._like.at(fields[b"ip"].decode(), int(fields[b"port"]))

    def _refusal(self, sentinel: Server, error: IdempotencyPersistenceLayerError) -> IdempotencyPersistenceLayerError:
        if isinstance(error.__cause__, ReplyError) and error.__cause__.code in {"ERR", "IDONTKNOW"}:
            return IdempotencyPersistenceConfigError(
                f"Redis at {sentinel.address} is not a sentinel that knows a service {self._service!r}"
            )
        return type(error)(f"sentinel {sentinel.address}: {error}")


async def first_of(
    servers: Iterable[Server], attempt: Callable[[Server, float], Awaitable[T]], *, timeout_seconds: float
) -> T:
    """Try servers one after the other; return the result of the first attempt that gets a connection.

    Args:
        servers: The servers.
        attempt: Tries one, within the seconds that it is given.
        timeout_seconds: How long all of it may take; a server that hangs leaves some of it to the next.

    Raises:
        IdempotencyPersistenceLayerError: None of them can be reached, or the first one that can refuses.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_seconds
    left = list(servers)
    failure = IdempotencyPersistenceConnectionError(CLOSED)
    while left:
        share = max(0.0, deadline - loop.time()) / min(len(left), SHARES_AT_MOST)
        try:
            return await attempt(left.pop(0), share)
        except IdempotencyPersistenceConnectionError as error:
            failure = error
    raise failure
