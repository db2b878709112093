"""Idempotency for ordinary code: the decorators and the context manager of `aidem`, blocking.

The function runs in the thread that called it, and so do `key=`, serializers and hooks. The persistence layer runs on
one background event loop of the process. What happens while a body runs, such as a lost lease, is told to the hooks at
once, and therefore by the background thread. An async `response_hook` is awaited there, too.

Whatever interrupts a call, such as Ctrl-C, gives its key back: the `try` that does so is entered before the claim is
asked for. Calls hold no claim over `fork`: in a child they end with `IdempotencyLeaseLostError`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import inspect
import threading
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, ParamSpec, TypeVar, cast, overload

from aidem import _background, _context, _execution, _state
from aidem._decorators import Binding, key_of_event
from aidem._engine import Call, Phase
from aidem._execution import Recording, replayed_value, running
from aidem._signature import Target, check_takes_event, payload_finder
from aidem.config import (
    check_call_options,
    lambda_context_of,
    register_lambda_context,
    reset_lambda_context,
)
from aidem.exceptions import IdempotencyUsageError
from aidem.hooks import SILENT

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from contextlib import AbstractContextManager
    from types import TracebackType

    from aidem._plan import Key, Plan
    from aidem._record import DataRecord, OutcomeKind
    from aidem.config import IdempotencyConfig, ResponseHook
    from aidem.hooks import IdempotencyEvent
    from aidem.persistence import PersistenceLayer
    from aidem.serialization import ModelSerializer, OutputSerializer

__all__ = ["BlockExecution", "Execution", "close", "idempotency", "idempotent", "idempotent_function"]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
EventT = TypeVar("EventT")
ContextT = TypeVar("ContextT")


# --- Decorators -------------------------------------------------------------------------------------------------------


@overload
def idempotent(
    handler: Callable[Concatenate[EventT, ContextT, P], R], /
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
    """Make `def handler(event, context)` idempotent; options and errors are those of `aidem.idempotent`."""
    check_call_options(config=config, persistence_store=persistence_store, key_prefix=key_prefix)
    if handler is None:
        return partial(idempotent, persistence_store=persistence_store, config=config, key_prefix=key_prefix)
    target = Target(handler, decorator="idempotent", key_prefix=key_prefix, is_async=False)
    check_takes_event(target)
    binding = _Binding(target, key_of_event, persistence_store=persistence_store, config=config, key_prefix=key_prefix)

    @functools.wraps(handler)
    def wrapper(event: Any, context: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_event_loop("make the handler async and decorate it with aidem.idempotent")
        lambda_context, is_durable_replay = lambda_context_of(context)
        token = None if lambda_context is None else register_lambda_context(lambda_context)
        try:
            call = binding.call((event,), {})
            call.supersedes = is_durable_replay
            return _execute(call, handler, (event, context, *args), kwargs)
        finally:
            if token is not None:
                reset_lambda_context(token)

    return wrapper


@overload
def idempotent_function(function: Callable[P, R], /) -> Callable[P, R]: ...
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
    """Make any callable idempotent that is not async; options and errors are those of `aidem.idempotent_function`."""
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
        method: Any = function
        return type(method)(idempotent_function(method.__func__, **options))
    target = Target(function, decorator="idempotent_function", key_prefix=key_prefix, is_async=False)
    binding = _Binding(
        target,
        payload_finder(target, data_keyword_argument=data_keyword_argument, key=key),
        persistence_store=persistence_store,
        config=config,
        key_prefix=key_prefix,
        output_serializer=output_serializer,
    )

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        _refuse_event_loop("make the function async and decorate it with aidem.idempotent_function")
        return _execute(binding.call(args, kwargs), function, args, kwargs)

    return wrapper


# --- Calls ------------------------------------------------------------------------------------------------------------


class BlockingCall(Call):
    """A call whose steps run on the background loop, while the thread that takes them waits.

    Its coroutines never suspend in such a thread, so that one flow serves async and blocking code.
    """

    __slots__ = ()

    def __init__(self, plan: Plan, key: Key, *, bypassed: bool = False) -> None:
        super().__init__(plan, key, bypassed=bypassed)
        self.is_body_alive = threading.current_thread().is_alive

    async def begin(self) -> None:
        """Claim the key or find its outcome; one in the local cache is found without the background loop."""
        cached = None
        if self.phase is Phase.NEW and self.plan.config.use_local_cache:
            cached = self.plan.shared.cache.get(self.key.text, now=self.plan.clock())
        if cached is None or _state.differs(cached, self.key.payload_hash):
            await self._step(super().begin)
        else:
            self._replay(cached)

    async def ensure_owned(self) -> None:
        """Renew the claim at the store."""
        await self._step(super().ensure_owned)

    async def complete(self, text: str, outcome: OutcomeKind | None = None) -> bool:
        """Record the outcome."""
        return await self._step(partial(super().complete, text, outcome))

    async def fail(self, error: BaseException) -> bool:
        """Give the key back, or store the exception if it is an outcome."""
        return await self._step(partial(super().fail, error))

    async def _step(self, step: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Take a step on the background loop, unless it asks nothing there, or is part of one that runs there."""
        if self.phase not in {Phase.NEW, Phase.CLAIMED} or _is_on_event_loop():
            return await step()
        if self.reporter is SILENT:
            return _background.run(step)
        events: list[IdempotencyEvent] = []
        self.reporter.redirect = events.append
        try:
            return _background.run(step)
        finally:
            self.reporter.redirect = None
            for event in events:
                self.reporter.tell(event)


