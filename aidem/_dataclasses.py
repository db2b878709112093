"""Results that are dataclasses, and what may be in them: rebuilt from JSON data by their type hints.

An annotation is compiled once into a tree of small functions. What cannot be rebuilt without guessing, such as a union
of two dataclasses, is refused then, before any function has run.
"""
# ruff: noqa: ANN401 - results and annotations are any value

from __future__ import annotations

import dataclasses
import datetime
import sys
import types
import typing
from collections import abc
from enum import Enum
from typing import Any, Final, Literal, NamedTuple, Self, TypeVar, Union

from aidem._json import decode, encode, loaded, plain
from aidem._pydantic import PydanticSerializer, is_pydantic, serializer_of
from aidem.exceptions import (
    IdempotencyModelTypeError,
    IdempotencyNoSerializationModelError,
    IdempotencySerializationError,
)

_Build = abc.Callable[[Any], Any]


class DataclassSerializer:
    """Rebuilds results by a dataclass, or an annotation that contains one: `list[Order]`, `Order | None`.

    Raises:
        IdempotencyModelTypeError: The annotation holds no dataclass, or something that cannot be rebuilt from JSON.
    """

    def __init__(self, model: Any) -> None:
        if not any(dataclasses.is_dataclass(part) for part in parts(model)):
            raise IdempotencyModelTypeError(f"DataclassSerializer needs a dataclass, {model!r} contains none")
        self._build = _Compiler().compile(model).build

    @classmethod
    def instantiate(cls, model_type: Any) -> Self:
        """Make a serializer for a return annotation; None: there is none."""
        if model_type is None:
            raise IdempotencyNoSerializationModelError(
                "DataclassSerializer takes its model from the return annotation, and the function has none; "
                "annotate it, or pass DataclassSerializer(Model)"
            )
        return cls(model_type)

    def to_dict(self, data: Any) -> Any:
        """Return the JSON data of a result."""
        return _dump(data)

    def from_dict(self, data: Any) -> Any:
        """Rebuild the result from its JSON data.

        Raises:
            IdempotencySerializationError: The data does not fit the dataclass.
        """
        try:
            return self._build(data)
        except _MisfitError as misfit:
            raise IdempotencySerializationError(f"the stored result does not fit the model: {misfit}") from misfit.cause


def parts(annotation: Any) -> abc.Iterator[Any]:
    """Yield every class that an annotation consists of, without looking into the fields of classes."""
    annotation = _bare(annotation)
    yield typing.get_origin(annotation) or annotation
    if typing.get_origin(annotation) is not Literal:
        for argument in typing.get_args(annotation):
            yield from parts(argument)


def _bare(annotation: Any) -> Any:
    """Return what is behind Annotated, NewType and type aliases."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _bare(annotation.__origin__)
    behind = getattr(annotation, "__supertype__", None) or getattr(annotation, "__value__", None)
    if behind is not None and not isinstance(annotation, type):
        return _bare(behind)
    return annotation


def _dump(value: Any) -> Any:
    if is_pydantic(type(value)):
        return serializer_of(type(value)).to_dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _dump(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {_dump_key(key): _dump(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_dump(item) for item in value]
    return value


def _dump_key(key: Any) -> Any:
    return key if key is None or isinstance(key, str | int | float) else plain(key)


class _MisfitError(Exception):
    """The data does not fit; it gathers the path on its way up."""

    def __init__(self, expected: object, *, cause: Exception | None = None) -> None:
        super().__init__()
        self.cause = cause
        self._expected = getattr(expected, "__qualname__", str(expected))
        self._steps: list[str] = []

    def at(self, step: str) -> Self:
        self._steps.append(step)
        return self

    def __str__(self) -> str:
        return f"${''.join(reversed(self._steps))} is no {self._expected}"


class _Shape(NamedTuple):
    """How an annotation is rebuilt.

    Attributes:
        kinds: The types of the JSON data that it may have, by which members of a union are told apart.
        build: Rebuilds it from JSON data.
        as_is: JSON data is already what it stands for.
    """

    kinds: frozenset[type]
    build: _Build
    as_is: bool = False


_STRING: Final = frozenset({str})
_ARRAY: Final = frozenset({list})
_OBJECT: Final = frozenset({dict})
_KINDS: Final[dict[Any, frozenset[type]]] = {
    str: _STRING,
    int: frozenset({int}),
    float: frozenset({int, float}),
    bool: frozenset({bool}),
    types.NoneType: frozenset({types.NoneType}),
}
_EVERY_KIND: Final = frozenset().union(*_KINDS.values(), _ARRAY, _OBJECT)

_ARRAYS: Final[dict[Any, _Build]] = dict.fromkeys(
    (list, abc.Sequence, abc.MutableSequence, abc.Collection, abc.Iterable), list
) | {set: set, abc.Set: set, abc.MutableSet: set, frozenset: frozenset}
_OBJECTS: Final = frozenset({dict, abc.Mapping, abc.MutableMapping})
