"""From JSON data back to values: one small function for each kind of type, put together by `_shapes`."""

from __future__ import annotations

import binascii
import dataclasses
import datetime
from typing import TYPE_CHECKING, Any, Self

from aidem._rules.canonical_json import decode, encode
from aidem.exceptions import IdempotencySerializationError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from collections.abc import Set as AbstractSet

    from aidem.serialization._pydantic import PydanticSerializer

    Build = Callable[[Any], Any]


class MisfitError(Exception):
    """The data does not fit; it gathers the path on its way up.

    Attributes:
        cause: What the user's own code raised while it was rebuilt.
    """

    def __init__(self, expected: Any, *, cause: Exception | None = None) -> None:
        super().__init__()
        self.cause = cause
        self._expected = getattr(expected, "__qualname__", str(expected))
        self._path = ""

    def at(self, step: str) -> Self:
        """Say in which part it was."""
        self._path = step + self._path
        return self

    def __str__(self) -> str:
        return f"${self._path} is not of type {self._expected}"


def as_is(value: Any) -> Any:
    """Return a value that is what it stands for."""
    return value


def build_parsed(cls: type, parse: Build, kinds: AbstractSet[type], value: Any) -> Any:
    """Rebuild a single value from JSON data of one of these types."""
    if type(value) not in kinds:
        raise MisfitError(cls)
    try:
        return parse(value)
    except (ValueError, ArithmeticError):
        raise MisfitError(cls) from None  # the error would show the value


def build_if_it_fits(build: Build, value: Any) -> Any:
    """Rebuild a value, or leave the JSON data as it is where it is not what the annotation says."""
    try:
        return build(value)
    except MisfitError:
        return value


def parse_instant(cls: Any, text: str) -> Any:
    """Return the date, datetime or time of a text; a datetime is a date, too."""
    if cls is datetime.date and len(text) > len("2026-01-02"):
        return datetime.datetime.fromisoformat(text)
    return cls.fromisoformat(text)


def parse_text(cls: Callable[[str], Any], text: str) -> Any:
    """Return what a class makes of a text."""
    return cls(text)


def duration_text(duration: datetime.timedelta) -> str:
    """Return a duration as ISO 8601 writes it, in days and seconds."""
    length = abs(duration)
    sign = "" if duration == length else "-"
    return f"{sign}P{length.days}DT{length.seconds}.{length.microseconds:06}S"


def parse_duration(cls: Callable[..., datetime.timedelta], text: str) -> datetime.timedelta:
    """Return the duration of a text that `duration_text` made."""
    sign, _, length = text.rpartition("P")
    days, _, seconds = length.removesuffix("S").partition("DT")
    whole, _, fraction = seconds.partition(".")
    duration = cls(days=int(days), seconds=int(whole), microseconds=int(fraction))
    return -duration if sign else duration


def bytes_text(value: bytes | bytearray) -> str:
    """Return bytes as base64."""
    return binascii.b2a_base64(value, newline=False).decode()


def parse_bytes(cls: Callable[[bytes], Any], text: str) -> Any:
    """Return the bytes of a text that `bytes_text` made."""
    return cls(binascii.a2b_base64(text, strict_mode=True))


def build_one_of(expected: Any, by_text: Mapping[str, Any], value: Any) -> Any:
    """Return the member of an Enum or Literal with this JSON text."""
    text = encode(value)
    if text not in by_text:
        raise MisfitError(expected)
    return by_text[text]


def build_member(union: Any, by_kind: Mapping[type, Build], value: Any) -> Any:
    """Rebuild the member of a union that has JSON data of this type."""
    if type(value) not in by_kind:
        raise MisfitError(union)
    return by_kind[type(value)](value)


def build_array(make: Build, item: Build, value: Any) -> Any:
    """Rebuild a list, set or tuple of any length."""
    return make(_build_items([item] * len(_checked(list, value)), value))


def build_tuple(make: Build, items: Sequence[Build], value: Any) -> Any:
    """Rebuild a tuple of a fixed length."""
    if len(_checked(list, value)) != len(items):
        raise MisfitError(f"tuple of {len(items)}")
    return make(_build_items(items, value))


def _build_items(items: Sequence[Build], value: list[Any]) -> list[Any]:
    return [_at(f"[{index}]", build, part) for index, (build, part) in enumerate(zip(items, value, strict=True))]


def build_mapping(key: Build, item: Build, value: Any) -> Any:
    """Rebuild a dict, whose keys JSON has turned into text."""
    return {_at(f".{name}", key, name): _at(f".{name}", item, part) for name, part in _checked(dict, value).items()}


def build_key(key: Build, name: str) -> Any:
    """Rebuild a key from the text that JSON has made of it."""
    try:
        return key(name)
    except MisfitError:
        return key(_decoded(name))  # a number, true, false or null


def _decoded(name: str) -> Any:
    try:
        return decode(name)
    except ValueError:
        return name


def build_model(model: Any, serializer: PydanticSerializer, value: Any) -> Any:
    """Rebuild a pydantic model."""
    try:
        return serializer.from_dict(value)
    except IdempotencySerializationError as error:
        raise MisfitError(model, cause=error) from None


def build_typed_dict(cls: type, fields: Mapping[str, Build], value: Any) -> Any:
    """Rebuild a typed dict."""
    return _build_fields(cls, fields, value)


def build_dataclass(cls: type, fields: Mapping[str, Build], value: Any) -> Any:
    """Rebuild a dataclass with every field as it was stored, also those that `__init__` does not take."""
    built = _build_fields(cls, fields, value)
    taken = {field.name for field in dataclasses.fields(cls) if field.init}
    try:
        rebuilt = cls(**{name: part for name, part in built.items() if name in taken})
        for name, part in built.items():
            object.__setattr__(rebuilt, name, part)  # __post_init__ has changed it once, and not twice
    except (TypeError, ValueError) as error:  # a field is missing, or the user's own code refuses a value
        raise MisfitError(cls, cause=error) from None
    return rebuilt


def _build_fields(cls: type, fields: Mapping[str, Build], value: Any) -> dict[str, Any]:
    if not _checked(dict, value).keys() <= fields.keys():
        raise MisfitError(cls)
    return {name: _at(f".{name}", fields[name], part) for name, part in value.items()}


def _checked(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise MisfitError(kind)
    return value


def _at(step: str, build: Build, value: Any) -> Any:
    try:
        return build(value)
    except MisfitError as misfit:
        raise misfit.at(step)  # noqa: B904 - the same error, further up
