"""What a server says of itself that endangers the promises."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from aidem.exceptions import IdempotencyPersistenceConfigError, IdempotencyPersistenceLayerError
from aidem.persistence._redis_errors import ReplyError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    Ask = Callable[..., Awaitable[Any]]

OLDEST_VERSION: Final = (6, 2)


async def problems(ask: Ask) -> list[str]:
    """Say which settings of a server endanger records, as far as its ACL lets us look.

    Args:
        ask: Sends a command and answers the reply.

    Raises:
        IdempotencyPersistenceLayerError: It cannot be reached.
        IdempotencyPersistenceConfigError: It is too old.
    """
    info = _info(await _if_allowed(ask("INFO")) or b"")
    _check_version(info.get("redis_version", ""))
    _, save = await _if_allowed(ask("CONFIG", "GET", "save")) or (b"save", b"unknown")
    return list(_problems(info, save=save.decode()))


async def _if_allowed(reply: Awaitable[Any]) -> Any:
    """Return the reply; None where the ACL, or whoever runs the server, has forbidden the command."""
    try:
        return await reply
    except IdempotencyPersistenceLayerError as error:
        if isinstance(error.__cause__, ReplyError) and error.__cause__.code in {"NOPERM", "ERR"}:
            return None
        raise


def _info(reply: bytes) -> dict[str, str]:
    """Return what INFO answered, by name."""
    return dict(re.findall(r"^(\w+):(.*?)\r?$", reply.decode(errors="replace"), re.MULTILINE))


def _check_version(version: str) -> None:
    """Refuse a server that lacks what the scripts need."""
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if numbers and numbers < OLDEST_VERSION:
        raise IdempotencyPersistenceConfigError(f"this server is Redis {version}; aidem needs 6.2 or newer, or Valkey")


def _problems(info: dict[str, str], *, save: str) -> Iterator[str]:
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
