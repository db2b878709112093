"""A cluster: one line to each primary, and each command goes to the node that has the slot of its key.

A node is asked for the map of slots when the map has no node for a slot, when a node redirects a command, and when a
connection is lost. Commands that were refused or not sent then go to the node that has their slot, until
`timeout_seconds` have passed.

redis-py's `RedisCluster` is not used: while a slot moves, it sends `ASKING` and the command after it on different
connections of its pool, and while its `default_node` is None, it sends scripts with keys to random nodes. In a trial
one key got two owners during a resharding. `docs/internals.md` has the other reasons.
"""

from __future__ import annotations

import asyncio
import random
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from aidem.exceptions import (
    IdempotencyPersistenceConfigError,
    IdempotencyPersistenceConnectionError,
    IdempotencyPersistenceLayerError,
)
from aidem.persistence._errors import copy_of
from aidem.persistence.redis._errors import CLOSED, ReplyError, failure_of, translated
from aidem.persistence.redis._line import Line
from aidem.persistence.redis._server import first_of
from aidem.persistence.redis._wire import Asking, Question

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from aidem.persistence.redis._server import Server
    from aidem.persistence.redis._wire import Command

T = TypeVar("T")

Address = tuple[str, int]
"""Host and port."""

DETOURS_AT_MOST: Final = 5
"""How many redirections a command follows before it waits for a new map of slots."""

