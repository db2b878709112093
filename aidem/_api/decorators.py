"""The async decorators: `idempotent` for Lambda handlers, `idempotent_function` for any async callable."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, cast, overload

from aidem._api import keys
from aidem._api.execution import execute
from aidem._api.signature import BOUND_BY_CALL, Target, check_takes_event
from aidem._engine.plan import Arguments, CallFactory, Plan
from aidem.config import check_call_options, lambda_context_of, register_lambda_context, reset_lambda_context
from aidem.exceptions import IdempotencyConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from aidem._engine.plan import FindPayload
    from aidem.config import IdempotencyConfig
    from aidem.persistence import PersistenceLayer
    from aidem.serialization import ModelSerializer, OutputSerializer

P = ParamSpec("P")
R = TypeVar("R")
EventT = TypeVar("EventT")
ContextT = TypeVar("ContextT")


@overload
def idempotent(
    handler: Callable[Concatenate[EventT, ContextT, P], Coroutine[Any, Any, R]],
    /,
    *,
    persistence_store: PersistenceLayer | None = None,
    config: IdempotencyConfig | None = None,
    key_prefix: str | None = None,
) -> Callable[Concatenate[EventT, ContextT, P], Coroutine[Any, Any, R]]: ...
@overload
def idempotent(
    *,
    persistence_store: PersistenceLayer | None = None,
    config: IdempotencyConfig | None = None,
    key_prefix: str | None = None,
) -> Callable[
    [Callable[Concatenate[EventT, ContextT, P], Coroutine[Any, Any, R]]],
    Callable[Concatenate[EventT, ContextT, P], Coroutine[Any, Any, R]],
]: ...
def idempotent(
    handler: Callable[..., Coroutine[Any, Any, Any]] | None = None,
    /,
    *,
    persistence_store: PersistenceLayer | None = None,
    config: IdempotencyConfig | None = None,
    key_prefix: str | None = None,
) -> Any:
    """Make `async def handler(event, context)` idempotent: the payload is the whole event.

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

    Args:
        handler: The handler, if the decorator is used without options.
        persistence_store: The layer that keeps the records. Default: the layer of `configure`.
        config: The settings. Default: the config of `configure`.
        key_prefix: Replaces the name of the function in its keys. Default: the name of the Lambda function (or
            `test-func`), the module and the qualified name.

    Raises:
        TypeError: The handler is not an `async def` function of event and context.
        IdempotencyConfigError: An option has a value that cannot work.
    """
    check_call_options(config=config, persistence_store=persistence_store, key_prefix=key_prefix)
    if handler is None:
        return functools.partial(idempotent, persistence_store=persistence_store, config=config, key_prefix=key_prefix)
    target = Target(handler, decorator="idempotent", key_prefix=key_prefix)
    check_takes_event(target)
    calls = CallFactory(
        function=target.name,
        prefix=target.prefix,
        layer=persistence_store,
        config=config,
        returns=target.function,
    )

    @functools.wraps(handler)
    async def wrapper(event: Any, context: Any, *args: Any, **kwargs: Any) -> Any:
        lambda_context, is_durable_replay = lambda_context_of(context)
        token = None if lambda_context is None else register_lambda_context(lambda_context)
        try:
            call = calls.make(Plan.key, event)
            call.is_durable_replay = is_durable_replay
            return await execute(call, handler, (event, context, *args), kwargs)
        finally:
            if token is not None:
                reset_lambda_context(token)

    keys.remember(wrapper, calls, lambda plan, args, kwargs: plan.key(keys.event_of(*args, **kwargs)))
    return wrapper


@overload
def idempotent_function(
    function: Callable[P, Coroutine[Any, Any, R]],
    /,
    *,
    data_keyword_argument: str | None = None,
    key: Callable[..., Any] | None = None,
    persistence_store: PersistenceLayer | None = None,
    config: IdempotencyConfig | None = None,
    output_serializer: type[ModelSerializer] | OutputSerializer | None = None,
    key_prefix: str | None = None,
) -> Callable[P, Coroutine[Any, Any, R]]: ...
@overload
def idempotent_function(
    *,
    data_keyword_argument: str | None = None,
    key: Callable[..., Any] | None = None,
    persistence_store: PersistenceLayer | None = None,
    config: IdempotencyConfig | None = None,
    output_serializer: type[ModelSerializer] | OutputSerializer | None = None,
    key_prefix: str | None = None,
) -> Callable[[Callable[P, Coroutine[Any, Any, R]]], Callable[P, Coroutine[Any, Any, R]]]: ...
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
    """Make any async callable idempotent: functions, methods, partials, callable objects.

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
        TypeError: It is not an async callable.
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
        return functools.partial(idempotent_function, **options)
    if isinstance(function, classmethod | staticmethod):  # below @classmethod it is a function already
        method = cast("Any", function)
        return type(method)(idempotent_function(method.__func__, **options))
    target = Target(function, decorator="idempotent_function", key_prefix=key_prefix)
    find_payload = payload_finder(target, data_keyword_argument=data_keyword_argument, key=key)
    calls = CallFactory(
        function=target.name,
        prefix=target.prefix,
        layer=persistence_store,
        config=config,
        output_serializer=output_serializer,
        returns=target.function,
    )

    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        return await execute(calls.make(Plan.key_of_call, find_payload, args, kwargs), function, args, kwargs)

    keys.remember(wrapper, calls, lambda plan, args, kwargs: plan.key_of_call(find_payload, args, kwargs))
    return wrapper


