"""The operations of one call on its persistence layer: settled though cancelled, tried again, their errors wrapped."""

from __future__ import annotations

import asyncio
import errno
import logging
import random
import socket
from functools import partial
from typing import TYPE_CHECKING, Final, NoReturn, TypeVar

from aidem._runtime.cancellation import CLEANUP_SECONDS, CancellationShield, Immediate, in_background
from aidem.exceptions import (
    IdempotencyPersistenceConfigError,
    IdempotencyPersistenceConnectionError,
    IdempotencyPersistenceLayerError,
    IdempotencySerializationError,
)
from aidem.hooks import EventKind

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aidem.hooks import Reporter

logger = logging.getLogger("aidem")

T = TypeVar("T")

FIRST_DELAY_SECONDS: Final = 0.05
DELAY_GROWTH: Final = 1.4
LONGEST_DELAY_SECONDS: Final = 1.0

FIRST_RETRY_DELAY_SECONDS: Final = 0.1
LONGEST_RETRY_DELAY_SECONDS: Final = 2.0

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
    return _ask(operation, shield, key, effect, within_seconds)


def started(start: Callable[[], Awaitable[T]]) -> Awaitable[T]:
    """Start an operation; what fails at once fails as what fails later."""
    try:
        return start()
    except Exception as error:  # noqa: BLE001 - it is raised where the operation is awaited
        return _raised(error)


async def _raised(error: Exception) -> NoReturn:
    raise error


async def _ask(
    operation: Awaitable[T],
    shield: CancellationShield,
    key: str,
    effect: str,
    within_seconds: float | None,
    *,
    tries: int = 1,
) -> T:
    try:
        return await shield.settle(operation, within_seconds=within_seconds)
    except Exception as error:
        if isinstance(error, IdempotencySerializationError) and effect == EFFECT_HAPPENED:
            raise  # the result does not fit; elsewhere it would be a fault of the layer
        raise _failure(error, key, effect, tries) from error


def ask_persistently(
    start: Callable[[], Awaitable[T]],
    *,
    shield: CancellationShield,
    key: str,
    effect: str,
    reporter: Reporter,
) -> Awaitable[T]:
    """Ask the layer again and again, with back-off, until the deadline of `shield`: the operation can be repeated.

    A coroutine that is closed while it waits leaves it to the background, for `CLEANUP_SECONDS`.
    """
    operation = started(start)
    if isinstance(operation, Immediate):
        return operation
    return _ask_persistently(operation, start, shield=shield, key=key, effect=effect, reporter=reporter)


async def persist(start: Callable[[], Awaitable[T]], *, key: str, effect: str, reporter: Reporter) -> T:
    """Ask the layer again and again, for `in_background`."""
    shield = CancellationShield()
    shield.bound(CLEANUP_SECONDS)
    return await ask_persistently(start, shield=shield, key=key, effect=effect, reporter=reporter)


async def _ask_persistently(
    operation: Awaitable[T],
    start: Callable[[], Awaitable[T]],
    *,
    shield: CancellationShield,
    key: str,
    effect: str,
    reporter: Reporter,
) -> T:
    tries, reason = 1, ""
    try:
        while True:
            try:
                answer = await _ask(operation, shield, key, effect, CLEANUP_SECONDS, tries=tries)
                break
            except IdempotencyPersistenceConfigError:
                raise
            except IdempotencyPersistenceLayerError as failure:
                if not await _paused(tries, failure, shield=shield, reporter=reporter):
                    raise
                reason = _told(failure.__cause__)
            tries += 1
            operation = started(start)
    except GeneratorExit:
        in_background(partial(persist, start, key=key, effect=effect, reporter=reporter), after=shield.operation)
        raise
    if reason:
        logger.warning("the persistence layer did at try %d what it had failed to do: %s", tries, reason)
    return answer


async def _paused(
    tries: int, failure: IdempotencyPersistenceLayerError, *, shield: CancellationShield, reporter: Reporter
) -> bool:
    """Wait before the next try; False: there is no time for one."""
    delay = retry_seconds(tries)
    if shield.deadline is None or asyncio.get_running_loop().time() + delay > shield.deadline:
        return False
    reporter.report(EventKind.PERSISTENCE_ERROR, error=failure)
    try:
        await shield.settle(asyncio.sleep(delay))
    except IdempotencyPersistenceConnectionError:
        return False  # the loop was blocked until after the deadline, and `failure` says more than this
    return True


def backoff_seconds(polls: int) -> float:
    """Return how long to wait before the next look: at most 20 in the first 5 s, then at most one a second."""
    delay = min(LONGEST_DELAY_SECONDS, FIRST_DELAY_SECONDS * DELAY_GROWTH ** min(polls, 20))
    return delay * random.uniform(1.0, 1.25)  # noqa: S311 - jitter, not a secret


def retry_seconds(tries: int) -> float:
    """Return how long to wait before the next try of what has failed: about 0.1 s, then twice as long each time."""
    delay = min(LONGEST_RETRY_DELAY_SECONDS, FIRST_RETRY_DELAY_SECONDS * 2.0 ** min(tries - 1, 10))
    return delay * random.uniform(0.5, 1.0)  # noqa: S311 - jitter: many owners fail at the same moment


def _failure(error: Exception, key: str, effect: str, tries: int) -> IdempotencyPersistenceLayerError:
    """Return the error of a layer as one of ours."""
    kind = IdempotencyPersistenceLayerError
    if isinstance(error, IdempotencyPersistenceConfigError):
        kind = IdempotencyPersistenceConfigError
    elif isinstance(error, IdempotencyPersistenceConnectionError) or _is_outage(error):
        kind = IdempotencyPersistenceConnectionError
    failure = kind(f"{_told(error)}{f' (tried {tries} times)' if tries > 1 else ''}; {effect}", key=key)
    failure.may_be_applied = _may_be_applied(error)
    return failure


def _told(error: BaseException | None) -> str:
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
