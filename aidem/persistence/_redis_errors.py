"""What a server, a connection and redis-py can answer, as errors of aidem."""

from __future__ import annotations

import re
import ssl
from typing import Final

from aidem.exceptions import (
    IdempotencyPersistenceConfigError,
    IdempotencyPersistenceConnectionError,
    IdempotencyPersistenceLayerError,
)


class ReplyError(Exception):
    """The server answered with an error.

    Attributes:
        code: Its first word, such as `READONLY`; the rest may show what was sent.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        # A server before 7.0 wraps an error within a script: "ERR Error running script …: -OOM command not allowed".
        match = _WITHIN_SCRIPT.search(text)
        self.code = match.group(1) if match else text.partition(" ")[0]


_WITHIN_SCRIPT: Final = re.compile(r"^ERR Error running script.*(?:-| )([A-Z]{3,})\b")

_TRY_AGAIN: Final = {
    "LOADING": "it is loading its data set after a start; try again when it is done",
    "OOM": "it is out of memory; raise its maxmemory, or remove data",
    "READONLY": "it is a replica and takes no writes; connect to the primary, or wait for the failover to end",
    "MASTERDOWN": "it is a replica that has lost its primary; connect to the primary, or wait for the failover to end",
    "CLUSTERDOWN": "its cluster is down, or the slot of the key is served by no node; repair the cluster",
    "TRYAGAIN": "it is moving the slot of the key; try again",
    "MOVED": "it is a node of a cluster and another node has the key; use mode='cluster'",
    "ASK": "it is a node of a cluster and is moving the key to another node; use mode='cluster'",
    "BUSY": "it is busy with a script of somebody; wait, or end that one with SCRIPT KILL",
    "MISCONF": "it cannot write its data set to its disk and refuses writes; see the server's log",
    "NOREPLICAS": "it has too few replicas for min-replicas-to-write; repair them, or lower that setting",
}
_REFUSED: Final = {
    "NOAUTH": "it wants a password; give the layer username and password, or a URL with them",
    "WRONGPASS": "it does not accept the username or the password",
    "NOPERM": "its ACL denies this user a command or key; see ACL LOG, and docs/redis.md for what aidem uses",
    "WRONGTYPE": "a key of aidem holds something that is not a string; use another key_prefix or database",
}


def translated(error: ReplyError) -> IdempotencyPersistenceLayerError:
    """Return the error for a command that the server answered with an error."""
    if error.code in _TRY_AGAIN:
        return IdempotencyPersistenceConnectionError(f"Redis answered {error.code}: {_TRY_AGAIN[error.code]}")
    if error.code in _REFUSED:
        return IdempotencyPersistenceConfigError(f"Redis answered {error.code}: {_REFUSED[error.code]}")
    return IdempotencyPersistenceLayerError(f"Redis answered {error.code}; see the server's log")
