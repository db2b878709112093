"""Settings of servers that endanger records."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from aidem.exceptions import IdempotencyPersistenceConfigError, IdempotencyPersistenceLayerError
from aidem.persistence.redis._errors import ReplyError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from aidem._runtime.cancellation import UncancellableFuture
    from aidem.persistence.redis._line import Line

OLDEST_VERSION: Final = (6, 2)


async def problems(nodes: Iterable[Line], *, mode: str) -> list[str]:
    """Return which settings of servers endanger records, as far as their ACL shows them.

    Args:
        nodes: The lines to the servers.
        mode: How they keep records: `"standalone"`, `"cluster"` or `"sentinel"`.

    Raises:
        IdempotencyPersistenceLayerError: One cannot be reached.
        IdempotencyPersistenceConfigError: One is too old.
    """
    found = dict[str, None]()  # a set that keeps its order
    for node in nodes:
        info = _info(await _if_allowed(node.query("INFO")) or b"")
        version = info.get("redis_version", "")
        numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
        if numbers and numbers < OLDEST_VERSION:
            raise IdempotencyPersistenceConfigError(
                f"this server is Redis {version}; aidem needs 6.2 or newer, or Valkey"
            )
        _, save = await _if_allowed(node.query("CONFIG", "GET", "save")) or (b"save", b"unknown")
        found |= dict.fromkeys(_problems(info, save=save.decode(), mode=mode))
    return list(found)


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


def _problems(info: dict[str, str], *, save: str, mode: str) -> Iterator[str]:
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction" and info.get("maxmemory") != "0":
        yield (
            f"maxmemory-policy is {policy}: when memory is short, Redis drops records, and calls may run twice; "
            "set it to noeviction"
        )
    if info.get("aof_enabled") == "0" and save == "":
        yield (
            "appendonly is no and save is empty: when Redis restarts, all records are gone, and calls may run twice; "
            "set appendonly to yes"
        )
    # INFO has the number of good replicas only where that setting is on.
    if mode == "sentinel" and "connected_slaves" in info and "min_slaves_good_slaves" not in info:
        yield (
            "min-replicas-to-write is 0: a primary that is cut off while another takes its place goes on acknowledging "
            "records that are then gone, and calls may run twice; set it to 1 or more"
        )
