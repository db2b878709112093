"""From a type annotation to the function that rebuilds such values from JSON data.

An annotation is compiled once into a tree of the small functions in `_rebuild`. What cannot be rebuilt without
guessing, such as a union of two dataclasses, is refused then, before any function has run.
"""

from __future__ import annotations

import dataclasses
import datetime
import types
import typing
from collections import abc
from enum import Enum, Flag
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from aidem._rules.canonical_json import NotEncodableError, decode, encode, loaded
from aidem.exceptions import IdempotencyModelTypeError
from aidem.serialization._annotations import bare, filled_in, hints, parts
from aidem.serialization._pydantic import PydanticSerializer, is_pydantic
from aidem.serialization._rebuild import (
    as_is,
    build_array,
    build_dataclass,
    build_if_it_fits,
    build_key,
    build_mapping,
    build_member,
    build_model,
    build_one_of,
    build_parsed,
    build_tuple,
    build_typed_dict,
    parse_bytes,
    parse_duration,
    parse_instant,
    parse_text,
)

if TYPE_CHECKING:
    from aidem.serialization._rebuild import Build

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
    """Return the function that rebuilds a value of this annotation from JSON data; it raises `_rebuild.MisfitError`.

    Raises:
        IdempotencyModelTypeError: The annotation names something that cannot be rebuilt.
    """
    return _Compiler().compile(annotation).build


def lenient_rebuilder(annotation: Any) -> Build | None:
    """Return the function that rebuilds what fits this annotation, and leaves the rest of the JSON data as it is.

    Returns:
        None where the JSON data is what the annotation stands for.

    Raises:
        IdempotencyModelTypeError: The annotation names something that cannot be rebuilt.
    """
    compiler = _Compiler(is_lenient=True)
    shape = compiler.compile(annotation)
    if compiler.unknown:
        raise IdempotencyModelTypeError(f"JSON has nothing for {compiler.unknown[0].__qualname__}")
    return None if shape.as_is else shape.build


def names_more_than_json(annotation: Any) -> bool:
    """Whether an annotation names a class that JSON data is no instance of."""
    plain = {*_JSON_TYPES, *_OBJECTS, *(cls for cls, make in _ARRAYS.items() if make is list), object, types.UnionType}
    return any(
        isinstance(part, type) and part not in plain and part is not Any and not typing.is_typeddict(part)
        for part in parts(annotation)
    )


class _Shape(NamedTuple):
    """How an annotation is rebuilt.

    Attributes:
        kinds: The types of the JSON data that it may have, by which the members of a union are told apart.
        build: Rebuilds it from JSON data.
        as_is: The JSON data already is what it stands for.
    """

    kinds: frozenset[type]
    build: Build
    as_is: bool = False


