"""Results that are dataclasses, or contain some."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Self, cast

from aidem._annotations import declared_by, parts
from aidem._json import is_dict, plain
from aidem._pydantic import is_pydantic, serializer_of
from aidem._rebuild import MisfitError
from aidem._shapes import rebuilder
from aidem.exceptions import (
    IdempotencyModelTypeError,
    IdempotencyNoSerializationModelError,
    IdempotencySerializationError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable


class DataclassSerializer:
    """Rebuilds results by a dataclass, or an annotation that contains one: `list[Order]`, `Order | None`.

    Raises:
        IdempotencyModelTypeError: The annotation holds no dataclass, or something that cannot be rebuilt from JSON.
    """

    def __init__(self, model: Any) -> None:
        if not any(map(dataclasses.is_dataclass, parts(model))):
            raise IdempotencyModelTypeError(f"DataclassSerializer needs a dataclass, and {model!r} contains none")
        self._rebuild = rebuilder(model)
        self.declared = declared_by(model)

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
            return self._rebuild(data)
        except MisfitError as misfit:
            raise IdempotencySerializationError(f"the stored result does not fit the model: {misfit}") from misfit.cause


def _dump(value: object) -> Any:
    cls = type(value)
    if is_pydantic(cls):
        return serializer_of(cls).to_dict(value)
    if dataclasses.is_dataclass(cls):
        return {field.name: _dump(getattr(value, field.name)) for field in dataclasses.fields(cls)}
    if is_dict(value):
        return {_dump_key(key): _dump(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_dump(item) for item in cast("Iterable[object]", value)]
    return value


def _dump_key(key: Any) -> Any:
    return key if key is None or isinstance(key, str | int | float) else plain(key)
