"""From a type annotation to the function that rebuilds its values from JSON data.

An annotation is compiled once, into a tree of small functions, one for each part of it. An annotation that cannot be
rebuilt without guessing, such as a union of two dataclasses, is refused at that time, before any function has run.
"""

from __future__ import annotations

import binascii
import dataclasses
import datetime
import types
import typing
from collections import abc
from contextlib import suppress
from enum import Enum, Flag
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Self

from aidem._rules.canonical_json import NotEncodableError, decode, encode, loaded
from aidem.exceptions import IdempotencyModelTypeError, IdempotencySerializationError
from aidem.serialization._annotations import bare, filled_in, hints, parts
from aidem.serialization._pydantic import PydanticSerializer, is_pydantic

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from collections.abc import Set as AbstractSet

    Build = Callable[[Any], Any]

_JSON_TYPES: Final[tuple[type[object], ...]] = (str, int, float, bool, types.NoneType, list, dict)
_TEXT: Final = frozenset({str})
_NUMBER: Final = frozenset({int})
_NUMBER_OR_TEXT: Final = frozenset({str, float})  # a Decimal is text, its NaN is a number
_ARRAY: Final = frozenset({list})
_OBJECT: Final = frozenset({dict})

_ARRAYS: Final[dict[Any, Build]] = {
    **dict.fromkeys((list, abc.Sequence, abc.MutableSequence, abc.Collection, abc.Iterable), list),
    **dict.fromkeys((set, abc.Set, abc.MutableSet), set),
    frozenset: frozenset,
}
_OBJECTS: Final = frozenset({dict, abc.Mapping, abc.MutableMapping})


def rebuilder(annotation: Any) -> Build:
    """Return the function that rebuilds a value of this annotation from JSON data.

    The function raises `IdempotencySerializationError` for data that does not fit the annotation.

    Raises:
        IdempotencyModelTypeError: The annotation names something that cannot be rebuilt.
    """
    build = _Compiler().compile(annotation).build

    def rebuild(data: Any) -> Any:
        try:
            return build(data)
        except _MisfitError as misfit:
            raise IdempotencySerializationError(f"the stored result does not fit the model: {misfit}") from misfit.cause

    return rebuild


def lenient_rebuilder(annotation: Any) -> Build | None:
    """Return the function that rebuilds the parts that fit this annotation, and returns the others as JSON data.

    Returns:
        None if values of the annotation are JSON data already.

    Raises:
        IdempotencyModelTypeError: The annotation names something that cannot be rebuilt.
    """
    compiler = _Compiler(is_lenient=True)
    shape = compiler.compile(annotation)
    if compiler.unknown:
        raise IdempotencyModelTypeError(f"JSON has nothing for {compiler.unknown[0].__qualname__}")
    return None if shape.is_json else shape.build


def names_more_than_json(annotation: Any) -> bool:
    """Whether an annotation names a class that JSON data is no instance of."""
    plain = {*_JSON_TYPES, *_OBJECTS, *(cls for cls, make in _ARRAYS.items() if make is list), object, types.UnionType}
    return any(
        isinstance(part, type) and part not in plain and part is not Any and not typing.is_typeddict(part)
        for part in parts(annotation)
    )


# --- From an annotation to its function -------------------------------------------------------------------------------


class _Shape(NamedTuple):
    """How values of an annotation are rebuilt.

    Attributes:
        kinds: The types that their JSON data may have; members of a union are told apart by them.
        build: Rebuilds a value from JSON data.
        is_json: Whether the JSON data is the value.
    """

    kinds: frozenset[type]
    build: Build
    is_json: bool = False


