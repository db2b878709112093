"""What the error of a persistence layer means: which error of aidem it is, and whether the store may have acted."""

from __future__ import annotations

import errno
import socket
from typing import Final

from aidem.exceptions import (
    IdempotencyHeldByTransactionError,
    IdempotencyPersistenceConfigError,
    IdempotencyPersistenceConnectionError,
    IdempotencyPersistenceLayerError,
)

NOTHING_RUN: Final = "the function was not run"
RUNNING: Final = "the function is running"
FAILED: Final = "the function has failed, and its claim was not released"
EFFECT_HAPPENED: Final = "the function has run and its effect has happened, its outcome may not be recorded"
COMMIT_UNKNOWN: Final = (
    "the function has run, and whether the transaction that completes the call was committed is not known"
)
FOUND_HAPPENED: Final = (
    "the function was not run; the check has found that its effect had happened, which may not be recorded"
)
LOST: Final = "the function has run and its effect has happened, but its claim was lost and no outcome is known"

_ALL_ADDRESSES_FAILED: Final = "Multiple exceptions: [Errno"
"""How asyncio begins when a host has several addresses and none of them answers; that error has no number."""

_NO_NETWORK: Final = frozenset(
    {
        errno.EADDRNOTAVAIL,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETRESET,
        errno.ENETUNREACH,
        errno.ENOTCONN,
    }
)


def failure_of(error: Exception, key: str, effect: str, tries: int) -> IdempotencyPersistenceLayerError:
    """Return the error of a layer as one of ours."""
    kind = IdempotencyPersistenceLayerError
    if isinstance(error, IdempotencyPersistenceConfigError):
        kind = IdempotencyPersistenceConfigError
    elif isinstance(error, IdempotencyHeldByTransactionError):
        kind = IdempotencyHeldByTransactionError
    elif isinstance(error, IdempotencyPersistenceConnectionError) or _is_outage(error):
        kind = IdempotencyPersistenceConnectionError
    failure = kind(f"{told(error)}{f' (tried {tries} times)' if tries > 1 else ''}; {effect}", key=key)
    # Whether the store may have done what was asked all the same.
    failure.may_be_applied = (
        error.may_be_applied
        if isinstance(error, IdempotencyPersistenceLayerError)
        else not isinstance(error, ConnectionRefusedError | socket.gaierror)
    )
    return failure


def told(error: BaseException | None) -> str:
    """Return the text of an error; of a foreign error its type only, as its text may show data."""
    return str(error) if isinstance(error, IdempotencyPersistenceLayerError) else type(error).__name__


def _is_outage(error: Exception) -> bool:
    """Whether a foreign error means that the store could not be reached or did not answer in time."""
    if isinstance(error, ConnectionError | TimeoutError | socket.gaierror):
        return True
    if type(error) is OSError and error.errno is None:
        return str(error).startswith(_ALL_ADDRESSES_FAILED)
    return isinstance(error, OSError) and error.errno in _NO_NETWORK
