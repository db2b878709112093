"""Settings of servers that endanger records."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from aidem._runtime.clock import wall_clock
from aidem.exceptions import IdempotencyPersistenceConfigError, IdempotencyPersistenceLayerError
from aidem.persistence import Diagnosis
from aidem.persistence._diagnosis import clock_fact, clock_problems, joined
from aidem.persistence.redis._errors import ReplyError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from aidem._runtime.cancellation import UncancellableFuture
    from aidem.persistence.redis._line import Line

OLDEST_VERSION: Final = (6, 2)
SETTINGS: Final = ("maxmemory-policy", "appendonly", "appendfsync", "save", "min-replicas-to-write")
NOT_SHOWN: Final = "not shown by its ACL"


async def problems(nodes: Iterable[Line], *, mode: str) -> list[str]:
    """Return which settings of servers endanger records, as far as their ACL shows them.

    Args:
        nodes: The lines to the servers.
        mode: How they keep records: `"standalone"`, `"cluster"` or `"sentinel"`.

    Raises:
        IdempotencyPersistenceLayerError: One cannot be reached.
        IdempotencyPersistenceConfigError: One is too old.
    """
    found = list[str]()
    for node in nodes:
        info = _info(await _if_allowed(node.query("INFO")) or b"")
        version = info.get("redis_version", "")
        numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
        if numbers and numbers < OLDEST_VERSION:
            raise IdempotencyPersistenceConfigError(
                f"this server is Redis {version}; aidem needs 6.2 or newer, or Valkey"
            )
        policy = info.get("maxmemory_policy", "noeviction")
        if policy != "noeviction" and info.get("maxmemory") != "0":
            found.append(
                f"maxmemory-policy is {policy}: when memory is short, Redis drops records, and calls may run twice; "
                "set it to noeviction"
            )
        _, save = await _if_allowed(node.query("CONFIG", "GET", "save")) or (b"save", b"unknown")
        if info.get("aof_enabled") == "0" and save == b"":
            found.append(
                "appendonly is no and save is empty: when Redis restarts, all records are gone, and calls may run "
                "twice; set appendonly to yes"
            )
        # INFO has the number of good replicas only where that setting is on.
        if mode == "sentinel" and "connected_slaves" in info and "min_slaves_good_slaves" not in info:
            found.append(
                "min-replicas-to-write is 0: a primary that is cut off while another takes its place goes on "
                "acknowledging records that are then gone, and calls may run twice; set it to 1 or more"
            )
    return list(dict.fromkeys(found))


async def diagnosis(nodes: Sequence[Line], *, mode: str) -> Diagnosis:
    """Return what servers are, and all that endangers records in them; see `problems`."""
    found = dict.fromkeys(await problems(nodes, mode=mode))
    facts: dict[str, list[str]] = {}
    for node in nodes:
        info = _info(await _if_allowed(node.query("INFO")) or b"")
        replies = {name: await _if_allowed(node.query("CONFIG", "GET", name)) for name in SETTINGS}
        settings = {name: (each[1].decode() or '""') if each else NOT_SHOWN for name, each in replies.items()}
        time = await _if_allowed(node.query("TIME"))
        ahead_seconds = wall_clock() - int(time[0]) - int(time[1]) / 1e6 if time else 0.0
        software = "Valkey" if "valkey_version" in info else "Redis"
        version = info.get("valkey_version") or info.get("redis_version") or "of a version that its ACL does not show"
        for name, fact in {
            "server": f"{software} {version}",
            "mode": mode if len(nodes) == 1 else f"{mode}, {len(nodes)} primaries",
            "role": {"master": "primary", "slave": "replica"}.get(info.get("role", ""), NOT_SHOWN),
            "replicas": info.get("connected_slaves", NOT_SHOWN),
            "used_memory": info.get("used_memory_human", NOT_SHOWN),
            "maxmemory": "no limit" if info.get("maxmemory") == "0" else info.get("maxmemory_human", NOT_SHOWN),
            **settings,
            "clock of this machine": clock_fact(ahead_seconds),
        }.items():
            facts.setdefault(name, []).append(fact)
        found |= dict.fromkeys(_more_problems(info, settings, mode=mode))
        found |= dict.fromkeys(clock_problems(ahead_seconds, danger="`aidem list` judges states by it"))
    return Diagnosis({name: joined(each) for name, each in facts.items()}, tuple(found))


async def _if_allowed(reply: UncancellableFuture[Any]) -> Any:
    """Return the reply; None where the ACL forbids the command, or the server does not have it."""
    try:
        await reply.waiter()  # can be cancelled at once, unlike the reply
        return reply.result()
    except IdempotencyPersistenceLayerError as error:
        if isinstance(error.__cause__, ReplyError) and error.__cause__.code in {"NOPERM", "ERR"}:
            return None
        raise


def _info(reply: bytes) -> dict[str, str]:
    """Return the fields of a reply to INFO, by name."""
    return dict(re.findall(r"^(\w+):(.*?)\r?$", reply.decode(errors="replace"), re.MULTILINE))


def _more_problems(info: dict[str, str], settings: dict[str, str], *, mode: str) -> Iterator[str]:
    """Yield what is too usual, or too much of the moment, to be logged by every process that connects."""
    if info.get("role") == "slave":
        yield "this server is a replica, which takes no writes; connect to its primary, or by redis+sentinel://"
    if info.get("cluster_enabled") == "1" and mode != "cluster":
        yield "this server is a node of a cluster, which has only some of the keys; connect by redis+cluster://"
    if info.get("aof_enabled") == "1" and settings["appendfsync"] not in {"always", NOT_SHOWN}:
        lost = "a second" if settings["appendfsync"] == "everysec" else "half a minute"
        yield (
            f"appendfsync is {settings['appendfsync']}: a power failure loses up to {lost} of records, and calls may "
            "run twice; set it to always, or accept that"
        )
    for name, setting in (("rdb_last_bgsave_status", "save"), ("aof_last_write_status", "appendonly")):
        if info.get(name, "ok") != "ok":
            yield f"the last write for {setting} failed ({name} is {info[name]}); see the log and the disk of Redis"