class _Compiler:
    """Compiles one annotation, and each dataclass in it once: a dataclass may contain itself.

    Attributes:
        unknown: Classes that no JSON data can be an instance of.
    """

    def __init__(self, *, is_lenient: bool = False) -> None:
        self.unknown: list[type] = []
        self._known: dict[Any, _Shape] = {}
        self._is_lenient = is_lenient
        self._aliases: list[tuple[Any, Build]] = []  # those that are being compiled

    def compile(self, annotation: Any) -> _Shape:
        for alias, build in self._aliases:
            if annotation is alias:  # within itself
                return _Shape(frozenset(_JSON_TYPES), build, is_json=True)
        bared = bare(annotation)
        if bared is annotation:
            shape = self._compile(annotation)
        else:
            builds: list[Build] = []
            self._aliases.append((annotation, lambda value: builds[0](value)))  # noqa: PLW0108 - it is not there yet
            shape = self._compile(bared)
            builds.append(shape.build)
            self._aliases.pop()
        return shape._replace(build=self._leniently(shape.build))

    def _leniently(self, build: Build) -> Build:
        return partial(_build_if_it_fits, build) if self._is_lenient else build

    def _compile(self, annotation: Any) -> _Shape:
        origin: Any = typing.get_origin(annotation) or annotation
        arguments = typing.get_args(annotation)
        if origin in (typing.Union, types.UnionType):
            return self._union(annotation, arguments)
        if origin is Literal:
            return _one_of(annotation, arguments)
        if annotation is Any:
            return self._leaf(object)
        if not isinstance(origin, type):
            raise IdempotencyModelTypeError(f"{annotation!r} cannot be rebuilt from JSON; name a class there")
        if is_pydantic(origin):
            return _Shape(_OBJECT, partial(_build_model, origin, PydanticSerializer(annotation)))
        if typing.is_typeddict(origin) or dataclasses.is_dataclass(origin):
            return self._fields(annotation, origin, arguments)
        return self._container(origin, arguments) or self._leaf(origin)

    def _union(self, annotation: Any, members: tuple[Any, ...]) -> _Shape:
        if sum(map(is_pydantic, members)) > 1:  # pydantic tells its models apart
            return _Shape(frozenset(_JSON_TYPES), partial(_build_model, annotation, PydanticSerializer(annotation)))
        by_kind: dict[type, Build] = {}
        is_json: dict[type, bool] = {}
        for shape in map(self.compile, members):
            for kind in shape.kinds:
                if not (is_json.setdefault(kind, shape.is_json) and shape.is_json) and kind in by_kind:
                    raise IdempotencyModelTypeError(
                        f"{annotation!r} cannot be rebuilt from JSON: two of its members look alike there; "
                        "name one of them, or pass a CustomDictSerializer"
                    )
                by_kind[kind] = _as_is if kind in by_kind else shape.build
        return _Shape(frozenset(by_kind), partial(_build_member, annotation, by_kind), all(is_json.values()))

    def _fields(self, annotation: Any, cls: Any, arguments: tuple[Any, ...]) -> _Shape:
        if annotation not in self._known:
            fields: dict[str, Build] = {}
            is_dict = typing.is_typeddict(cls)
            build = _build_fields if is_dict else _build_dataclass
            shape = self._known[annotation] = _Shape(_OBJECT, partial(build, cls, fields))
            chosen = dict(zip(getattr(cls, "__parameters__", ()), arguments, strict=False))
            shapes = {name: self.compile(filled_in(hint, chosen)) for name, hint in hints(cls).items()}
            fields |= {name: field.build for name, field in shapes.items()}
            is_json = is_dict and all(field.is_json for field in shapes.values())
            self._known[annotation] = shape._replace(is_json=is_json)
        return self._known[annotation]

    def _container(self, origin: Any, arguments: tuple[Any, ...]) -> _Shape | None:
        if hasattr(origin, "_make"):  # a named tuple
            annotations = hints(origin)
            return self._tuple(origin._make, [annotations.get(name, Any) for name in origin._fields])
        if origin in _ARRAYS:
            (item,) = map(self.compile, arguments or (Any,))
            make = _ARRAYS[origin]
            return _Shape(_ARRAY, partial(_build_array, make, item.build), is_json=make is list and item.is_json)
        if origin in _OBJECTS:
            names, items = arguments or (Any, Any)
            key, item = self._compile(bare(names)), self.compile(items)
            build_name = self._leniently(partial(_build_key, key.build))
            is_json = str in key.kinds and key.is_json and item.is_json
            return _Shape(_OBJECT, partial(_build_mapping, build_name, item.build), is_json=is_json)
        if origin is tuple and (not arguments or arguments[-1] is ...):
            return _Shape(_ARRAY, partial(_build_array, tuple, self.compile((arguments or (Any,))[0]).build))
        if origin is tuple:
            return self._tuple(tuple, arguments)
        return None

    def _tuple(self, make: Build, items: Sequence[Any]) -> _Shape:
        return _Shape(_ARRAY, partial(_build_tuple, make, [self.compile(item).build for item in items]))

    def _leaf(self, cls: Any) -> _Shape:
        shape = _leaf(cls)
        if not shape.kinds:
            self.unknown.append(cls)
        return shape