PAUSE_SECONDS: Final = 0.1
"""The shortest time between two questions for the map of slots."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shard:
    """A range of slots and its nodes.

    Attributes:
        first: The first slot.
        last: The last slot.
        nodes: The primary, followed by its replicas.
    """

    first: int
    last: int
    nodes: tuple[Address, ...]


class _Stray:
    """A command that was not served where it was sent.

    Attributes:
        failure: The last error.
        detours: How often it was not served.
        timer: Fails the command when its time has passed.
    """

    __slots__ = ("detours", "failure", "timer")

    def __init__(self, timer: asyncio.TimerHandle) -> None:
        self.timer = timer
        self.failure: IdempotencyPersistenceLayerError
        self.detours = 0


class Cluster:
    """Takes the commands of one event loop.

    Args:
        seeds: The nodes that are asked first. Other nodes are connected to with the options of the first one.
        timeout_seconds: How long connecting may take, then how long an operation, and how long a command may be
            redirected or wait for a node.
        remap: Maps the address that nodes announce to the address to connect to. Default: no change.
    """

    def __init__(
        self, seeds: Sequence[Server], *, timeout_seconds: float, remap: Callable[[str, int], Address] | None = None
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._seeds = seeds
        self._timeout_seconds = timeout_seconds
        self._remap = remap
        self._known = list(seeds)
        self._lines: dict[Address, Line] = {}
        self._line_of_slot: list[Line | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        self._held: list[Command[Any]] = []
        self._strays: dict[Command[Any], _Stray] = {}
        self._looking: asyncio.Task[None] | None = None
        self._looked_at = self._loop.time() - PAUSE_SECONDS
        self._is_closed = False

    def ask(self, command: Command[Any]) -> None:
        """Send a command to the node that has its key; its future is always settled."""
        line = self._line_of_slot[key_slot(command.key.encode())]
        if line is None:
            self._hold(command)
        else:
            line.ask(command)

    async def nodes(self) -> Sequence[Line]:
        """Ask for the map of slots; return the lines to all primaries."""
        await self._find()
        return [line for line in dict.fromkeys(self._line_of_slot) if line is not None]

    async def reach(self, attempt: Callable[[Server, float], Awaitable[T]], *, timeout_seconds: float) -> T:
        """Try one node after the other; a message published at one node reaches the subscribers of all."""
        return await first_of(self._known, attempt, timeout_seconds=timeout_seconds)

    async def aclose(self) -> None:
        """Wait for the commands that were asked so far, then close all connections."""
        while pending := [
            *(command.future for command in self._held if not command.future.done()),
            *(future for line in self._lines.values() for future in line.pending()),
        ]:
            await asyncio.wait(pending)
        await self.abort()

    async def abort(self) -> None:
        """Close all connections now."""
        self._is_closed = True
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait([self._looking])
        for line in self._lines.values():
            await line.abort()

    # --- Commands that are not served -------------------------------------------------------------------------------

    def redirected(self, line: Line, command: Command[Any], error: ReplyError) -> bool:
        """Return whether a command that a node has refused is sent to another node, or waits for one."""
        if isinstance(command, Question) or error.code not in {"MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN"}:
            return False
        stray = self._stray(command, translated(error))
        command.asked_at = self._loop.time()  # the next node gets the full time-out, too
        if error.address is None or stray.detours > DETOURS_AT_MOST:
            self._hold(command)
            return True
        host, port = error.address
        if not host:  # the node's own
            host = next(address[0] for address, each in self._lines.items() if each is line)
        target = self._line_to((host, port))
        if error.code == "ASK":
            target.ask_importing(command)
        else:
            self._line_of_slot[key_slot(command.key.encode())] = target
            self._look()
            target.ask(command)
        return True

    def stranded(self, line: Line, commands: Sequence[Command[Any]], failure: IdempotencyPersistenceLayerError) -> None:
        """Send commands that a node did not get to the nodes that have their slots by now; the node may be gone."""
        self._line_of_slot = [None if each is line else each for each in self._line_of_slot]
        for command in commands:
            if isinstance(command, Asking):
                continue
            if isinstance(command, Question) or not isinstance(failure, IdempotencyPersistenceConnectionError):
                command.fail(copy_of(failure))
            else:
                self._stray(command, failure)
                self._hold(command)
        self._look()

    def _stray(self, command: Command[Any], failure: IdempotencyPersistenceLayerError) -> _Stray:
        stray = self._strays.get(command)
        if stray is None:
            timer = self._loop.call_later(self._timeout_seconds, self._give_up, command)
            stray = self._strays[command] = _Stray(timer)
            command.future.add_done_callback(partial(self._settled, command))
        stray.failure = failure
        stray.detours += 1
        return stray

    def _give_up(self, command: Command[Any]) -> None:
        command.fail(copy_of(self._strays[command].failure))

    def _settled(self, command: Command[Any], _future: asyncio.Future[Any]) -> None:
        self._strays.pop(command).timer.cancel()

    # --- The map of slots -------------------------------------------------------------------------------------------

    def _hold(self, command: Command[Any]) -> None:
        if self._is_closed:
            command.fail(IdempotencyPersistenceConnectionError(CLOSED))
        else:
            self._held.append(command)
            self._look()

    def _look(self) -> None:
        if self._looking is None and not self._is_closed:
            # In an empty context: connections outlive the caller, and must not keep its context variables alive.
            name = "aidem looks for the nodes of a Redis cluster"
            self._looking = self._loop.create_task(self._find(), name=name, context=Context())
            self._looking.add_done_callback(self._looked)

    async def _find(self) -> None:
        await asyncio.sleep(max(0.0, self._looked_at + PAUSE_SECONDS - self._loop.time()))
        try:
            shards = await first_of(self._known, _shards_seen_by, timeout_seconds=self._timeout_seconds)
        finally:
            self._looked_at = self._loop.time()
        self._line_of_slot = [None] * REDIS_CLUSTER_HASH_SLOTS
        for shard in shards:
            lines = [self._line_to(shard.nodes[0])] * (shard.last + 1 - shard.first)
            self._line_of_slot[shard.first : shard.last + 1] = lines
        nodes = [self._server_at(node) for node in dict.fromkeys(node for shard in shards for node in shard.nodes)]
        places = {node.address for node in nodes}
        random.shuffle(nodes)  # so that a node that is cut off from the others is not always asked first
        self._known = [*nodes, *(seed for seed in self._seeds if seed.address not in places)]

    def _looked(self, task: asyncio.Task[None]) -> None:
        self._looking = None
        failure = failure_of(task)
        held, self._held = [command for command in self._held if not command.future.done()], []
        for command in held:
            command.asked_at = self._loop.time()
            line = self._line_of_slot[key_slot(command.key.encode())]
            if failure is not None:
                command.fail(copy_of(failure))
            elif line is not None:
                line.ask(command)
            else:
                self._stray(command, IdempotencyPersistenceConnectionError(_NOT_SERVED))
                self._hold(command)

    def _line_to(self, address: Address) -> Line:
        line = self._lines.get(address)
        if line is None:
            line = Line(self._server_at(address), timeout_seconds=self._timeout_seconds, detours=self)
            self._lines[address] = line
        return line

    def _server_at(self, address: Address) -> Server:
        place = address if self._remap is None else self._remap(*address)
        return self._seeds[0].at(*place)


async def _shards_seen_by(node: Server, timeout_seconds: float) -> list[_Shard]:
    """Ask a node for the map of slots.

    Raises:
        IdempotencyPersistenceLayerError: It cannot be reached, or refuses.
        IdempotencyPersistenceConfigError: It is not a node of a cluster.
    """
    try:
        reply = await node.ask("CLUSTER", "SLOTS", timeout_seconds=timeout_seconds)
    except IdempotencyPersistenceLayerError as error:
        if isinstance(error.__cause__, ReplyError) and error.__cause__.code == "ERR":
            raise IdempotencyPersistenceConfigError(
                f"Redis at {node.address} is not a node of a cluster; leave out mode='cluster' or redis+cluster://"
            ) from error
        raise
    return [
        _Shard(
            first=first,
            last=last,
            # A node without a name has the host of the node that answers.
            nodes=tuple((node.host if host in {None, b"", b"?"} else host.decode(), port) for host, port, *_ in nodes),
        )
        for first, last, *nodes in reply
    ]


_NOT_SERVED: Final = "no node of the Redis cluster serves the slot of the key; repair the cluster"
