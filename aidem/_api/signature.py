"""The decorated callable: its kind, its name, and how the payload is found among its arguments."""

from __future__ import annotations

import functools
import inspect
import os
from typing import TYPE_CHECKING, Any

from aidem._engine.plan import Arguments
from aidem._rules import key as _key
from aidem.exceptions import IdempotencyConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    FindPayload = Callable[[tuple[Any, ...], dict[str, Any]], Any]

BOUND_BY_CALL = ("self", "cls")


class Target:
    """A callable that is to be made idempotent.

    Attributes:
        function: The callable.
        name: Module and qualified name, for messages and events.

    Raises:
        TypeError: It is not an async callable.
        IdempotencyConfigError: It has no stable name, and no `key_prefix`.
    """

    __slots__ = ("_module", "_qualname", "function", "name")

    def __init__(
        self, function: Callable[..., Any], *, decorator: str, key_prefix: str | None, is_async: bool = True
    ) -> None:
        self.function = function
        _check_kind(function, decorator=decorator, is_async=is_async)
        self._module: str | None = getattr(function, "__module__", None)
        self._qualname: str | None = getattr(function, "__qualname__", None)
        if self._qualname is None or "<lambda>" in self._qualname:
            if not key_prefix:
                message = f"{function!r} has no stable name to make keys from; give {decorator} a key_prefix"
                raise IdempotencyConfigError(message)
            self.name = key_prefix
        else:
            self.name = f"{self._module}.{self._qualname}"

    def default_prefix(self) -> str:
        """Return the key prefix that Lambda's function name and the callable's own make."""
        return _key.default_prefix(os.environ.get("AWS_LAMBDA_FUNCTION_NAME"), self._module or "", self._qualname or "")

    def signature(self) -> inspect.Signature:
        """Return the signature of the callable."""
        return inspect.signature(self.function)


def _check_kind(function: object, *, decorator: str, is_async: bool) -> None:
    if not callable(function) or isinstance(function, type):
        message = f"{decorator} decorates functions, methods and callable objects, not {function!r}"
        raise TypeError(message)
    called = _called(function)
    name = _name(function)
    block = "async with aidem.idempotency(key)" if is_async else "with aidem.sync.idempotency(key)"
    if _is_generator(called):
        raise TypeError(f"{decorator} cannot replay a generator; let {name} return a list")
    if _makes_context_manager(called):
        message = f"{name} makes a context manager, which cannot be replayed; decorate the function that enters it, or"
        raise TypeError(f"{message} write `{block}` there")
    if is_async and not inspect.iscoroutinefunction(called):
        raise TypeError(f"{name} is not an async function; {_what_to_do(called, decorator)}")
    if not is_async and inspect.iscoroutinefunction(called):
        raise TypeError(f"{name} is an async function; decorate it with aidem.{decorator} instead")


def _is_generator(function: Any) -> bool:
    return inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function)


def _makes_context_manager(function: Any) -> bool:
    made_by = getattr(function, "__globals__", {}).get("__name__")
    return made_by == "contextlib" and _is_generator(inspect.unwrap(function))


def _what_to_do(plain: Any, decorator: str) -> str:
    if inspect.iscoroutinefunction(inspect.unwrap(plain)):
        return f"a decorator below has made a plain one of it: put {decorator} right above `async def`"
    return (
        f"if it is blocking, decorate it with aidem.sync.{decorator} instead; if it returns a coroutine, as a lambda "
        "may, write an `async def` that awaits it, and decorate that"
    )


def check_takes_event(target: Target) -> None:
    """Check that a handler can be called with event and context.

    Raises:
        TypeError: It cannot, or it is a method, whose first argument is not the event.
    """
    signature = target.signature()
    if next(iter(signature.parameters), None) in BOUND_BY_CALL:
        message = f"{target.name} is a method; decorate it with idempotent_function(data_keyword_argument='event')"
        raise TypeError(message)
    try:
        signature.bind_partial(None, None)
    except TypeError as exc:
        message = f"{target.name} cannot be called as handler(event, context); decorate it with idempotent_function"
        raise TypeError(message) from exc


def _called(function: Any) -> Any:
    """Return the function that runs when a partial or a callable object is called."""
    while isinstance(function, functools.partial):
        function = function.func
    if inspect.isroutine(function):
        return function
    return type(function).__call__


def _name(function: object) -> str:
    return getattr(function, "__qualname__", None) or repr(function)


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
    return _all_arguments(signature, target)


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

    def find_payload(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_positional and len(args) > position:
            return args[position]
        if parameter.kind is not parameter.POSITIONAL_ONLY and name in kwargs:
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


def _all_arguments(signature: inspect.Signature, target: Target) -> FindPayload:
    bound_by_call = next(iter(signature.parameters), None)

    def find_payload(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = _bound(target, signature, args, kwargs)
        if bound_by_call in BOUND_BY_CALL:
            del arguments[bound_by_call]
        return Arguments(arguments)

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
