"""An operation of a persistence layer: settled though its caller is cancelled, its errors wrapped."""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING, Final, NoReturn, TypeVar

from aidem._runtime.cancellation import CancellationShield, Immediate
from aidem.exceptions import (
    IdempotencyPersistenceConfigError,
    IdempotencyPersistenceConnectionError,
    IdempotencyPersistenceLayerError,
    IdempotencySerializationError,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")

NOTHING_RUN: Final = "the function was not run"
RUNNING: Final = "the function is running"
FAILED: Final = "the function has failed, and its key was not given back"
EFFECT_HAPPENED: Final = "the function has run and its effect has happened, its outcome may not be recorded"
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


def ask(
    start: Callable[[], Awaitable[T]],
    *,
    shield: CancellationShield,
    key: str,
    effect: str,
    within_seconds: float | None = None,
) -> Awaitable[T]:
    """Ask the layer once.

    Args:
        start: Starts the operation.
        shield: Settles it.
        key: The idempotency key, for the error.
        effect: What an error says of the function.
        within_seconds: How long it may take; None: until the deadline of `shield`.

    Raises:
        IdempotencyPersistenceLayerError: It failed.
        IdempotencySerializationError: The layer cannot hold the record.
    """
    operation = started(start)
    if isinstance(operation, Immediate):
        return operation  # there is nothing to wait for, and no coroutine to pay for
    return settled(operation, shield, key, effect, within_seconds)


def started(start: Callable[[], Awaitable[T]]) -> Awaitable[T]:
    """Start an operation; what fails at once fails as what fails later."""
    try:
        return start()
    except Exception as error:  # noqa: BLE001 - it is raised where the operation is awaited
        return _raised(error)


async def _raised(error: Exception) -> NoReturn:
    raise error


async def settled(
    operation: Awaitable[T],
    shield: CancellationShield,
    key: str,
    effect: str,
    within_seconds: float | None,
    *,
    tries: int = 1,
) -> T:
    """Wait for an operation that was started, as `ask` does; `tries` is how often it was, for the error."""
    try:
        return await shield.settle(operation, within_seconds=within_seconds)
    except Exception as error:
        if isinstance(error, IdempotencySerializationError) and effect == EFFECT_HAPPENED:
            raise  # the result does not fit; elsewhere it would be a fault of the layer
        raise _failure(error, key, effect, tries) from error


def _failure(error: Exception, key: str, effect: str, tries: int) -> IdempotencyPersistenceLayerError:
    """Return the error of a layer as one of ours."""
    kind = IdempotencyPersistenceLayerError
    if isinstance(error, IdempotencyPersistenceConfigError):
        kind = IdempotencyPersistenceConfigError
    elif isinstance(error, IdempotencyPersistenceConnectionError) or _is_outage(error):
        kind = IdempotencyPersistenceConnectionError
    failure = kind(f"{told(error)}{f' (tried {tries} times)' if tries > 1 else ''}; {effect}", key=key)
    failure.may_be_applied = _may_be_applied(error)
    return failure


def told(error: BaseException | None) -> str:
    """Return what may be told of an error: the text of a foreign one may show data."""
    return str(error) if isinstance(error, IdempotencyPersistenceLayerError) else type(error).__name__


def _may_be_applied(error: Exception) -> bool:
    """Whether the store may have done what was asked all the same."""
    if isinstance(error, IdempotencyPersistenceLayerError):
        return error.may_be_applied
    return not isinstance(error, ConnectionRefusedError | socket.gaierror)


def _is_outage(error: Exception) -> bool:
    """Whether a foreign error means that the store could not be reached or did not answer in time."""
    if isinstance(error, ConnectionError | TimeoutError | socket.gaierror):
        return True
    if type(error) is OSError and error.errno is None:
        return str(error).startswith(_ALL_ADDRESSES_FAILED)
    return isinstance(error, OSError) and error.errno in _NO_NETWORK