class _Binding(Binding):
    """One decorated function with its options."""

    __slots__ = ()
    call_type: ClassVar[type[Call]] = BlockingCall

    def _plan_for(self, config: IdempotencyConfig) -> Plan:
        return super()._plan_for(_blocking(config))


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
    """Run a `with` block once per key; options and errors are those of `aidem.idempotency`."""
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


class Execution(_execution.Execution):
    """What `aidem.current_execution()` answers in the body of a blocking call."""

    __slots__ = ()

    def ensure_owned(self) -> None:  # type: ignore[override] # whoever runs in blocking code cannot await it
        """Renew the claim at the store, as the async one does, and wait for it."""
        _drive(super().ensure_owned())


class BlockExecution(_context.BlockExecution):
    """The execution of a `with` block."""

    __slots__ = ()

    def ensure_owned(self) -> None:  # type: ignore[override] # whoever runs in blocking code cannot await it
        """Renew the claim at the store, as the async one does, and wait for it."""
        _drive(super().ensure_owned())

    def run(self, func: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:  # type: ignore[override]
        """Call the function, or hand out what it returned before, as the async one does.

        Raises:
            TypeError: The function is async.
            IdempotencyUsageError: It was called before: a block has one result.
        """
        if inspect.iscoroutinefunction(func):
            raise TypeError("execution.run() of aidem.sync calls no async function; use `async with aidem.idempotency`")
        return cast("R", _drive(super().run(cast("Any", func), *args, **kwargs)))


class _Block(_context.Block):
    """The context manager behind `idempotency`."""

    __slots__ = ()
    call_type: ClassVar[type[Call]] = BlockingCall
    execution_type: ClassVar[type[_context.BlockExecution]] = BlockExecution

    def __enter__(self) -> BlockExecution:
        _refuse_event_loop("use `async with aidem.idempotency(...)`")
        self.prepare()
        return cast("BlockExecution", _settled(self._call, lambda: _drive(self.enter())))

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _settled(self._call, lambda: _drive(self.leave(exc)))

    def config(self) -> IdempotencyConfig:
        """Return the settings of the call."""
        return _blocking(super().config())


# --- One call ---------------------------------------------------------------------------------------------------------


def _execute(call: Call, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a function under a call, or hand out what it returned before."""
    return _settled(call, lambda: _run(call, function, args, kwargs))


def _run(call: Call, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    _drive(call.begin())
    if call.phase is Phase.REPLAYED:
        return _drive(replayed_value(call))
    try:
        with running(Execution(call)):
            result = function(*args, **kwargs)
        _refuse_coroutine(result, call)
        if call.phase is Phase.BYPASSED:
            return result
        recording = Recording.of(result, call.plan.serializer, function=call.plan.function)
    except BaseException as error:
        if _drive(call.fail(error)):
            raise
        return _drive(replayed_value(call))  # the error would have been the outcome, but another call's counts
    return _drive(recording.store(call))


def _settled(call: Call, action: Callable[[], T]) -> T:
    """Do something under a call; what interrupts it between two steps gives the key back, too."""
    try:
        return action()
    except BaseException as error:
        _drive(call.fail(error))  # does nothing unless the claim is still held
        raise


def _drive(flow: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that does not suspend."""
    try:
        flow.send(None)
    except StopIteration as end:
        return cast("T", end.value)
    except RuntimeError as error:
        if isinstance(error.__cause__, StopIteration):
            raise error.__cause__ from None  # the function raised it, and no coroutine lets it pass
        raise
    flow.close()
    raise TypeError("the function awaits, so it is an async one; use what aidem has for those instead of aidem.sync")


def _refuse_coroutine(result: object, call: Call) -> None:
    if inspect.iscoroutine(result):
        result.close()
        message = f"{call.plan.function} returned a coroutine; decorate it with what aidem has for async functions"
        raise TypeError(message)


def _refuse_event_loop(instead: str) -> None:
    """Check that no event loop runs on this thread, which would stand still."""
    if _is_on_event_loop():
        raise IdempotencyUsageError(f"aidem.sync would block the event loop that runs on this thread; {instead}")


def _is_on_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _blocking(config: IdempotencyConfig) -> IdempotencyConfig:
    """Return the settings with a response hook that can be called here, if there is one."""
    return config if config.response_hook is None else _with_blocking_hook(config)


@functools.lru_cache
def _with_blocking_hook(config: IdempotencyConfig) -> IdempotencyConfig:
    hook = cast("ResponseHook", config.response_hook)

    def blocking_hook(response: Any, record: DataRecord) -> Any:
        answer = hook(response, record)
        return _background.run(partial(_await, answer)) if inspect.isawaitable(answer) else answer

    return dataclasses.replace(config, response_hook=blocking_hook)


async def _await(answer: Awaitable[T]) -> T:
    return await answer


# --- The background loop ----------------------------------------------------------------------------------------------


def close() -> None:
    """Close the background loop and the clients that layers have opened on it; the next call starts another.

    Calls that wait for their layer are waited for, a few seconds at most; claims held meanwhile are renewed no more.

    Raises:
        IdempotencyUsageError: An event loop runs on this thread, and would stand still.
    """
    _refuse_event_loop("use `await asyncio.to_thread(sync.close)`")
    _background.close()
