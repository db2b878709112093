"""Idempotency for ordinary code: the decorators and the context manager of `aidem`, blocking.

The function runs in the thread that called it, and so do `key=`, serializers and hooks. The persistence layer runs on
one background event loop of the process. What happens while a body runs, such as a lost lease, is told to the hooks at
once, and therefore by the background thread. An async `response_hook` is awaited there, too.

An interrupt of a call, such as Ctrl-C, releases its claim, and is raised once that is done. A child that was forked
in a body does not own its parent's claim: there, the call ends with `IdempotencyLeaseLostError`.
"""

from __future__ import annotations

import functools
import inspect
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, ParamSpec, TypeVar, cast, overload

from aidem._api import block, keys
from aidem._api.decorators import payload_finder
from aidem._api.execution import leave
from aidem._api.signature import Target, check_takes_event
from aidem._checks import check_options
from aidem._engine.call import Phase, WhoseOutcome
from aidem._engine.plan import Plan
from aidem._runtime import background_loop, lambda_lifecycle
from aidem._runtime.lambda_lifecycle import open_all
from aidem.config import check_call_options, lambda_context_of, register_lambda_context, reset_lambda_context
from aidem.sync._blocking import (
    BlockingCall,
    BlockingCalls,
    Execution,
    begin,
    complete,
    confirm_commit,
    drive,
    ensure_owned,
    execute,
    fail,
    refuse_awaitable,
    refuse_event_loop,
    with_blocking_hook,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from types import TracebackType

    from aidem._engine.call import Call
    from aidem.config import IdempotencyConfig
    from aidem.persistence import PersistenceLayer
    from aidem.serialization import ModelSerializer, OutputSerializer

__all__ = ["BlockExecution", "Execution", "close", "idempotency", "idempotent", "idempotent_function", "warm"]

P = ParamSpec("P")
R = TypeVar("R")
EventT = TypeVar("EventT")
ContextT = TypeVar("ContextT")


# --- Decorators -------------------------------------------------------------------------------------------------------


@overload
def idempotent(
    handler: Callable[Concatenate[EventT, ContextT, P], R],
    /,
    *,
    persistence_store: PersistenceLayer | None = None,
    config: IdempotencyConfig | None = None,
    key_prefix: str | None = None,
) -> Callable[Concatenate[EventT, ContextT, P], R]: ...
@overload
def idempotent(
    *,
    persistence_store: PersistenceLayer | None = None,
    config: IdempotencyConfig | None = None,
    key_prefix: str | None = None,
) -> Callable[[Callable[Concatenate[EventT, ContextT, P], R]], Callable[Concatenate[EventT, ContextT, P], R]]: ...
def idempotent(
    handler: Callable[..., Any] | None = None,
    /,
    *,
    persistence_store: PersistenceLayer | None = None,
    config: IdempotencyConfig | None = None,
    key_prefix: str | None = None,
) -> Any:
    """Make `def handler(event, context)` idempotent: the payload is the whole event.

    If the context has `get_remaining_time_in_millis`, it is registered for the call, so that its claim lasts as long as
    the invocation. Of a durable context (`.state` and `.lambda_context`), the inner one is registered.

    A call of the handler raises the exceptions of the handler, and:

    - `IdempotencyKeyError`: the payload holds no key and `raise_on_no_idempotency_key` is set, or it cannot be a key.
    - `IdempotencyValidationError`: the key was used before with another payload.
    - `IdempotencyAlreadyInProgressError`: another execution of the key did not end within `wait_timeout_seconds`.
    - `IdempotencyInDoubtError`: the owner of a claim vanished, and `on_abandoned="raise"`.
    - `IdempotencyResultUnavailableError`: the handler ran once, and its result cannot be replayed.
    - `IdempotencyLeaseLostError`: another caller took the claim over, and recorded no outcome for this call.
    - `IdempotencyPersistenceLayerError`: the store failed; the message says whether the handler has run.
    - `IdempotencyUsageError`: an event loop runs in the calling thread, which the call would block.

    Args:
        handler: The handler, if the decorator is used without options.
        persistence_store: The layer that keeps the records. Default: the layer of `configure`.
        config: The settings. Default: the config of `configure`.
        key_prefix: Replaces the name of the function in its keys. Default: the name of the Lambda function (or
            `test-func`), the module and the qualified name.

    Raises:
        TypeError: The handler is not a plain function of event and context.
        IdempotencyConfigError: An option has a value that cannot work.
    """
    check_call_options(config=config, persistence_store=persistence_store, key_prefix=key_prefix)
    if handler is None:
        return partial(idempotent, persistence_store=persistence_store, config=config, key_prefix=key_prefix)
    target = Target(handler, decorator="idempotent", key_prefix=key_prefix, is_async=False)
    check_takes_event(target)
    calls = BlockingCalls(
        function=target.name,
        prefix=target.prefix,
        layer=persistence_store,
        config=config,
        returns=target.function,
    )

    @functools.wraps(handler)
    def wrapper(event: Any, context: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_event_loop("make the handler async and decorate it with aidem.idempotent")
        lambda_context, is_durable_replay = lambda_context_of(context)
        token = None if lambda_context is None else register_lambda_context(lambda_context)
        try:
            call = calls.make(Plan.key, event)
            call.is_durable_replay = is_durable_replay
            return execute(call, handler, (event, context, *args), kwargs)
        finally:
            if token is not None:
                reset_lambda_context(token)

    keys.remember(wrapper, calls, lambda plan, args, kwargs: plan.key(keys.event_of(*args, **kwargs)))
    return wrapper


@overload
def idempotent_function(
    function: Callable[P, R],
    /,
    *,
    data_keyword_argument: str | None = None,
    key: Callable[..., Any] | None = None,
    persistence_store: PersistenceLayer | None = None,
    config: IdempotencyConfig | None = None,
    output_serializer: type[ModelSerializer] | OutputSerializer | None = None,
    key_prefix: str | None = None,
) -> Callable[P, R]: ...
@overload
def idempotent_function(
    *,
    data_keyword_argument: str | None = None,
    key: Callable[..., Any] | None = None,
    persistence_store: PersistenceLayer | None = None,
    config: IdempotencyConfig | None = None,
    output_serializer: type[ModelSerializer] | OutputSerializer | None = None,
    key_prefix: str | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def idempotent_function(
    function: Any = None,
    /,
    *,
    data_keyword_argument: str | None = None,
    key: Callable[..., Any] | None = None,
    persistence_store: PersistenceLayer | None = None,
    config: IdempotencyConfig | None = None,
    output_serializer: type[ModelSerializer] | OutputSerializer | None = None,
    key_prefix: str | None = None,
) -> Any:
    """Make any callable that is not async idempotent: functions, methods, partials, callable objects.

    A call raises the exceptions of the function, and:

    - `IdempotencyKeyError`: the payload holds no key and `raise_on_no_idempotency_key` is set, or it cannot be a key.
    - `IdempotencyValidationError`: the key was used before with another payload.
    - `IdempotencyAlreadyInProgressError`: another execution of the key did not end within `wait_timeout_seconds`.
    - `IdempotencyInDoubtError`: the owner of a claim vanished, and `on_abandoned="raise"`.
    - `IdempotencyResultUnavailableError`: the function ran once, and its result cannot be replayed.
    - `IdempotencyLeaseLostError`: another caller took the claim over, and recorded no outcome for this call.
    - `IdempotencyPersistenceLayerError`: the store failed; the message says whether the function has run.
    - `IdempotencyModelTypeError`, `IdempotencyNoSerializationModelError`: the return annotation does not suit the class
      that is passed as `output_serializer`.
    - `IdempotencyUsageError`: an event loop runs in the calling thread, which the call would block.

    Args:
        function: The callable, if the decorator is used without options.
        data_keyword_argument: Name of the parameter that is the payload, passed by position or by name; or a name among
            `**kwargs`. Default: all arguments by name, without `self` and `cls`, are the payload.
        key: A function, not async, that gets the bound arguments by name and returns the payload; the alternative to
            `data_keyword_argument`. Default: None.
        persistence_store: The layer that keeps the records. Default: the layer of `configure`.
        config: The settings. Default: the config of `configure`.
        output_serializer: Turns the result into JSON values and back. Default: chosen by the return annotation, for
            dataclasses, pydantic models and types of the standard library, also in lists, dicts, tuples and unions.
        key_prefix: Replaces the name of the function in its keys. Default: the name of the Lambda function (or
            `test-func`), the module and the qualified name. Partials and callable objects need one.

    Raises:
        TypeError: It is not callable, or it is async.
        IdempotencyConfigError: An option has a value that cannot work, or does not suit the signature.
        IdempotencyUsageError: It is annotated to return a response of Starlette or FastAPI.
    """
    options: dict[str, Any] = {
        "data_keyword_argument": data_keyword_argument,
        "key": key,
        "persistence_store": persistence_store,
        "config": config,
        "output_serializer": output_serializer,
        "key_prefix": key_prefix,
    }
    check_call_options(**options)
    if function is None:
        return partial(idempotent_function, **options)
    if isinstance(function, classmethod | staticmethod):  # below @classmethod it is a function already
        method = cast("Any", function)
        return type(method)(idempotent_function(method.__func__, **options))
    target = Target(function, decorator="idempotent_function", key_prefix=key_prefix, is_async=False)
    find_payload = payload_finder(target, data_keyword_argument=data_keyword_argument, key=key)
    calls = BlockingCalls(
        function=target.name,
        prefix=target.prefix,
        layer=persistence_store,
        config=config,
        output_serializer=output_serializer,
        returns=target.function,
    )

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        refuse_event_loop("make the function async and decorate it with aidem.idempotent_function")
        return execute(calls.make(Plan.key_of_call, find_payload, args, kwargs), function, args, kwargs)

    keys.remember(wrapper, calls, lambda plan, args, kwargs: plan.key_of_call(find_payload, args, kwargs))
    return wrapper


# --- Blocks -----------------------------------------------------------------------------------------------------------


def idempotency(
    key: Any,
    *,
    payload: Any = ...,
    persistence_store: PersistenceLayer | None = None,
    config: IdempotencyConfig | None = None,
    output_serializer: OutputSerializer | None = None,
    key_prefix: str = "aidem",
) -> AbstractContextManager[BlockExecution]:
    """Run a `with` block once per key; a later block with the same key gets the result of the first.

    Args:
        key: Identifies the block: any value that a payload can be. `event_key_jmespath` is not applied to it.
        payload: A value that must not change under the key; `payload_validation_jmespath` selects a part of it.
            Default: nothing is validated.
        persistence_store: The layer that keeps the records. Default: the layer of `configure`.
        config: The settings. Default: the config of `configure`.
        output_serializer: Turns the result into JSON values and back. Default: chosen by the return annotation of the
            function that `run` calls; without `run`, the result is JSON data.
        key_prefix: Keeps the keys of different blocks apart. Default: `"aidem"`.

    Raises:
        IdempotencyConfigError: At once: an option has a value that cannot work.
        IdempotencyKeyError: On entering: `key` cannot be a key, or is none and `raise_on_no_idempotency_key` is set.
        IdempotencyValidationError: On entering: the key was used before with another payload.
        IdempotencyAlreadyInProgressError: On entering: another execution of the key did not end within
            `wait_timeout_seconds`.
        IdempotencyInDoubtError: On entering: the owner of a claim vanished, and `on_abandoned="raise"`.
        IdempotencyResultUnavailableError: The block ran once, and its result cannot be replayed.
        IdempotencyLeaseLostError: On leaving: another caller took the claim over, and recorded no outcome for it.
        IdempotencyPersistenceLayerError: The store failed; the message says whether the block has run.
        IdempotencyUsageError: On leaving: the block neither called `run` nor read `replayed` or `result`, so a retry
            would repeat its effect. On entering: an event loop runs in the calling thread.
    """
    check_call_options(
        config=config,
        persistence_store=persistence_store,
        output_serializer=output_serializer,
        key_prefix=key_prefix,
    )
    return _Block(
        key,
        payload,
        layer=persistence_store,
        config=config,
        serializer=output_serializer,
        key_prefix=key_prefix,
    )


class BlockExecution(block.BlockExecution):
    """The execution of a `with` block."""

    __slots__ = ()

    def ensure_owned(self) -> None:  # type: ignore[override] # blocking code cannot await it
        """Renew the claim at the store, as the async one does, and wait for it."""
        ensure_owned(self._call)

    def complete(self, result: R, *, transaction: object) -> R:  # type: ignore[override]
        """Write the result in an open transaction of yours, as the async one does, and return it as a replay will."""
        return drive(partial(super().complete, result, transaction=transaction))

    def completion_item(self, result: object) -> dict[str, Any] | None:  # type: ignore[override]
        """Return the `Update` that stores the result, for your own `transact_write_items`, as the async one does."""
        return drive(partial(super().completion_item, result))

    def run(self, func: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:  # type: ignore[override]
        """Call the function, or replay its result; leaving the block records it.

        Raises:
            TypeError: The function is async.
            IdempotencyUsageError: It was called before: a block has one result.
        """
        if inspect.iscoroutinefunction(func):
            raise TypeError("execution.run() of aidem.sync calls no async function; use `async with aidem.idempotency`")
        self._block.start_run(func)
        if self.replayed:
            return cast("R", self._block.take(self._block.replayed()))
        result = func(*args, **kwargs)
        if inspect.isawaitable(result):
            refuse_awaitable(result, self._call)
        return cast("R", self._block.end_run(result))


class _Block(block.Block):
    """The context manager behind `idempotency`."""

    __slots__ = ()
    call_type: ClassVar[type[Call]] = BlockingCall
    execution_type: ClassVar[type[block.BlockExecution]] = BlockExecution

    def __enter__(self) -> BlockExecution:
        refuse_event_loop("use `async with aidem.idempotency(...)`")
        self.prepare()
        try:
            begin(self._call)
            return cast("BlockExecution", self.started())
        except BaseException as error:
            fail(self._call, error)
            raise

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            leave(self._token)
            self._end(exc)
        except BaseException as error:
            fail(self._call, error)  # does nothing unless the claim is still held
            raise

    def _end(self, exc: BaseException | None) -> None:
        """Record the result of the block, or release its claim."""
        call, result = self._call, self._result
        if exc is not None and not result.was_interrupted_by(exc):
            if fail(call, exc) is WhoseOutcome.WINNERS:
                raise block.lost_to(call.held_record()) from exc
            return
        if call.phase is Phase.COMPLETING:
            confirm_commit(call)
            result.note_commit()
        recording = result.final()
        if recording is not None:
            if complete(call, recording) is WhoseOutcome.WINNERS:
                result.take(result.winners(recording))
            else:
                result.confirm(recording)
            recording.raise_interruption()
        result.check_looked()

    def __del__(self) -> None:
        # Ctrl-C may strike where Python enters `__exit__`, before any `try`. Nothing can be waited for here.
        call = getattr(self, "_call", None)  # a key that cannot be one leaves none
        if call is not None and call.holds_claim:
            background_loop.run_unattended(partial(call.fail, KeyboardInterrupt()))

    @staticmethod
    def settled(config: IdempotencyConfig) -> IdempotencyConfig:
        """Return the settings with a response hook that can be called in the thread."""
        return with_blocking_hook(config)


# --- The background loop ----------------------------------------------------------------------------------------------


def warm(*persistence_stores: PersistenceLayer) -> None:
    """Open layers now, so that the first call need not: for the init of a Lambda function, and again after a restore.

    One that cannot be opened within 5 seconds is logged, and opened at its first use.

    Raises:
        IdempotencyConfigError: One of them is no persistence layer.
        IdempotencyUsageError: An event loop runs on this thread, and would stand still.
    """
    check_options(warm=persistence_stores)
    refuse_event_loop("use `await asyncio.to_thread(sync.warm, layer)`")
    open_them = partial(background_loop.run, partial(open_all, persistence_stores))
    open_them()
    lambda_lifecycle.after_restore(open_them)


def close() -> None:
    """Close the background loop and the clients that layers have opened on it; the next call starts another.

    Calls that wait for their layer are waited for, a few seconds at most; claims held meanwhile are renewed no more.

    Raises:
        IdempotencyUsageError: An event loop runs on this thread, and would stand still.
    """
    refuse_event_loop("use `await asyncio.to_thread(sync.close)`")
    background_loop.close()
