"""The operations of one call on its persistence layer: settled though cancelled, tried again, their errors wrapped."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import TYPE_CHECKING, Final, NoReturn, TypeVar

from aidem._cancellation import CLEANUP_SECONDS, Settled
from aidem.exceptions import (
    IdempotencyPersistenceConfigError,
    IdempotencyPersistenceConnectionError,
    IdempotencyPersistenceLayerError,
    IdempotencySerializationError,
)
from aidem.hooks import EventKind

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aidem._cancellation import HeldOff
    from aidem.hooks import Reporter

logger = logging.getLogger("aidem")

T = TypeVar("T")

FIRST_DELAY_SECONDS: Final = 0.05
DELAY_GROWTH: Final = 1.4
LONGEST_DELAY_SECONDS: Final = 1.0

NOTHING_RUN: Final = "the function was not run"
RUNNING: Final = "the function is running"
FAILED: Final = "the function has failed, and its key was not given back"
EFFECT_HAPPENED: Final = "the function has run and its effect has happened, its outcome is not recorded"


def ask(
    start: Callable[[], Awaitable[T]],
    *,
    held_off: HeldOff,
    key: str,
    effect: str,
    within_seconds: float | None = None,
) -> Awaitable[T]:
    """Ask the layer once.

    Args:
        start: Starts the operation.
        held_off: Settles it.
        key: The idempotency key, for the error.
        effect: What an error says of the function.
        within_seconds: How long it may take; None: until the deadline of `held_off`.

    Raises:
        IdempotencyPersistenceLayerError: It failed.
        IdempotencySerializationError: The layer cannot hold the record.
    """
    operation = started(start)
    if isinstance(operation, Settled):
        return operation  # there is nothing to wait for, and no coroutine to pay for
    return _ask(operation, held_off, key, effect, within_seconds)


def started(start: Callable[[], Awaitable[T]]) -> Awaitable[T]:
    """Start an operation; what fails at once fails as what fails later."""
    try:
        return start()
    except Exception as error:  # noqa: BLE001 - it is raised where the operation is awaited
        return _raised(error)


async def _raised(error: Exception) -> NoReturn:
    raise error


async def _ask(operation: Awaitable[T], held_off: HeldOff, key: str, effect: str, within_seconds: float | None) -> T:
    try:
        return await held_off.settle(operation, within_seconds=within_seconds)
    except Exception as error:
        if isinstance(error, IdempotencySerializationError) and effect == EFFECT_HAPPENED:
            raise  # the result does not fit; elsewhere it would be a fault of the layer
        raise _failure(error, key, effect) from error


def ask_persistently(
    start: Callable[[], Awaitable[T]],
    *,
    held_off: HeldOff,
    key: str,
    effect: str,
    reporter: Reporter,
) -> Awaitable[T]:
    """Ask the layer again and again, with back-off, until the deadline of `held_off`: the operation can be repeated."""
    operation = started(start)
    if isinstance(operation, Settled):
        return operation
    return _ask_persistently(operation, start, held_off=held_off, key=key, effect=effect, reporter=reporter)


async def _ask_persistently(
    operation: Awaitable[T],
    start: Callable[[], Awaitable[T]],
    *,
    held_off: HeldOff,
    key: str,
    effect: str,
    reporter: Reporter,
) -> T:
    attempt = 0
    while True:
        try:
            return await _ask(operation, held_off, key, effect, CLEANUP_SECONDS)
        except IdempotencyPersistenceConfigError:
            raise
        except IdempotencyPersistenceLayerError as failure:
            delay = backoff_seconds(attempt)
            deadline = held_off.deadline
            if deadline is None or asyncio.get_running_loop().time() + delay > deadline:
                raise
            logger.warning("%s; trying again", failure)
            reporter.report(EventKind.PERSISTENCE_ERROR, error=failure)
        attempt += 1
        await held_off.settle(asyncio.sleep(delay))
        operation = started(start)


def backoff_seconds(attempt: int) -> float:
    """Return how long to wait before the next attempt: at most 20 in the first 5 s, then at most one a second."""
    delay = min(LONGEST_DELAY_SECONDS, FIRST_DELAY_SECONDS * DELAY_GROWTH ** min(attempt, 20))
    return delay * random.uniform(1.0, 1.25)  # noqa: S311 - jitter, not a secret


def _failure(error: Exception, key: str, effect: str) -> IdempotencyPersistenceLayerError:
    """Return the error of a layer as one of ours; the text of a foreign error may show data, so it is left out."""
    what = str(error) if isinstance(error, IdempotencyPersistenceLayerError) else type(error).__name__
    for kind in (IdempotencyPersistenceConnectionError, IdempotencyPersistenceConfigError):
        if isinstance(error, kind):
            return kind(f"{what}; {effect}", key=key)
    return IdempotencyPersistenceLayerError(f"{what}; {effect}", key=key)
