"""The one canonical JSON encoder, for keys and for results.

Sorted keys, separators ", " and ": ", ASCII, NaN and Infinity allowed: byte for byte what AWS Powertools for Python
hashes. What JSON does not know is replaced first:

    Decimal → its str (NaN → NaN) · pydantic model → model_dump(mode="json"), sets sorted · dataclass → dict of fields
    Enum → its value · date, datetime, time → isoformat · UUID, PurePath → str

A value of more than one of these kinds is the first of them. Everything else is refused, and only then is the value
walked again, slowly, to say where in it the fault lies.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from functools import lru_cache
from operator import attrgetter, methodcaller
from typing import TYPE_CHECKING, Any, Final, TypeGuard, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
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


class Lost:
    """A mark in the place of something that a dump does not show; who looks at it is refused.

    Attributes:
        reason: As in `NotEncodableError`.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def _refuse(self, *_: object) -> Any:
        raise NotEncodableError("what it looks at", self.reason)

    # The ways in which a JMESPath expression looks at a value; what it only hands on is refused by the encoder.
    get = values = __eq__ = __str__ = _refuse
    __hash__ = object.__hash__


def encode(value: Any) -> str:
    """Return the canonical JSON text of a value.

    Raises:
        NotEncodableError: The value, or something in it, is of another type, circular or too deep.
        Exception: What interrupted the encoder and is no fault of the value, such as Celery's soft time limit.
    """
    try:
        return "".join(_chunks(value, 0))
    except Exception as error:
        raise explain(value, error) from error


def plain(value: object) -> Any:
    """Return what the encoder writes in the place of a value that JSON does not know.

    Raises:
        TypeError: There is nothing to write for this type.
    """
    cls = type(value)
    replace = _replacement(cls)
    if replace is None:
        raise TypeError(f"values of type {cls.__qualname__} are not encoded")
    return replace(value)


def is_dict(value: object) -> TypeGuard[dict[Any, Any]]:
    """Whether JSON has an object for this value."""
    return isinstance(value, dict)


def is_array(value: object) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    """Whether JSON has an array for this value."""
    return isinstance(value, list | tuple)


def loaded(module: str, name: str) -> Any:
    """Return a class if its module is loaded, else `()`: without it there is no instance, so it is not imported."""
    return getattr(sys.modules.get(module), name, ())


def _decimal(value: Decimal) -> float | str:
    return math.nan if value.is_nan() else str(value)


def dump_model(model: Any) -> Any:
    """Return the JSON data of a pydantic model, or of something else with `model_dump`; it may hold `Lost`."""
    from aidem._rules.model_dump import dump  # of no use without pydantic

    return dump(model)


_isoformat: Final = methodcaller("isoformat")
_REPLACED: Final[tuple[tuple[str, str, Callable[[Any], Any]], ...]] = (
    ("enum", "Enum", attrgetter("value")),
    ("datetime", "date", _isoformat),
    ("datetime", "time", _isoformat),
    ("uuid", "UUID", str),
    ("pathlib", "PurePath", str),
)


def _find_replacement(cls: type) -> Callable[[Any], Any] | None:
    if issubclass(cls, loaded("decimal", "Decimal")):
        return _decimal
    if hasattr(cls, "json") and hasattr(cls, "model_dump"):
        return dump_model
    if hasattr(cls, "__dataclass_fields__"):
        return dataclasses.asdict
    for module, name, replace in _REPLACED:
        if issubclass(cls, loaded(module, name)):
            return replace
    return dump_model if hasattr(cls, "model_dump") else None


_replacement: Final[Callable[[type], Callable[[Any], Any] | None]] = lru_cache(maxsize=1024)(_find_replacement)


def make_chunks() -> Callable[[Any, int], Iterable[str]]:
    """Return what encodes a value in pieces; `JSONEncoder.encode` would make the one in C anew for every value."""
    encoder = json.JSONEncoder(sort_keys=True, default=plain)
    make = getattr(json.encoder, "c_make_encoder", None)
    if make is None:
        return lambda value, _indent: encoder.iterencode(value)
    quoted = json.encoder.encode_basestring_ascii
    # Without a dict of markers it does not look for cycles, but ends in a RecursionError, which is explained.
    chunks: Callable[[Any, int], Iterable[str]] = make(None, plain, quoted, None, ": ", ", ", True, False, True)  # noqa: FBT003 - in C
    return chunks


_chunks: Final = make_chunks()
_decoder: Final = json.JSONDecoder()
_scan: Final[Callable[[str, int], tuple[Any, int]]] = vars(_decoder)["scan_once"]


def decode(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: It is not JSON.
        RecursionError: It is too deep.
    """
    try:
        value, end = _scan(text, 0)
    except StopIteration:
        return _decoder.decode(text)
    return value if end == len(text) else _decoder.decode(text)  # there is white space, or a fault to be told


def explain(value: Any, error: Exception) -> NotEncodableError:
    """Find out where and why encoding `value` ended in `error`, which is raised again if the value has no fault."""
    try:
        _check(value, "$", frozenset())
    except NotEncodableError as found:
        return found
    except RecursionError:
        pass  # the walk is no deeper than the data: the error itself says the rest
    if isinstance(error, RecursionError):
        return NotEncodableError("$", "is nested too deeply")
    raise error


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
    if is_dict(value):
        _check_keys(value, path)
        for key, item in value.items():
            _check(item, path + _step(key), ancestors)
    elif is_array(value):
        for index, item in enumerate(value):
            _check(item, f"{path}[{index}]", ancestors)
    else:
        _check(_replaced(value, path), path, ancestors)


def _check_int(value: int, path: str) -> None:
    try:
        int.__repr__(value)
    except ValueError:
        raise NotEncodableError(path, "is an integer too long to print") from None


def _check_keys(value: dict[Any, Any], path: str) -> None:
    for key in value:
        if isinstance(key, int):
            _check_int(key, path)
        elif key is not None and not isinstance(key, str | float):
            raise NotEncodableError(path, f"has a key of type {type(key).__qualname__}")
    try:
        sorted(value)
    except TypeError:
        raise NotEncodableError(path, "has keys that cannot be sorted: they are of more than one type") from None


def _step(key: Any) -> str:
    return f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{json.dumps(str(key))}]"


def _replaced(value: object, path: str) -> Any:
    if isinstance(value, Lost):
        raise NotEncodableError(path, value.reason)
    cls = type(value)
    replace = _replacement(cls)
    if replace is None:
        raise NotEncodableError(path, f"is of type {cls.__qualname__}")
    if replace is dataclasses.asdict:  # which ends at the first fault in the depth, and does not say where
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(cast("Any", value))}
    try:
        return replace(value)
    except Exception as error:
        reason = f"is a {cls.__qualname__} that cannot be dumped: {type(error).__name__}"
        raise NotEncodableError(path, reason) from error