def _leaf(cls: Any) -> _Shape:
    if issubclass(cls, Flag):  # has values that are not members
        return _Shape(_NUMBER, partial(_build_parsed, cls, cls, _NUMBER))
    if issubclass(cls, Enum):
        return _one_of(cls, tuple(cls))
    if issubclass(cls, loaded("decimal", "Decimal")):
        return _Shape(_NUMBER_OR_TEXT, partial(_build_parsed, cls, cls, _NUMBER_OR_TEXT))
    for bases, parse in (
        ((datetime.date, datetime.time), _parse_instant),
        (datetime.timedelta, _parse_duration),
        ((bytes, bytearray), _parse_bytes),
        ((loaded("uuid", "UUID"), loaded("pathlib", "PurePath")), _parse_text),
    ):
        if issubclass(cls, bases):
            return _Shape(_TEXT, partial(_build_parsed, cls, partial(parse, cls), _TEXT))
    kinds = frozenset(kind for kind in _JSON_TYPES if _is_a(kind, cls))
    return _Shape(kinds, partial(_build_parsed, cls, _as_is, kinds), is_json=True)


def _is_a(kind: type, cls: Any) -> bool:
    try:
        return issubclass(kind, cls) or (cls is float and issubclass(kind, int))
    except TypeError:  # a protocol that cannot be asked
        return False


def _one_of(expected: Any, members: tuple[Any, ...]) -> _Shape:
    try:
        by_text = {encode(member): member for member in members}
    except NotEncodableError as error:
        raise IdempotencyModelTypeError(f"{expected!r} cannot be stored as JSON: {error.reason}") from error
    values: list[object] = [decode(text) for text in by_text]
    kinds = frozenset(type(value) for value in values)
    is_json = all(type(member) in _JSON_TYPES for member in members)
    return _Shape(kinds, partial(_build_one_of, expected, by_text), is_json)


# --- From JSON data to a value ----------------------------------------------------------------------------------------


class _MisfitError(Exception):
    """The data does not fit; the error gathers the path to the fault on its way up.

    Attributes:
        cause: The exception of the user's own code, if that refused the data.
    """

    def __init__(self, expected: Any, *, cause: Exception | None = None) -> None:
        super().__init__()
        self.cause = cause
        self._expected = getattr(expected, "__qualname__", str(expected))
        self._path = ""

    def at(self, step: str) -> Self:
        """Add the step that leads to the part with the fault."""
        self._path = step + self._path
        return self

    def __str__(self) -> str:
        return f"${self._path} is not of type {self._expected}"


def _at(step: str, build: Build, value: Any) -> Any:
    try:
        return build(value)
    except _MisfitError as misfit:
        raise misfit.at(step)  # noqa: B904 - the same error, further up


