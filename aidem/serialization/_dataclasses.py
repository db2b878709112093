"""Serializers that rebuild results by an annotation of dataclasses and types of the standard library."""

from __future__ import annotations

import dataclasses
import datetime
from typing import TYPE_CHECKING, Any, Self, cast

from aidem._rules.canonical_json import is_dict, plain
from aidem.exceptions import IdempotencyModelTypeError
from aidem.serialization._annotations import declared_by, parts, required
from aidem.serialization._pydantic import is_pydantic, serializer_of
from aidem.serialization._rebuilders import bytes_text, duration_text, rebuilder

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aidem.serialization._rebuilders import Build


class AnnotationSerializer:
    """Rebuilds results by an annotation.

    Args:
        annotation: The return annotation of the function.
        rebuild: Rebuilds a value of it from JSON data.
    """

    def __init__(self, annotation: Any, rebuild: Build) -> None:
        self._rebuild = rebuild
        self.declared = declared_by(annotation)

    def to_dict(self, data: Any) -> Any:
        """Return the JSON data of a result."""
        return _dump(data)

    def from_dict(self, data: Any) -> Any:
        """Rebuild the result from its JSON data.

        Raises:
            IdempotencySerializationError: The data does not fit the model.
        """
        return self._rebuild(data)


class DataclassSerializer(AnnotationSerializer):
    """Rebuilds results by a dataclass, or an annotation that contains one: `list[Order]`, `Order | None`.

    Args:
        model: The dataclass or annotation.

    Raises:
        IdempotencyModelTypeError: The annotation contains no dataclass, or a type that cannot be rebuilt from JSON.
    """

    def __init__(self, model: Any) -> None:
        if not any(map(dataclasses.is_dataclass, parts(model))):
            raise IdempotencyModelTypeError(f"DataclassSerializer needs a dataclass, and {model!r} contains none")
        super().__init__(model, rebuilder(model))

    @classmethod
    def instantiate(cls, model_type: Any) -> Self:
        """Make a serializer for a return annotation; None: the function has none.

        Raises:
            IdempotencyNoSerializationModelError: The function has no return annotation.
        """
        return cls(required(model_type, by=cls))


def _dump(value: object) -> Any:
    cls = type(value)
    if is_pydantic(cls):
        return serializer_of(cls).to_dict(value)
    if dataclasses.is_dataclass(cls):
        return {field.name: _dump(getattr(value, field.name)) for field in dataclasses.fields(cls)}
    if is_dict(value):
        return {
            key if key is None or isinstance(key, str | int | float) else plain(key): _dump(item)
            for key, item in zip(map(_dump_single, value), value.values(), strict=True)
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [_dump(item) for item in cast("Iterable[object]", value)]
    return _dump_single(value)


def _dump_single(value: object) -> Any:
    if isinstance(value, bytes | bytearray):
        return bytes_text(value)
    if isinstance(value, datetime.timedelta):
        return duration_text(value)
    return value
