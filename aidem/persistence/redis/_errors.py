"""Error replies of servers and exceptions of redis-py and of the network, as errors of aidem."""

from __future__ import annotations

import re
import ssl
from typing import TYPE_CHECKING, Final, cast

import redis.exceptions

from aidem.exceptions import (
    IdempotencyPersistenceConfigError,
    IdempotencyPersistenceConnectionError,
    IdempotencyPersistenceLayerError,
)

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator

CLOSED: Final = "the persistence layer was closed"
LOST: Final = "the connection to Redis was lost"
MAY_BE_APPLIED: Final = "the operation may have been applied"


class ReplyError(Exception):
    """The server answered with an error.

    Attributes:
        code: Its first word, such as `READONLY`. The rest may quote arguments, and is not kept.
        address: With MOVED or ASK: host and port of the node to ask; an empty host means the host of this node.
    """

    def __init__(self, text: str) -> None:
        # A server before 7.0 wraps an error within a script: "ERR Error running script …: -OOM command not allowed".
        match = _WITHIN_SCRIPT.search(text)
        self.code = match.group(1) if match else text.partition(" ")[0]
        elsewhere = _ELSEWHERE.match(text)
        self.address = (elsewhere[1], int(elsewhere[2])) if elsewhere else None
        super().__init__(self.code)

    @property
    def ends_connection(self) -> bool:
        """Whether a new connection may lead to a server that accepts the command."""
        return self.code in {"READONLY", "MASTERDOWN"}


_ELSEWHERE: Final = re.compile(r"(?:MOVED|ASK) \d+ \??(\S*):(\d+)$")
_WITHIN_SCRIPT: Final = re.compile(r"^ERR Error running script.*?: -?([A-Z]{3,})\b")

_TRY_AGAIN: Final = {
    "LOADING": "it is loading its data set after a start; try again when it is done",
    "OOM": "it is out of memory; raise its maxmemory, or remove data",
    "READONLY": "it is a replica and takes no writes; connect to the primary, or wait for the failover to end",
    "MASTERDOWN": "it is a replica that has lost its primary; connect to the primary, or wait for the failover to end",
    "CLUSTERDOWN": "its cluster is down, or the slot of the key is served by no node; repair the cluster",
    "TRYAGAIN": "it is moving the slot of the key; try again",
    "MOVED": "it is a node of a cluster and another node has the key; use mode='cluster'",
    "ASK": "it is a node of a cluster and is moving the key to another node; use mode='cluster'",
    "BUSY": "it is running a slow script; wait, or end the script with SCRIPT KILL",
    "MISCONF": "it cannot write its data set to its disk and refuses writes; see the server's log",
    "NOREPLICAS": "it has too few replicas for min-replicas-to-write; repair them, or lower that setting",
}
_REFUSED: Final = {
    "NOAUTH": "it wants a password; give the layer username and password, or a URL with them",
    "WRONGPASS": "it does not accept the username or the password",
    "NOPERM": "its ACL denies this user a command or key; see ACL LOG, and docs/redis.md for what aidem uses",
    "WRONGTYPE": "the key holds a value that is not a string; use another key_prefix or database",
}


def translated(error: ReplyError) -> IdempotencyPersistenceLayerError:
    """Return the error for a command that the server answered with an error."""
    problem = (
        _TRY_AGAIN.get(error.code)
        or _REFUSED.get(error.code)
        or "aidem does not expect this error; see the log of the server"
    )
    text = f"Redis answered {error.code}: {problem}"
    failure = IdempotencyPersistenceLayerError(text)
    if error.code in _TRY_AGAIN:
        failure = IdempotencyPersistenceConnectionError(text)
    elif error.code in _REFUSED:
        failure = IdempotencyPersistenceConfigError(text)
    failure.may_be_applied = error.code not in _TRY_AGAIN and error.code not in _REFUSED
    failure.__cause__ = error
    return failure


def connecting_failed(error: Exception, *, address: str, timeout_seconds: float) -> IdempotencyPersistenceLayerError:
    """Return the error for a connection that could not be made."""
    what = type(error).__name__
    if isinstance(error, IdempotencyPersistenceLayerError):  # the handshake failed
        what = str(error).removesuffix(f"; {MAY_BE_APPLIED}")
    for cause in _chain(error):
        problem = _refusal(cause)
        if problem is not None:
            return IdempotencyPersistenceConfigError(f"Redis at {address} cannot be used: {problem}")
        if isinstance(cause, TimeoutError | redis.exceptions.TimeoutError):
            what = f"no answer within {timeout_seconds:.3g} s, which timeout_seconds allows"
    failure = IdempotencyPersistenceConnectionError(
        f"Redis at {address} cannot be reached ({what}): see that it runs, that the network leads there, and that it "
        "expects TLS (rediss://, ssl=True) if the layer does, and no TLS (redis://, ssl=False) otherwise"
    )
    failure.may_be_applied = False  # commands that wait for a connection were not sent
    return failure


def listening_failed(error: Exception) -> IdempotencyPersistenceLayerError:
    """Return the error for a subscription that redis-py says has failed."""
    reply = _reply_of(error)
    if reply is not None:
        return translated(reply)
    failure = IdempotencyPersistenceConnectionError(LOST)
    failure.__cause__ = error
    return failure


def failure_of(task: asyncio.Task[None]) -> IdempotencyPersistenceLayerError | None:
    """Return the error of a task that connects; None: it succeeded."""
    if task.cancelled():
        return IdempotencyPersistenceConnectionError(CLOSED)
    return cast("IdempotencyPersistenceLayerError | None", task.exception())


def _refusal(error: BaseException) -> str | None:
    """Return what has to be changed before a connection can work; None: the error shows nothing of that kind."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            "this machine does not trust its certificate for that host; "
            "name its CA with ?ssl_ca_certs=/path/to/ca.pem in the URL"
        )
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
        return "it does not speak TLS as the layer wants it; see ssl=True or rediss://, versions and certificates"
    reply = _reply_of(error)
    if reply is None or reply.code in _TRY_AGAIN:
        return None
    return _REFUSED.get(reply.code, "it refuses this user or database; see username, password and db_index")


def _reply_of(error: BaseException) -> ReplyError | None:
    """Return what the server replied, if the error says so; redis-py has types of its own for the codes."""
    if isinstance(error, ReplyError):
        return error
    return next((ReplyError(code) for kind, code in _CODES.items() if isinstance(error, kind)), None)


_CODES: Final = {
    redis.exceptions.AuthenticationError: "WRONGPASS",
    redis.exceptions.NoPermissionError: "NOPERM",
    redis.exceptions.BusyLoadingError: "LOADING",
    redis.exceptions.ResponseError: "ERR",  # the base of others, so it comes last
}


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