def _checked(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise _MisfitError(kind)
    return value


def _as_is(value: Any) -> Any:
    return value


def _build_if_it_fits(build: Build, value: Any) -> Any:
    try:
        return build(value)
    except _MisfitError:
        return value


def _build_member(union: Any, by_kind: Mapping[type, Build], value: Any) -> Any:
    if type(value) not in by_kind:
        raise _MisfitError(union)
    return by_kind[type(value)](value)


def _build_one_of(expected: Any, by_text: Mapping[str, Any], value: Any) -> Any:
    text = encode(value)
    if text not in by_text:
        raise _MisfitError(expected)
    return by_text[text]


def _build_array(make: Build, item: Build, value: Any) -> Any:
    return make(_build_items([item] * len(_checked(list, value)), value))


def _build_tuple(make: Build, items: Sequence[Build], value: Any) -> Any:
    if len(_checked(list, value)) != len(items):
        raise _MisfitError(f"tuple of {len(items)}")
    return make(_build_items(items, value))


def _build_items(items: Sequence[Build], value: list[Any]) -> list[Any]:
    return [_at(f"[{index}]", build, part) for index, (build, part) in enumerate(zip(items, value, strict=True))]


def _build_mapping(key: Build, item: Build, value: Any) -> Any:
    return {_at(f".{name}", key, name): _at(f".{name}", item, part) for name, part in _checked(dict, value).items()}


def _build_key(key: Build, name: str) -> Any:
    """Rebuild a key of a dict: a text, or the JSON text of a number, true, false or null."""
    with suppress(_MisfitError):
        return key(name)
    decoded: Any = name
    with suppress(ValueError):
        decoded = decode(name)
    return key(decoded)


def _build_model(model: Any, serializer: PydanticSerializer, value: Any) -> Any:
    try:
        return serializer.from_dict(value)
    except IdempotencySerializationError as error:
        raise _MisfitError(model, cause=error) from None


def _build_dataclass(cls: type, fields: Mapping[str, Build], value: Any) -> Any:
    """Rebuild a dataclass with every field as it was stored, also those that `__init__` does not take."""
    built = _build_fields(cls, fields, value)
    taken = {field.name for field in dataclasses.fields(cls) if field.init}
    try:
        rebuilt = cls(**{name: part for name, part in built.items() if name in taken})
        for name, part in built.items():
            object.__setattr__(rebuilt, name, part)  # __post_init__ has changed it once, and not twice
    except (TypeError, ValueError) as error:  # a field is missing, or the user's own code refuses a value
        raise _MisfitError(cls, cause=error) from None
    return rebuilt


def _build_fields(cls: type, fields: Mapping[str, Build], value: Any) -> dict[str, Any]:
    if not _checked(dict, value).keys() <= fields.keys():
        raise _MisfitError(cls)
    return {name: _at(f".{name}", fields[name], part) for name, part in value.items()}


def _build_parsed(cls: type, parse: Build, kinds: AbstractSet[type], value: Any) -> Any:
    if type(value) not in kinds:
        raise _MisfitError(cls)
    try:
        return parse(value)
    except (ValueError, ArithmeticError):
        raise _MisfitError(cls) from None  # the error would show the value


# --- Single values that JSON has no type for --------------------------------------------------------------------------


def _parse_text(cls: Callable[[str], Any], text: str) -> Any:
    return cls(text)


def _parse_instant(cls: Any, text: str) -> Any:
    if cls is datetime.date and len(text) > len("2026-01-02"):  # a datetime is a date, too
        return datetime.datetime.fromisoformat(text)
    return cls.fromisoformat(text)


def duration_text(duration: datetime.timedelta) -> str:
    """Return a duration in ISO 8601, as days and seconds."""
    length = abs(duration)
    sign = "" if duration == length else "-"
    return f"{sign}P{length.days}DT{length.seconds}.{length.microseconds:06}S"


def _parse_duration(cls: Callable[..., datetime.timedelta], text: str) -> datetime.timedelta:
    sign, _, length = text.rpartition("P")
    days, _, seconds = length.removesuffix("S").partition("DT")
    whole, _, fraction = seconds.partition(".")
    duration = cls(days=int(days), seconds=int(whole), microseconds=int(fraction))
    return -duration if sign else duration


def bytes_text(value: bytes | bytearray) -> str:
    """Return bytes as base64."""
    return binascii.b2a_base64(value, newline=False).decode()


def _parse_bytes(cls: Callable[[bytes], Any], text: str) -> Any:
    return cls(binascii.a2b_base64(text, strict_mode=True))
