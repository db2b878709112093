"""Which nodes of a cluster have which slots, as one of them says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aidem.exceptions import IdempotencyPersistenceConfigError, IdempotencyPersistenceLayerError
from aidem.persistence.redis._errors import ReplyError
from aidem.persistence.redis._questions import answer_of

if TYPE_CHECKING:
    from aidem.persistence.redis._server import Server

Address = tuple[str, int]
"""Host and port."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Slots, and who has them.

    Attributes:
        first: The first slot.
        last: The last slot.
        nodes: The primary, and then its replicas.
    """

    first: int
    last: int
    nodes: tuple[Address, ...]


async def shards_seen_by(node: Server, *, timeout_seconds: float) -> list[Shard]:
    """Ask a node how its cluster is made up.

    Raises:
        IdempotencyPersistenceLayerError: It does not say.
        IdempotencyPersistenceConfigError: It is not a node of a cluster.
    """
    try:
        reply = await answer_of(node, "CLUSTER", "SLOTS", timeout_seconds=timeout_seconds)
    except IdempotencyPersistenceLayerError as error:
        if isinstance(error.__cause__, ReplyError) and error.__cause__.code == "ERR":
            raise IdempotencyPersistenceConfigError(
                f"Redis at {node.address} is not a node of a cluster; leave out mode='cluster' or redis+cluster://"
            ) from error
        raise
    return [
        Shard(first=first, last=last, nodes=tuple(_address(entry, said_by=node) for entry in nodes))
        for first, last, *nodes in reply
    ]


def _address(entry: list[Any], *, said_by: Server) -> Address:
    """Return the address of a node; one that has no name is where the one is that says so."""
    host, port, *_ = entry
    name = (host or b"").decode()
    return said_by.host if name in {"", "?"} else name, port
