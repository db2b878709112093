"""The serializer for pydantic models. pydantic is imported only when a serializer is made."""

from __future__ import annotations

from functools import lru_cache
from types import UnionType
from typing import TYPE_CHECKING, Any, Final, Self, Union, get_args, get_origin

from aidem._distribution import how_to_install
from aidem._rules.canonical_json import encode, loaded
from aidem.exceptions import (
    IdempotencyModelTypeError,
    IdempotencySerializationError,
    IdempotencyUsageError,
)
from aidem.serialization._annotations import bare, declared_by, parts, required

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic import TypeAdapter

_SHOWN_FAULTS = 5


class PydanticSerializer:
    """Rebuilds results by a pydantic model, or any annotation that pydantic understands: `list[Order]`, `Order | None`.

    Results are stored by field name and without computed fields. Aliases and computed fields are accepted when a result
    is read, so results that AWS Powertools stored can be replayed.

    Args:
        model: The pydantic model or annotation.

    Raises:
        IdempotencyModelTypeError: pydantic cannot handle the annotation.
        IdempotencyUsageError: pydantic is not installed.
    """

    def __init__(self, model: Any) -> None:
        self._adapter = _adapter(model)
        self._validate = _own_validation(model)
        self.declared = declared_by(model)

    @classmethod
    def instantiate(cls, model_type: Any) -> Self:
        """Make a serializer for a return annotation; None: the function has none.

        Raises:
            IdempotencyNoSerializationModelError: The function has no return annotation.
        """
        return cls(required(model_type, by=cls))

    def to_dict(self, data: Any) -> Any:
        """Return the JSON data of a result."""
        by_alias = self._validate is not None
        return self._adapter.dump_python(data, mode="json", round_trip=True, by_alias=by_alias, warnings=False)

    def from_dict(self, data: Any) -> Any:
        """Rebuild the result from its JSON data.

        Raises:
            IdempotencySerializationError: The data does not fit the model.
        """
        from pydantic import ValidationError

        try:
            if self._validate is not None:
                return self._validate(data)
            # As JSON, because strict models and encoded bytes are read back only from there.
            return self._adapter.validate_json(encode(data), by_alias=True, by_name=True)
        except ValidationError as error:
            # Its own message shows the values, so it is neither quoted nor chained.
            faults = error.errors(include_url=False, include_context=False, include_input=False)
            shown = [f"{'.'.join(map(str, ('$', *fault['loc'])))} ({fault['type']})" for fault in faults]
            shown[_SHOWN_FAULTS:] = ["…"] * (len(shown) > _SHOWN_FAULTS)
            raise IdempotencySerializationError(
                f"the stored result does not fit the model: {', '.join(shown)}"
            ) from None


def is_pydantic(cls: object) -> bool:
    """Whether something is a pydantic model or a pydantic dataclass."""
    return isinstance(cls, type) and hasattr(cls, "__pydantic_validator__")


# The serializer of a model that is part of something else.
serializer_of: Final[Callable[[type], PydanticSerializer]] = lru_cache(maxsize=256)(PydanticSerializer)


def _adapter(model: Any) -> TypeAdapter[Any]:
    try:
        from pydantic import TypeAdapter
    except ImportError as error:
        raise IdempotencyUsageError(f"PydanticSerializer needs pydantic: {how_to_install('pydantic')}") from error
    try:
        adapter = TypeAdapter[Any](model)
        adapter.rebuild()  # pydantic puts off what it cannot resolve; better now than after the effect
    except Exception as error:
        raise IdempotencyModelTypeError(
            f"PydanticSerializer cannot handle {model!r}: {type(error).__name__}; use a pydantic model, "
            "and import at run time what its annotations name"
        ) from error
    return adapter


def _own_validation(model: Any) -> Callable[[Any], Any] | None:
    """Return what rebuilds models whose class validates by a `model_validate` of its own, as SQLModel's do.

    pydantic would call their `__init__`, and that of a table of SQLModel validates nothing.
    """
    if _validates_by_itself(model):
        validate: Callable[[Any], Any] = model.model_validate
        return validate
    annotation = bare(model)
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ()
    if sum(map(is_pydantic, members)) > 1 or not any(map(_validates_by_itself, parts(annotation))):
        return None
    from aidem.serialization._rebuilders import rebuilder  # it makes a PydanticSerializer of every model in turn

    return rebuilder(annotation)


def _validates_by_itself(cls: Any) -> bool:
    own = getattr(getattr(cls, "model_validate", None), "__func__", None)
    return is_pydantic(cls) and own not in (None, loaded("pydantic", "BaseModel").model_validate.__func__)
