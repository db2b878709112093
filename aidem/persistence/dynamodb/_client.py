"""The DynamoDB client of a layer: given, or one of its own for every event loop."""

from __future__ import annotations

import asyncio
import os
import weakref
from functools import cache
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

import aiobotocore.session
import botocore.loaders
from aiobotocore.client import AioBaseClient
from aiobotocore.config import AioConfig
from aiobotocore.session import ClientCreatorContext
from botocore.client import BaseClient

from aidem._distribution import __version__
from aidem.exceptions import IdempotencyPersistenceConfigError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

Connect: TypeAlias = "Callable[[], AbstractAsyncContextManager[Any]]"

Action: TypeAlias = "Callable[[Any], Awaitable[Any]]"

POOL_CONNECTIONS: Final = 256
"""How many requests may be under way at once; connections are made as they are needed."""


def config_of(boto_config: Any | None) -> Any:
    """Return the settings of a client of our own; what the user sets wins.

    Each request is as cheap as it can be with its signature, retries and errors: it needs no validation, as it is
    built here, and a user agent that is fixed need not be put together anew.
    """
    config: Any = AioConfig(
        parameter_validation=False,
        max_pool_connections=POOL_CONNECTIONS,
        user_agent=f"aidem/{__version__} aiobotocore/{aiobotocore.__version__}",
    )
    if boto_config is not None:
        config = config.merge(boto_config)
        for name in ("connector_args", "http_session_cls"):  # not every version of aiobotocore merges its own settings
            if hasattr(boto_config, name):
                setattr(config, name, getattr(boto_config, name))
    return config


def connect_with(session: Any | None, boto_config: Any | None, place: dict[str, str]) -> Connect:
    """Return what makes a client: by an `aioboto3.Session`, or by aiobotocore, on which aioboto3 is built."""

    def connect() -> AbstractAsyncContextManager[Any]:
        config = config_of(boto_config)
        if session is not None:
            client: Any = session.client("dynamodb", config=config, **place) if hasattr(session, "client") else None
            if not hasattr(client, "__aenter__"):
                raise IdempotencyPersistenceConfigError(
                    "this session makes no asynchronous client; pass an aioboto3.Session, which has the arguments of "
                    "boto3's"
                )
            return cast("AbstractAsyncContextManager[Any]", client)
        own_session: Any = cast("Any", aiobotocore.session).get_session()
        loader = _loader(own_session.get_config_variable("data_path"))
        own_session.register_component("data_loader", loader)
        own_client: AbstractAsyncContextManager[Any] = own_session.create_client("dynamodb", config=config, **place)
        return own_client

    return connect


@cache
def _loader(data_path: str | None) -> Any:
    """Return what reads the descriptions of services, once: they take most of the time that a client takes to make."""
    loader: Any = cast("Any", botocore.loaders).create_loader(data_path)
    # Whether a service is there is asked twice, and else answered by looking through some 400 folders.
    loader.list_available_services = _available_services
    return loader


def _available_services(type_name: str) -> list[str]:  # noqa: ARG001 - there is one, for every type
    return ["dynamodb"]


class GivenClient:
    """A client that was passed in: never closed here."""

    def __init__(self, client: Any) -> None:
        if isinstance(client, BaseClient | ClientCreatorContext) and not isinstance(client, AioBaseClient):
            raise IdempotencyPersistenceConfigError(
                "this client is a client of boto3, or it is not open; pass the client of `async with "
                "aioboto3.Session().client('dynamodb') as client`, or no client, and the layer makes its own"
            )
        self._client = client

    async def ask(self, action: Action) -> Any:
        """Have the client do something."""
        return await action(self._client)

    async def aclose(self) -> None:
        """Leave it open."""


class OwnClients:
    """One client for every event loop of this process.

    A client and its connections belong to the loop they were made on. A forked child finds the parent's clients here
    and leaves them alone: closing them would speak on the parent's connections.
    """

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self._places: _Places = {}
        # Clients are full of reference cycles; one that became garbage with its layer would complain of being open.
        weakref.finalize(self, _close_soon, self._places).atexit = False

    async def ask(self, action: Action) -> Any:
        """Have the client of the running loop do something; the first who asks makes it."""
        this, places = (os.getpid(), asyncio.get_running_loop()), self._places
        place = places.get(this)
        if place is None:
            for pid, loop in list(places):
                if pid == os.getpid() and loop.is_closed():
                    del places[pid, loop]
            place = places.setdefault(this, _Place())
        return await place.ask(action, self._connect, lambda: _forget(places, this, place))

    async def aclose(self) -> None:
        """Close the client of the running loop; others are closed with theirs."""
        place = self._places.pop((os.getpid(), asyncio.get_running_loop()), None)
        if place is not None:
            await asyncio.shield(_start_closing(place))  # and not left half-way, though the caller gives up


class _Place:
    """Where the client of one loop is kept."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._client: Any = None
        self._holder: AsyncGenerator[Any] | None = None
        self._users = 0
        self._unused = asyncio.Event()
        self._unused.set()

    async def ask(self, action: Action, connect: Connect, forget: Callable[[], Any]) -> Any:
        """Have the client do something, and make it first if there is none."""
        self._users += 1
        self._unused.clear()
        try:
            if self._client is None:
                await self._fill(connect, forget)
            return await action(self._client)
        finally:
            self._users -= 1
            if self._users == 0:
                self._unused.set()

    async def empty(self) -> None:
        """Close the client, once nobody uses it: it would open itself again, and nobody would close that."""
        try:
            await self._unused.wait()
        finally:
            if self._holder is not None:
                await self._holder.aclose()

    async def _fill(self, connect: Connect, forget: Callable[[], Any]) -> None:
        async with self._lock:
            if self._client is not None:
                return  # another has made it meanwhile
            holder = _hold(connect, forget)
            self._client = await anext(holder)
            self._holder = holder


_Places: TypeAlias = "dict[tuple[int, asyncio.AbstractEventLoop], _Place]"


async def _hold(connect: Connect, forget: Callable[[], Any]) -> AsyncGenerator[Any]:
    """Hold a client open; a loop closes the asynchronous generators that began on it before it is closed itself."""
    async with connect() as client:
        try:
            yield client
        finally:
            forget()


def _forget(places: _Places, this: tuple[int, asyncio.AbstractEventLoop], place: _Place) -> None:
    if places.get(this) is place:  # or it was closed, and another took its place
        del places[this]


def _close_soon(places: _Places) -> None:
    """Have every loop close the client of a layer that is no more."""
    for (pid, loop), place in list(places.items()):
        if pid == os.getpid() and not loop.is_closed():
            loop.call_soon_threadsafe(_start_closing, place)


_closings: set[asyncio.Task[None]] = set()


def _start_closing(place: _Place) -> asyncio.Task[None]:
    task = asyncio.ensure_future(place.empty())
    _closings.add(task)
    task.add_done_callback(_closings.discard)
    return task