class _Compiler:
    """Compiles one annotation, and each dataclass in it once: a dataclass may contain itself.

    Attributes:
        unknown: Classes of which JSON data can never be an instance.
    """

    def __init__(self, *, is_lenient: bool = False) -> None:
        self.unknown: list[type] = []
        self._known: dict[Any, _Shape] = {}
        self._is_lenient = is_lenient
        self._aliases: list[tuple[Any, Build]] = []  # those that are being compiled

    def compile(self, annotation: Any) -> _Shape:
        for alias, build in self._aliases:
            if annotation is alias:  # within itself
                return _Shape(frozenset(_JSON_TYPES), build, as_is=True)
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
        return partial(build_if_it_fits, build) if self._is_lenient else build

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
            return _Shape(_OBJECT, partial(build_model, origin, PydanticSerializer(annotation)))
        if _has_fields(origin):
            return self._fields(annotation, origin, arguments)
        return self._container(origin, arguments) or self._leaf(origin)

    def _union(self, annotation: Any, members: tuple[Any, ...]) -> _Shape:
        if sum(map(is_pydantic, members)) > 1:  # pydantic tells its models apart
            return _Shape(frozenset(_JSON_TYPES), partial(build_model, annotation, PydanticSerializer(annotation)))
        by_kind: dict[type, Build] = {}
        same: dict[type, bool] = {}
        for shape in map(self.compile, members):
            for kind in shape.kinds:
                if not (same.setdefault(kind, shape.as_is) and shape.as_is) and kind in by_kind:
                    raise IdempotencyModelTypeError(
                        f"{annotation!r} cannot be rebuilt from JSON: two of its members look alike there; "
                        "name one of them, or pass a CustomDictSerializer"
                    )
                by_kind[kind] = as_is if kind in by_kind else shape.build
        return _Shape(frozenset(by_kind), partial(build_member, annotation, by_kind), all(same.values()))

    def _fields(self, annotation: Any, cls: Any, arguments: tuple[Any, ...]) -> _Shape:
        if annotation not in self._known:
            fields: dict[str, Build] = {}
            is_dict = typing.is_typeddict(cls)
            build = build_typed_dict if is_dict else build_dataclass
            shape = self._known[annotation] = _Shape(_OBJECT, partial(build, cls, fields))
            chosen = dict(zip(getattr(cls, "__parameters__", ()), arguments, strict=False))
            shapes = {name: self.compile(filled_in(hint, chosen)) for name, hint in hints(cls).items()}
            fields |= {name: field.build for name, field in shapes.items()}
            is_same = is_dict and all(field.as_is for field in shapes.values())
            self._known[annotation] = shape._replace(as_is=is_same)
        return self._known[annotation]

    def _container(self, origin: Any, arguments: tuple[Any, ...]) -> _Shape | None:
        if origin in _ARRAYS:
            (item,) = map(self.compile, arguments or (Any,))
            make = _ARRAYS[origin]
            return _Shape(_ARRAY, partial(build_array, make, item.build), as_is=make is list and item.as_is)
        if origin in _OBJECTS:
            names, items = arguments or (Any, Any)
            key, item = self._compile(bare(names)), self.compile(items)
            build_name = self._leniently(partial(build_key, key.build))
            is_same = str in key.kinds and key.as_is and item.as_is
            return _Shape(_OBJECT, partial(build_mapping, build_name, item.build), as_is=is_same)
        if origin is tuple and (not arguments or arguments[-1] is ...):
            return _Shape(_ARRAY, partial(build_array, tuple, self.compile((arguments or (Any,))[0]).build))
        if origin is tuple:
            return _Shape(_ARRAY, partial(build_tuple, tuple, [self.compile(item).build for item in arguments]))
        return self._named_tuple(origin) if hasattr(origin, "_make") else None

    def _named_tuple(self, cls: Any) -> _Shape:
        annotations = hints(cls)
        items = [self.compile(annotations.get(name, Any)).build for name in cls._fields]
        return _Shape(_ARRAY, partial(build_tuple, cls._make, items))

    def _leaf(self, cls: Any) -> _Shape:
        shape = _leaf(cls)
        if not shape.kinds:
            self.unknown.append(cls)
        return shape


def _has_fields(cls: Any) -> bool:
    return typing.is_typeddict(cls) or dataclasses.is_dataclass(cls)


def _leaf(cls: Any) -> _Shape:
    if issubclass(cls, Flag):  # has values that are not members
        return _Shape(_NUMBER, partial(build_parsed, cls, cls, _NUMBER))
    if issubclass(cls, Enum):
        return _one_of(cls, tuple(cls))
    if issubclass(cls, loaded("decimal", "Decimal")):
        return _Shape(_NUMBER_OR_TEXT, partial(build_parsed, cls, cls, _NUMBER_OR_TEXT))
    for bases, parse in (
        ((datetime.date, datetime.time), parse_instant),
        (datetime.timedelta, parse_duration),
        ((bytes, bytearray), parse_bytes),
        ((loaded("uuid", "UUID"), loaded("pathlib", "PurePath")), parse_text),
    ):
        if issubclass(cls, bases):
            return _Shape(_TEXT, partial(build_parsed, cls, partial(parse, cls), _TEXT))
    kinds = frozenset(kind for kind in _JSON_TYPES if _is_a(kind, cls))
    return _Shape(kinds, partial(build_parsed, cls, as_is, kinds), as_is=True)


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
    kinds = frozenset(map(_kind, map(decode, by_text)))
    same = all(type(member) in _JSON_TYPES for member in members)
    return _Shape(kinds, partial(build_one_of, expected, by_text), same)


def _kind(value: object) -> type:
    return type(value)
