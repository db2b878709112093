"""Checks of options and settings: an error names the option and the allowed values."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Collection
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from aidem._rules import key as _key
from aidem.exceptions import IdempotencyConfigError
from aidem.hooks import IdempotencyHook

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    Check = Callable[[Any], bool]

OnAbandoned = Literal["run_again", "raise"]
OnPersistenceError = Literal["raise", "run"]

MAX_SECONDS: Final = 100 * 365.25 * 86_400
A_LAMBDA_CONTEXT: Final = "an object with get_remaining_time_in_millis()"
AT_MOST: Final = f", at most {MAX_SECONDS:.0f} (100 years)"


def refused(option: str, shown: str, allowed: str) -> IdempotencyConfigError:
    """Return the error about an option."""
    return IdempotencyConfigError(f"{option}={shown} is not allowed: it must be {allowed}")


# --- Options of decorators, blocks and `configure` ------------------------------------------------------------------


def check_options(**options: object) -> None:
    """Check options by name; None stands for a default and is allowed everywhere.

    Raises:
        IdempotencyConfigError: One has a value that cannot work.
    """
    for option, value in options.items():
        is_allowed, allowed = _OPTIONS[option]
        if value is not None and not is_allowed(value):
            raise refused(option, kind_of(value), allowed if isinstance(allowed, str) else allowed(value))


def kind_of(value: object) -> str:
    """Return the type of a value, for messages: the value itself may hold a secret, such as a URL with a password."""
    return f"<class {value.__qualname__}>" if isinstance(value, type) else f"<{type(value).__qualname__}>"


_OPERATIONS: Final = (
    *("acquire", "complete", "renew", "release", "get", "forget"),
    *("open", "aclose", "__aenter__", "__aexit__"),
)


def _is_layer(value: object) -> bool:
    if isinstance(value, type) or not (_has_operations(type(value)) or not _missing_operations(value)):
        return False
    try:
        hash(weakref.ref(value))
    except TypeError:
        return False
    return True


def _missing_operations(value: object) -> list[str]:
    return [name for name in _OPERATIONS if not callable(getattr(value, name, None))]


def _is_layer_class(cls: type) -> bool:
    return not _missing_operations(cls)


# Every block is checked.
_has_operations: Final[Check] = lru_cache(maxsize=64)(_is_layer_class)


def _what_a_layer_needs(value: object) -> str:
    layer = "a persistence layer, such as SQLitePersistenceLayer(path)"
    if isinstance(value, type):
        return f"{layer}: make an instance of the class"
    if isinstance(value, str):
        return f"{layer}: for a URL, pass open_persistence_layer(url) of aidem.persistence"
    if missing := _missing_operations(value):
        return f"{layer}: this one lacks {', '.join(missing)}, see aidem.persistence.PersistenceLayer"
    return f"{layer}: this one cannot be hashed and weakly referenced, see its __eq__, __hash__ and __slots__"


def _are_layers(value: object) -> bool:
    return _is_collection(value) and all(map(_is_layer, _items(value)))


def _what_layers_need(value: object) -> str:
    if not _is_collection(value):
        return "a list of persistence layers"
    item = next(item for item in _items(value) if not _is_layer(item))
    return f"a list of persistence layers; {kind_of(item)} in it must be {_what_a_layer_needs(item)}"


def _is_collection(value: object) -> bool:
    return isinstance(value, Collection) and not isinstance(value, str)


def _is_serializer(value: object) -> bool:
    if isinstance(value, type):
        return hasattr(value, "instantiate")
    return hasattr(value, "to_dict") and hasattr(value, "from_dict")


def _is_plain_callable(value: object) -> bool:
    return callable(value) and not inspect.iscoroutinefunction(value)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_lambda_context(value: object) -> bool:
    return callable(getattr(value, "get_remaining_time_in_millis", None))


def _is_duration(value: object) -> bool:
    """Whether a value is a number of seconds that fits every clock, store and time-out; NaN is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MAX_SECONDS


def _is_positive(value: object) -> bool:
    return _is_duration(value) and value != 0


_OPTIONS: Final[dict[str, tuple[Check, str | Callable[[Any], str]]]] = {
    "persistence_store": (_is_layer, _what_a_layer_needs),
    "warm": (_are_layers, _what_layers_need),
    "output_serializer": (
        _is_serializer,
        "an object with to_dict() and from_dict(), or a class with instantiate(), such as PydanticSerializer",
    ),
    "key_prefix": (_is_text, "a string"),
    "data_keyword_argument": (_is_text, "the name of a parameter, as a string"),
    "key": (
        _is_plain_callable,
        "a callable that is not async, takes the arguments of the function and returns the payload",
    ),
    "lambda_context": (_is_lambda_context, A_LAMBDA_CONTEXT),
    "limit": (lambda value: isinstance(value, int) and value >= 0, "a whole number that is not negative"),
    "kept_seconds": (_is_positive, f"a positive number{AT_MOST}"),
    "max_clock_skew_seconds": (_is_duration, f"a number that is not negative{AT_MOST}"),
}


