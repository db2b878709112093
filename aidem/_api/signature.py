"""The decorated callable: its kind, its name, and the prefix of its keys."""

from __future__ import annotations

import functools
import inspect
import os
from typing import TYPE_CHECKING, Any

from aidem._rules import key as _key
from aidem.exceptions import IdempotencyConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

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

    __slots__ = ("_key_prefix", "_module", "_qualname", "function", "name")

    def __init__(
        self, function: Callable[..., Any], *, decorator: str, key_prefix: str | None, is_async: bool = True
    ) -> None:
        self.function = function
        self._key_prefix = key_prefix
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

    def prefix(self) -> str:
        """Return the key prefix: the given one, or what Lambda's function name and the callable's own make."""
        return self._key_prefix or _key.default_prefix(
            os.environ.get("AWS_LAMBDA_FUNCTION_NAME"), self._module or "", self._qualname or ""
        )

    def signature(self) -> inspect.Signature:
        """Return the signature of the callable."""
        return inspect.signature(self.function)


def _check_kind(function: object, *, decorator: str, is_async: bool) -> None:
    if not callable(function) or isinstance(function, type):
        message = f"{decorator} decorates functions, methods and callable objects, not {function!r}"
        raise TypeError(message)
    called = _called(function)
    name = getattr(function, "__qualname__", None) or repr(function)
    block = "async with aidem.idempotency(key)" if is_async else "with aidem.sync.idempotency(key)"
    if _is_generator(called):
        raise TypeError(f"{decorator} cannot replay a generator; let {name} return a list")
    made_by = getattr(called, "__globals__", {}).get("__name__")
    if made_by == "contextlib" and _is_generator(inspect.unwrap(called)):
        message = f"{name} makes a context manager, which cannot be replayed; decorate the function that enters it, or"
        raise TypeError(f"{message} write `{block}` there")
    if is_async and not inspect.iscoroutinefunction(called):
        what_to_do = (
            f"a decorator below has made a plain one of it: put {decorator} right above `async def`"
            if inspect.iscoroutinefunction(inspect.unwrap(called))
            else f"if it is blocking, decorate it with aidem.sync.{decorator} instead; if it returns a coroutine, as a "
            "lambda may, write an `async def` that awaits it, and decorate that"
        )
        raise TypeError(f"{name} is not an async function; {what_to_do}")
    if not is_async and inspect.iscoroutinefunction(called):
        raise TypeError(f"{name} is an async function; decorate it with aidem.{decorator} instead")


def _is_generator(function: Any) -> bool:
    return inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function)


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
