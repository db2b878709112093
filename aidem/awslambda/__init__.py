"""AWS Lambda: plain handlers made from async ones, and batches of records."""

from __future__ import annotations

import functools
import inspect

# The public one raises where there is none.
from asyncio import _get_running_loop as running_loop  # pyright: ignore[reportPrivateUsage]
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, overload

from aidem._checks import check_options
from aidem._runtime import lambda_lifecycle, lambda_loop
from aidem._runtime.lambda_lifecycle import open_all
from aidem.awslambda._batch import process_batch
from aidem.config import lambda_context_of, register_lambda_context
from aidem.exceptions import IdempotencyUsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Coroutine

    from aidem.config import LambdaContext
    from aidem.persistence import PersistenceLayer

__all__ = ["lambda_handler", "process_batch"]

R = TypeVar("R")
EventT = TypeVar("EventT")
ContextT = TypeVar("ContextT")


@overload
def lambda_handler(
    async_handler: Callable[[EventT, ContextT], Coroutine[Any, Any, R]], /, *, warm: Collection[PersistenceLayer] = ()
) -> Callable[[EventT, ContextT], R]: ...
@overload
def lambda_handler(
    *, warm: Collection[PersistenceLayer] = ()
) -> Callable[[Callable[[EventT, ContextT], Coroutine[Any, Any, R]]], Callable[[EventT, ContextT], R]]: ...
def lambda_handler(
    async_handler: Callable[[Any, Any], Coroutine[Any, Any, Any]] | None = None,
    /,
    *,
    warm: Collection[PersistenceLayer] = (),
) -> Any:
    """Make the plain function that Lambda calls from `async def handler(event, context)`.

    All calls run on one event loop, which is kept for the life of the execution environment, together with the
    connections of layers. It runs only during a call: tasks and threads that remain when the handler ends are ended
    before the call returns. The context is registered for the call, so claims last as long as the invocation. SIGTERM
    and Ctrl-C cancel the handler, so its key is released.

    A call raises the exceptions of the handler, and `IdempotencyUsageError` if an event loop runs in its thread.

    Args:
        async_handler: The handler, if the decorator is used without options.
        warm: Layers to open now, while Lambda initializes the environment, and again after a snapshot was restored. If
            one cannot be opened, a warning is logged, and it is opened at its first use. Default: none.

    Raises:
        TypeError: The handler is not an `async def` function.
        IdempotencyConfigError: `warm` is not a collection of layers.
    """
    check_options(warm=warm)
    if async_handler is None:
        return partial(lambda_handler, warm=warm)
    name = getattr(async_handler, "__qualname__", None) or repr(async_handler)
    if not any(map(inspect.iscoroutinefunction, (async_handler, getattr(async_handler, "__call__", None)))):  # noqa: B004
        raise TypeError(
            f"{name} is not an async function; decorate a plain handler with aidem.sync.idempotent instead. If it "
            "returns a coroutine, write an `async def` that awaits it. Put decorators for plain handlers, such as "
            "those of Powertools, above lambda_handler"
        )
    if warm:
        _open(warm)
        lambda_lifecycle.after_restore(partial(_open, warm))

    @functools.wraps(async_handler)
    def handler(event: Any, context: Any) -> Any:
        if running_loop() is not None:
            raise IdempotencyUsageError(
                "lambda_handler would block the event loop that runs in this thread; await the async function instead: "
                f"{name}.__wrapped__(event, context)"
            )
        lambda_context, _ = lambda_context_of(context)
        return lambda_loop.run(
            partial(_invoke, async_handler, event, context, lambda_context),
            patience=partial(_patience, lambda_context),
        )

    return handler


async def _invoke(
    async_handler: Callable[[Any, Any], Coroutine[Any, Any, R]],
    event: Any,
    context: Any,
    lambda_context: LambdaContext | None,
) -> R:
    if lambda_context is not None:
        register_lambda_context(lambda_context)  # for this task, which has a context of its own that ends with it
    return await async_handler(event, context)


def _patience(lambda_context: LambdaContext | None) -> float:
    """Return for how long to wait for remaining tasks and threads, so that the answer is still sent in time."""
    if lambda_context is None:
        return lambda_loop.PATIENCE_SECONDS
    return min(lambda_loop.PATIENCE_SECONDS, lambda_context.get_remaining_time_in_millis() / 2000)


# --- Warming ----------------------------------------------------------------------------------------------------------


def _open(layers: Collection[PersistenceLayer]) -> None:
    if running_loop() is None:
        lambda_loop.prepare(partial(open_all, layers))