# --- Settings in an `IdempotencyConfig` -----------------------------------------------------------------------------


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check every setting of a config, and those that exclude each other.

    Args:
        settings: The fields of an `IdempotencyConfig` by name.

    Raises:
        IdempotencyConfigError: One has a value that cannot work.
    """
    for setting, (is_allowed, allowed) in _SETTINGS.items():
        if not is_allowed(settings[setting]):
            raise refused(setting, repr(settings[setting]), allowed)
    _check_jmespath(settings)
    hash_function = settings["hash_function"]
    try:
        _key.check_hash_function(hash_function)
    except ValueError as exc:
        raise refused("hash_function", repr(hash_function), str(exc)) from exc
    on_abandoned = settings["on_abandoned"]
    if on_abandoned != "run_again" and settings["on_persistence_error"] == "run":
        allowed = '"raise" together with on_abandoned="raise" or a check, which promise that nothing runs twice'
        raise refused("on_persistence_error", repr("run"), allowed)
    if callable(on_abandoned) and settings["lease_seconds"] is None:
        allowed = "a positive number together with a check in on_abandoned, which is asked when a lease has passed"
        raise refused("lease_seconds", repr(None), allowed)


def _check_jmespath(settings: Mapping[str, Any]) -> None:
    """Check expressions and their options; jmespath is imported only by those who use it."""
    options: dict[str, Any] | None = settings["jmespath_options"]
    if options is not None:
        from jmespath import Options
        from jmespath.functions import Functions

        try:
            chosen = vars(Options(**options))
        except TypeError as exc:
            raise refused("jmespath_options", repr(options), "keyword arguments of jmespath.Options") from exc
        functions, dict_cls = chosen["custom_functions"], chosen["dict_cls"]
        if not (functions is None or isinstance(functions, Functions)):
            raise refused("jmespath_options", repr(options), "with an instance of jmespath.functions.Functions")
        if not (dict_cls is None or (isinstance(dict_cls, type) and issubclass(dict_cls, dict))):
            raise refused("jmespath_options", repr(options), "with a subclass of dict as dict_cls")
    for setting in ("event_key_jmespath", "payload_validation_jmespath"):
        if settings[setting]:
            from aidem._rules.expressions import check_calls, compile_expression

            try:
                check_calls(compile_expression(settings[setting]), options)
            except ValueError as exc:
                raise refused(setting, repr(settings[setting]), f"a valid JMESPath expression ({exc})") from exc


def _one_of(literal: Any) -> tuple[Check, str]:
    values = get_args(literal)
    return (lambda value: value in values), f"one of {', '.join(map(repr, values))}"


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_tuple_of(is_allowed: Check) -> Check:
    return lambda value: isinstance(value, tuple) and all(is_allowed(item) for item in _items(value))


def _items(value: Any) -> Iterable[Any]:
    items: Iterable[Any] = value  # of any types: it comes from the user
    return items


def _is_exception_type(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Exception)


def _is_hook(value: object) -> bool:
    return isinstance(value, IdempotencyHook) and not isinstance(value, type) and _is_plain_callable(value.on_event)


_SETTINGS: Final[dict[str, tuple[Check, str]]] = {
    "event_key_jmespath": (_is_text, "a JMESPath expression as a string"),
    "payload_validation_jmespath": (_is_text, "a JMESPath expression as a string"),
    "raise_on_no_idempotency_key": (_is_bool, "True or False"),
    "use_local_cache": (_is_bool, "True or False"),
    "renew_lease": (_is_bool, "True or False"),
    "max_inflated_bytes": (_is_count, "a positive whole number"),
    "expires_after_seconds": (_is_positive, f"a positive number{AT_MOST}"),
    "lease_seconds": (lambda value: value is None or _is_positive(value), f"a positive number{AT_MOST}, or None"),
    "local_cache_max_items": (_is_count, "a positive whole number"),
    "wait_timeout_seconds": (_is_duration, f"a number that is not negative{AT_MOST}"),
    "max_clock_skew_seconds": (_is_duration, f"a number that is not negative{AT_MOST}"),
    "on_abandoned": (
        lambda value: value in get_args(OnAbandoned) or (callable(value) and not isinstance(value, type)),
        f"one of {', '.join(map(repr, get_args(OnAbandoned)))}, or a callable check(abandoned)",
    ),
    "doubt_kept_seconds": (_is_positive, f"a positive number{AT_MOST}"),
    "on_persistence_error": _one_of(OnPersistenceError),
    "stored_exceptions": (_is_tuple_of(_is_exception_type), "a tuple of subclasses of Exception"),
    "hooks": (_is_tuple_of(_is_hook), "a tuple of objects with a method on_event(event) that is not async"),
    "note": (
        lambda value: value is None or _is_plain_callable(value),
        "a callable that is not async, takes the payload and returns a string",
    ),
    "response_hook": (lambda value: value is None or callable(value), "a callable hook(response, record)"),
    "lambda_context": (lambda value: value is None or _is_lambda_context(value), A_LAMBDA_CONTEXT),
}
