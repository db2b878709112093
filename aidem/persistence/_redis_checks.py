"""What a server says of itself that endangers the promises."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from aidem.exceptions import IdempotencyPersistenceConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

OLDEST_VERSION: Final = (6, 2)


def info_of(reply: bytes) -> dict[str, str]:
    """Return what INFO answered, by name."""
    return dict(re.findall(r"^(\w+):(.*?)\r?$", reply.decode(errors="replace"), re.MULTILINE))


def check_version(info: dict[str, str]) -> None:
    """Refuse a server that lacks what the scripts need.

    Raises:
        IdempotencyPersistenceConfigError: It is too old.
    """
    version = info.get("redis_version", "")
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if numbers and numbers < OLDEST_VERSION:
        raise IdempotencyPersistenceConfigError(f"this server is Redis {version}; aidem needs 6.2 or newer, or Valkey")


def warnings_of(info: dict[str, str], *, save: str) -> Iterator[str]:
    """Say which settings endanger records; `save` is that setting."""
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
