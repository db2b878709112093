"""Keys asked for without a call: nothing is run, claimed or opened."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, TypeAlias

from aidem._engine.plan import CallFactory, Plan
from aidem.config import check_call_options
from aidem.exceptions import IdempotencyUsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from aidem._engine.plan import CallKey
    from aidem.config import IdempotencyConfig

    FindKey: TypeAlias = "Callable[[Plan, tuple[Any, ...], dict[str, Any]], CallKey]"

_ATTRIBUTE = "__aidem_key__"


def remember(wrapper: Any, calls: CallFactory, find_key: FindKey) -> None:
    """Let `idempotency_key` find how a decorated function makes its keys; `functools.wraps` passes it on."""
    setattr(wrapper, _ATTRIBUTE, functools.partial(calls.key_now, find_key))


def idempotency_key(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> str:
    """Return the idempotency key that this call of a decorated function would have.

    Nothing is called but `key=` of the decorator, and nothing is stored or opened. Switches that turn idempotency off
    do not count. A prefix that is made of the name of the Lambda function is made anew until the first call fixes it.

    Args:
        function: A function, method or handler decorated with `idempotent` or `idempotent_function`, of `aidem` or
            `aidem.sync`; or a Lambda handler made from one.
        args: The positional arguments of the call; of a handler the event, the context may be left out.
        kwargs: The keyword arguments of the call.

    Raises:
        IdempotencyKeyError: There is no key in these arguments, or they cannot be one.
        IdempotencyUsageError: The function is not decorated.
        TypeError: The arguments are not those of the function.
    """
    find = getattr(function, _ATTRIBUTE, None)
    if find is None:
        name = getattr(function, "__qualname__", None) or type(function).__qualname__
        raise IdempotencyUsageError(
            f"{name} is not decorated with idempotent or idempotent_function, so its calls have no idempotency key; "
            "for a block use aidem.block_key, for an HTTP request aidem.asgi.request_key"
        )
    if inspect.ismethod(function):
        args = (function.__self__, *args)
    key: str = find(args, kwargs)
    return key


def event_of(event: Any, context: Any = None, *_args: Any, **_kwargs: Any) -> Any:  # noqa: ARG001 - a handler's arguments
    """Return the event among the arguments of a handler."""
    return event


def block_key(key: Any, *, key_prefix: str = "aidem", config: IdempotencyConfig | None = None) -> str:
    """Return the idempotency key of a block: of `idempotency(key, key_prefix=..., config=...)`.

    Args:
        key: Names the block, as there.
        key_prefix: Keeps keys of different blocks apart.
        config: Settings; by default what `configure` says.

    Raises:
        IdempotencyKeyError: The key is missing, or cannot be one.
        IdempotencyConfigError: An option has a value that cannot work.
    """
    check_call_options(config=config, key_prefix=key_prefix)
    calls = CallFactory(
        function=f"a block with key_prefix={key_prefix!r}", prefix=lambda: key_prefix, layer=None, config=config
    )
    return calls.key_now(lambda plan, _args, _kwargs: plan.key_of_block(key, ...), (), {})