# --- The payload among the arguments ----------------------------------------------------------------------------------


def payload_finder(target: Target, *, data_keyword_argument: str | None, key: Callable[..., Any] | None) -> FindPayload:
    """Return how the payload of a call is found among its arguments.

    Raises:
        IdempotencyConfigError: The options do not suit the signature, or each other.
    """
    signature = target.signature()
    if data_keyword_argument is not None and key is not None:
        message = "data_keyword_argument and key both say what the payload is; give only one of them"
        raise IdempotencyConfigError(message)
    if data_keyword_argument is not None:
        return _named(signature, data_keyword_argument, target)
    if key is not None:
        return _computed(signature, key, target)
    bound_by_call = next(iter(signature.parameters), None)

    def find_payload(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = _bound(target, signature, args, kwargs)
        if bound_by_call in BOUND_BY_CALL:
            del arguments[bound_by_call]
        return Arguments(arguments)

    return find_payload


def _named(signature: inspect.Signature, name: str, target: Target) -> FindPayload:
    parameter = signature.parameters.get(name)
    if parameter is None and any(each.kind is each.VAR_KEYWORD for each in signature.parameters.values()):
        return lambda _args, kwargs: kwargs.get(name)
    if parameter is None:
        known = ", ".join(map(repr, signature.parameters)) or "none"
        message = f"data_keyword_argument={name!r} is not a parameter of {target.name}; its parameters are: {known}"
        raise IdempotencyConfigError(message)
    position = list(signature.parameters).index(name)
    is_positional = parameter.kind in {parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD}
    is_named = parameter.kind is not parameter.POSITIONAL_ONLY

    def find_payload(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_positional and len(args) > position:
            return args[position]
        if is_named and name in kwargs:
            return kwargs[name]
        if parameter.default is not parameter.empty:
            return parameter.default
        return _bound(target, signature, args, kwargs)[name]  # *args or **kwargs, or a TypeError

    return find_payload


def _computed(signature: inspect.Signature, key: Callable[..., Any], target: Target) -> FindPayload:
    names = list(signature.parameters)
    try:
        inspect.signature(key).bind(**dict.fromkeys(names))
    except ValueError:
        pass  # a built-in such as `dict`, which does not tell what it takes
    except TypeError as exc:
        message = f"key= must take the arguments of {target.name} by name ({', '.join(names) or 'none'}): {exc}"
        raise IdempotencyConfigError(message) from exc

    def find_payload(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return key(**_bound(target, signature, args, kwargs))

    return find_payload


def _bound(
    target: Target, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as exc:
        raise TypeError(f"{target.name}(): {exc}") from None
    bound.apply_defaults()
    return bound.arguments
