"""Clusters of Redis and Valkey for tests, and servers with sentinels; all on free ports, ended by pid.

with cluster("redis", replicas=1) as nodes:                 # three primaries, and a replica of the first
    connect("127.0.0.1", nodes[0].port)
with watched("valkey") as service:                          # a primary and its replica
    connect_by_sentinels(service.url)
    service.primary.kill()
"""

from __future__ import annotations

import contextlib
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import redis

from tests.support.servers import RedisServer, free_port, program, started

PRIMARIES = 3
SLOTS = 16384
PATIENCE_SECONDS = 40.0
# Nobody takes over from a server that only has to wait for the processor; once one is lost, its others hurry.
UNHURRIED_MILLISECONDS = 15000
NODE_TIMEOUT_MILLISECONDS = 1500
DOWN_AFTER_MILLISECONDS = 700


def eventually(has_happened: Callable[[], bool], *, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        with contextlib.suppress(redis.RedisError):
            if has_happened():
                return
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def told(server: RedisServer, *command: Any) -> Any:
    """Return what a server replies, as it says it."""
    with redis.Redis(port=server.port, protocol=2, decode_responses=True, socket_timeout=10) as client:
        client.response_callbacks.clear()
        return client.execute_command(*command)


def errors_of(servers: Iterable[RedisServer], code: str) -> int:
    """Return how often servers have answered with an error."""
    found = (re.search(rf"errorstat_{code}:count=(\d+)", told(server, "INFO", "errorstats")) for server in servers)
    return sum(int(each[1]) for each in found if each)


# --- Clusters -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def cluster(kind: str, *options: str, primaries: int = PRIMARIES, replicas: int = 0) -> Iterator[list[RedisServer]]:
    """Run a cluster: first its primaries, which share the slots evenly, then the replicas of the first of them."""
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(_node(kind, *options)) for _ in range(primaries + replicas)]
        for number, node in enumerate(nodes[:primaries]):
            first, last = SLOTS * number // primaries, SLOTS * (number + 1) // primaries - 1
            told(node, "CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            told(node, "CLUSTER", "ADDSLOTSRANGE", first, last)
        for node in nodes[1:]:
            told(node, "CLUSTER", "MEET", "127.0.0.1", nodes[0].port, _bus_port(nodes[0]))
        eventually(lambda: all(_knows(node, len(nodes)) for node in nodes), what="the nodes did not meet")
        for node in nodes[primaries:]:
            told(node, "CLUSTER", "REPLICATE", told(nodes[0], "CLUSTER", "MYID"))
            eventually(partial(is_replicating, node), what="the replica did not follow")
        eventually(lambda: all(_is_well(node) for node in nodes), what="the cluster did not come up")
        yield nodes


def _node(kind: str, *options: str) -> contextlib.AbstractContextManager[RedisServer]:
    ours = {
        "--cluster-enabled": "yes",
        "--cluster-port": str(free_port()),
        "--cluster-node-timeout": str(UNHURRIED_MILLISECONDS),
        "--repl-diskless-sync-delay": "0",
        "--repl-ping-replica-period": "1",
    }
    return started(kind, *(part for option in ours.items() for part in option), *options)


def _bus_port(node: RedisServer) -> int:
    return int(node.command[node.command.index("--cluster-port") + 1])


def _knows(node: RedisServer, count: int) -> bool:
    lines = told(node, "CLUSTER NODES").splitlines()
    return len(lines) == count and not any("handshake" in line for line in lines)


def _is_well(node: RedisServer) -> bool:
    return "cluster_state:ok" in told(node, "CLUSTER INFO")


@contextlib.contextmanager
def slot_moving(slot: int, source: RedisServer, target: RedisServer, *, nodes: Sequence[RedisServer]) -> Iterator[None]:
    """Let a slot be on its way; when the block is left it has arrived, and all nodes say so."""
    told(target, "CLUSTER", "SETSLOT", slot, "IMPORTING", told(source, "CLUSTER", "MYID"))
    told(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", told(target, "CLUSTER", "MYID"))
    yield
    while keys := told(source, "CLUSTER", "GETKEYSINSLOT", slot, 100):
        told(source, "MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
    for node in (target, source):
        told(node, "CLUSTER", "SETSLOT", slot, "NODE", told(target, "CLUSTER", "MYID"))
    # Who moves a slot back before all have heard of it leaves a cluster behind whose nodes do not agree.
    eventually(lambda: len({_view_of(node) for node in nodes}) == 1, what="the nodes do not agree")


def _view_of(node: RedisServer) -> frozenset[tuple[str, ...]]:
    """Return the id, epoch and slots of each node, as one of them sees it."""
    lines = (line.split() for line in told(node, "CLUSTER NODES").splitlines())
    return frozenset((line[0], line[6], *line[8:]) for line in lines)


def is_replicating(node: RedisServer) -> bool:
    return "master_link_status:up" in told(node, "INFO", "replication")


# --- Sentinels ------------------------------------------------------------------------------------------------------

SERVICE = "records"


@dataclass(frozen=True)
class Watched:
    """A primary, its replica, and sentinels that watch them."""

    primary: RedisServer
    replica: RedisServer
    sentinels: list[RedisServer]

    @property
    def url(self) -> str:
        places = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{places}/{SERVICE}/0"

    def named(self) -> int:
        """Return the port of the primary, as the first sentinel that answers sees it."""
        for sentinel in self.sentinels:
            with contextlib.suppress(redis.ConnectionError):
                return int(told(sentinel, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)[1])
        raise AssertionError("no sentinel answers")


@contextlib.contextmanager
def watched(kind: str, *options: str, sentinels: int = 1) -> Iterator[Watched]:
    """Run two servers, one of which replicates the other, and sentinels.

    Args:
        kind: `redis` or `valkey`.
        options: For the servers, as on the command line.
        sentinels: How many.
    """
    quick = ("--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1")
    with contextlib.ExitStack() as stack:
        primary = stack.enter_context(started(kind, *quick, *options))
        replica = stack.enter_context(
            started(kind, *quick, *options, "--replicaof", f"127.0.0.1 {primary.port}", "--replica-priority", "1")
        )
        eventually(lambda: is_replicating(replica), what="the replica did not follow")
        watching = [stack.enter_context(_sentinel(kind, primary, quorum=sentinels // 2 + 1)) for _ in range(sentinels)]
        service = Watched(primary, replica, watching)
        eventually(lambda: all(_sees_all(sentinel, service) for sentinel in watching), what="the sentinels see less")
        yield service


@contextlib.contextmanager
def _sentinel(kind: str, primary: RedisServer, *, quorum: int) -> Iterator[RedisServer]:
    with tempfile.TemporaryDirectory(prefix="aidem-sentinel-") as name:
        sentinel = RedisServer([program(kind), "sentinel.conf", "--sentinel"], Path(name), free_port())
        lines = [
            f"port {sentinel.port}",
            "bind 127.0.0.1",
            f"sentinel monitor {SERVICE} 127.0.0.1 {primary.port} {quorum}",
            f"sentinel down-after-milliseconds {SERVICE} {UNHURRIED_MILLISECONDS}",
            f"sentinel failover-timeout {SERVICE} 5000",
        ]
        (sentinel.directory / "sentinel.conf").write_text("\n".join(lines) + "\n")
        try:
            sentinel.start()
            yield sentinel
        finally:
            if sentinel.process is not None:
                sentinel.kill()


def _sees_all(sentinel: RedisServer, service: Watched) -> bool:
    reply = told(sentinel, "SENTINEL", "MASTER", SERVICE)
    fields = dict(zip(reply[::2], reply[1::2], strict=True))
    others = len(service.sentinels) - 1
    return (fields["flags"], fields["num-slaves"], fields["num-other-sentinels"]) == ("master", "1", str(others))


# --- Failovers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A primary and its replica, how to name the one that takes the writes, and who else looks after them.

    Attributes:
        others: The other nodes of their cluster.
        sentinels: Those that watch them.
    """

    primary: RedisServer
    replica: RedisServer
    url: str
    others: Sequence[RedisServer] = ()
    sentinels: Sequence[RedisServer] = ()

    def is_in_step(self) -> bool:
        """Whether the replica has as many keys as the primary."""
        return bool(told(self.primary, "DBSIZE") == told(self.replica, "DBSIZE"))

    def subscriptions(self) -> list[str]:
        """Return what is listened to, wherever that is by now."""
        nodes = (self.replica, *self.others)
        return [name for node in nodes for name in told(node, "PUBSUB", "CHANNELS", "aidem:changed:*")]

    def cut_replication(self) -> None:
        """Let the primary go on alone, for those that are connected to it."""
        with redis.Redis(port=self.primary.port) as client:
            client.config_set("requirepass", "nobody knows it")
            client.execute_command("CLIENT", "KILL", "TYPE", "replica")
        eventually(lambda: not is_replicating(self.replica), what="the replica is still connected")

    def lose(self, how: str = "killed") -> None:
        """Let the primary be `killed` or `hung`, which the others then find out soon."""
        if how == "killed":
            self.primary.kill()
        else:
            self.primary.pause()
        for node in (self.replica, *self.others) if self.others else ():
            told(node, "CONFIG", "SET", "cluster-node-timeout", NODE_TIMEOUT_MILLISECONDS)
        for sentinel in self.sentinels:
            told(sentinel, "SENTINEL", "SET", SERVICE, "down-after-milliseconds", DOWN_AFTER_MILLISECONDS)

    def await_failover(self) -> None:
        eventually(lambda: "role:master" in told(self.replica, "INFO", "replication"), what="nobody took over")


@contextlib.contextmanager
def pair(mode: str, kind: str) -> Iterator[Pair]:
    """Run a primary and a replica that takes over when it is lost.

    Args:
        mode: `cluster`, where they have the first third of the slots, or `sentinel`.
        kind: `redis` or `valkey`.
    """
    if mode == "sentinel":
        with watched(kind) as service:
            yield Pair(service.primary, service.replica, service.url, sentinels=service.sentinels)
    else:
        with cluster(kind, replicas=1) as nodes:
            yield Pair(nodes[0], nodes[-1], f"redis+cluster://127.0.0.1:{nodes[1].port}", nodes[1:-1])
