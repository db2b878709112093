"""The one canonical JSON encoder, for keys and for results.

Sorted keys, separators ", " and ": ", ASCII, NaN and Infinity allowed: byte for byte what AWS Powertools for Python
hashes. What JSON does not know is replaced first:

    Decimal → its str (NaN → NaN) · pydantic model → model_dump(mode="json") · dataclass → dict of fields
    Enum → its value · date, datetime, time → isoformat · UUID, PurePath → str

A value of more than one of these kinds is the first of them. Everything else is refused, and only then is the value
walked again, slowly, to say where in it the fault lies.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import sys
from enum import Enum
from functools import lru_cache
from operator import attrgetter, methodcaller
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from decimal import Decimal

ENCODABLE: Final = (
    "JSON values, dataclasses, pydantic models, Decimal, date, datetime, time, UUID, PurePath and Enum"  # for messages
)


class NotEncodableError(ValueError):
    """A value that the encoder refuses.

    Attributes:
        path: Where in the value the fault lies, such as `$.order.items[3].price`.
        reason: What is wrong there, as a predicate: "is of type bytes".
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path} {reason}")
        self.path = path
        self.reason = reason


def encode(value: Any) -> str:
    """Return the canonical JSON text of a value.

    Raises:
        NotEncodableError: The value, or something in it, is of another type, circular or too deep.
    """
    try:
        return _encode(value)
    except Exception as error:
        raise explain(value, error) from error


def plain(value: Any) -> Any:
    """Return what the encoder writes in the place of a value that JSON does not know.

    Raises:
        TypeError: There is nothing to write for this type.
    """
    replace = _replacement(type(value))
    if replace is None:
        message = f"values of type {type(value).__qualname__} are not encoded"
        raise TypeError(message)
    return replace(value)


_encode = json.JSONEncoder(sort_keys=True, default=plain).encode
decode: Final[Callable[[str], Any]] = json.JSONDecoder().decode


@lru_cache(maxsize=1024)
def _replacement(cls: type) -> Callable[[Any], Any] | None:
    if issubclass(cls, _loaded("decimal", "Decimal")):
        return _decimal
    if hasattr(cls, "json") and hasattr(cls, "model_dump"):
        return methodcaller("model_dump", mode="json")
    if hasattr(cls, "__dataclass_fields__"):
        return dataclasses.asdict
    if issubclass(cls, Enum):
        return attrgetter("value")
    if issubclass(cls, datetime.date | datetime.time):
        return methodcaller("isoformat")
    if issubclass(cls, (_loaded("uuid", "UUID"), _loaded("pathlib", "PurePath"))):
        return str
    return methodcaller("model_dump", mode="json") if hasattr(cls, "model_dump") else None


def _loaded(module: str, name: str) -> Any:
    """Return a class if its module is loaded, else `()`: without it there is no instance, so it is not imported."""
    return getattr(sys.modules.get(module), name, ())


def _decimal(value: Decimal) -> float | str:
    return math.nan if value.is_nan() else str(value)


def explain(value: Any, error: Exception) -> NotEncodableError:
    """Find out where and why encoding `value` ended in `error`."""
    try:
        _check(value, "$", frozenset())
    except NotEncodableError as found:
        return found
    except RecursionError:
        pass  # the walk is no deeper than the data: the error itself says the rest
    if isinstance(error, RecursionError):
        return NotEncodableError("$", "is nested too deeply")
    return NotEncodableError("$", f"cannot be encoded: {type(error).__name__}")


def _check(value: Any, path: str, ancestors: frozenset[int]) -> None:
    """Raise `NotEncodableError` for the first value in `value` that cannot be encoded."""
    if value is None or isinstance(value, str | float):
        return
    if isinstance(value, int):
        _check_int(value, path)
        return
    if id(value) in ancestors:
        raise NotEncodableError(path, "contains itself")
    ancestors |= {id(value)}
    if isinstance(value, dict | list | tuple):
        for step, item in _items(value, path):
            _check(item, path + step, ancestors)
    else:
        _check(_replaced(value, path), path, ancestors)


def _check_int(value: int, path: str) -> None:
    try:
        int.__repr__(value)
    except ValueError:
        raise NotEncodableError(path, "is an integer too long to print") from None


def _items(value: dict[Any, Any] | list[Any] | tuple[Any, ...], path: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        return ((f"[{index}]", item) for index, item in enumerate(value))
    for key in value:
        if isinstance(key, int):
            _check_int(key, path)
        elif key is not None and not isinstance(key, str | float):
            raise NotEncodableError(path, f"has a key of type {type(key).__qualname__}")
    try:
        sorted(value)
    except TypeError:
        raise NotEncodableError(path, "has keys that cannot be sorted: they are of more than one type") from None
    return ((_step(key), item) for key, item in value.items())


def _step(key: Any) -> str:
    return f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{json.dumps(str(key))}]"


def _replaced(value: Any, path: str) -> Any:
    replace = _replacement(type(value))
    if replace is None:
        raise NotEncodableError(path, f"is of type {type(value).__qualname__}")
    if replace is dataclasses.asdict:  # which ends at the first fault in the depth, and does not say where
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    try:
        return replace(value)
    except Exception as error:
        raise NotEncodableError(
            path, f"is a {type(value).__qualname__} that cannot be dumped: {type(error).__name__}"
        ) from error
