"""The dump of a pydantic model, made fit to be a key: nothing in it is left to chance, nothing hidden is overlooked.

`model_dump` masks secrets, drops the fields of a subclass where an annotation names its base, and writes the members of
a set in an order that differs between processes. So the dump is walked side by side with the model: sets are sorted,
and a mark is put in the place of everything that is not shown, which the encoder refuses wherever it meets it.

What the author of a model leaves out or changes on purpose (`exclude=True`, serializers) is left out and changed here,
too, unless it can be proved that two values of one field are written alike.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections import deque
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from decimal import Decimal
from functools import lru_cache
from operator import methodcaller
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeGuard

from aidem._rules.canonical_json import Lost, is_array, is_dict

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

MASK: Final = "**********"
_ABSENT: Final = object()
_READ_BACK: Final = frozenset({str, int, float, Decimal})


def dump(model: Any) -> Any:
    """Return the JSON data of a model, in order, and marked where it does not show the model."""
    cls = _class_of(model)
    if not _is_model(cls):
        return model.model_dump(mode="json")
    return _walked(model, _dumper(cls)(model), _Place(cls), is_nested=False)


def _class_of(value: object) -> Any:
    return type(value)


def _is_model(cls: Any) -> bool:
    return hasattr(cls, "model_dump") and hasattr(cls, "__pydantic_serializer__")


@lru_cache(maxsize=256)
def _dumper(cls: Any) -> Callable[[Any], Any]:
    taken = inspect.signature(cls.model_dump).parameters
    if "warnings" in taken or any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        return methodcaller("model_dump", mode="json", warnings=False)  # its warnings quote the values
    return methodcaller("model_dump", mode="json")


class _Place(NamedTuple):
    """The field that a value is in, for messages."""

    cls: Any
    field: str = ""

    def __str__(self) -> str:
        return f"{self.cls.__qualname__}.{self.field}" if self.field else f"{self.cls.__qualname__}"


def _walked(value: Any, shown: Any, place: _Place, *, is_nested: bool = True) -> Any:
    """Return what is shown of a value, in order and marked."""
    cls = _class_of(value)
    if getattr(cls, "__pydantic_root_model__", False):
        return _member_walked(value, "root", value.root, shown)
    if is_dict(shown):
        return _object_walked(value, shown, place, is_nested=is_nested)
    if is_array(shown) and _is_array(value) and len(value) == len(shown):
        walked = [_walked(item, text, place) for item, text in zip(value, shown, strict=True)]
        return _sorted(walked) if isinstance(value, AbstractSet) else walked
    if cls is float and shown is None:
        return Lost(f"is a float that is not finite, which the dump of {place} writes as null")
    if _is_masked(value, shown):
        return Lost(f"is a {cls.__qualname__}, which the dump of {place} masks")
    return shown


def _is_secret(value: Any) -> bool:
    return hasattr(_class_of(value), "get_secret_value")


def _is_masked(value: Any, shown: Any) -> bool:
    """Whether a mask is all that is shown of a secret; an empty one has none, and a serializer may show it."""
    return _is_secret(value) and isinstance(shown, str) and shown != "" and (MASK in shown or str(value) in shown)


# --- Models, dataclasses and dicts ------------------------------------------------------------------------------------


def _object_walked(value: Any, shown: dict[str, Any], place: _Place, *, is_nested: bool) -> dict[str, Any]:
    if _has_fields(_class_of(value)):
        return _fields_walked(value, shown, place, is_nested=is_nested)
    if not issubclass(_class_of(value), Mapping):
        return shown
    if any(map(_is_masked, value, shown)):
        return dict.fromkeys(shown, Lost(f"is in a dict whose keys the dump of {place} masks"))
    if len(value) == len(shown):
        items = zip(shown.items(), value.values(), strict=True)
        return {key: _walked(item, text, place) for (key, text), item in items}
    if len(set(map(type, value))) > 1:
        return dict.fromkeys(shown, Lost(f"is in a dict of which the dump of {place} makes one key of two"))
    return shown


@lru_cache(maxsize=256)
def _has_fields(cls: Any) -> bool:
    return _is_model(cls) or dataclasses.is_dataclass(cls)


@lru_cache(maxsize=256)
def _aliases_of(cls: Any) -> dict[str, str]:
    """Return the fields of a class, each with the other name under which it may be shown."""
    infos: dict[str, Any] = getattr(cls, "__pydantic_fields__", {})
    names = [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else infos
    return {name: (infos[name].serialization_alias if name in infos else None) or name for name in names}


def _fields_walked(value: Any, shown: dict[str, Any], place: _Place, *, is_nested: bool) -> dict[str, Any]:
    cls = _class_of(value)
    aliases, walked = _aliases_of(cls), dict(shown)
    extra: dict[str, Any] = getattr(value, "__pydantic_extra__", None) or {}
    values: dict[str, Any] = {**vars(value), **extra} if _is_model(cls) else _attributes(value, aliases)
    missing: dict[str, str] = {}
    for name, alias in (*aliases.items(), *zip(extra, extra, strict=True)):
        key = alias if alias in shown else name
        if key not in shown:
            missing[name] = alias
        elif (item := values.get(name, _ABSENT)) is not shown[key]:
            walked[key] = _member_walked(value, name, item, shown[key])
    if missing:
        # Columns of a table may not be loaded, and would ask the database when they are looked at.
        walked |= {
            alias: Lost(f"is {cls.__qualname__}.{name}, which is not loaded")
            for name, alias in missing.items()
            if name not in values and hasattr(cls, name)
        }
        bases = filter(_has_fields, cls.__mro__[1:])
        if is_nested and any(shown.keys() <= _keys_of(base) | extra.keys() for base in bases):
            walked |= _dropped(value, missing, values, place)
    return walked


def _attributes(value: object, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(value, name, _ABSENT) for name in names}


@lru_cache(maxsize=256)
def _keys_of(cls: Any) -> frozenset[str]:
    """Return all names under which a class may show something."""
    decorators = getattr(cls, "__pydantic_decorators__", None)
    computed: dict[str, Any] = decorators.computed_fields if decorators else {}
    aliases = [alias for each in computed.values() if (alias := each.info.alias)]
    return frozenset([*_aliases_of(cls), *_aliases_of(cls).values(), *computed, *aliases])


def _dropped(value: Any, missing: dict[str, str], values: dict[str, Any], place: _Place) -> dict[str, Any]:
    """Return marks for the fields that a class would show, if it were not for the annotation."""
    cls = _class_of(value)
    reason = f"is a field of {cls.__qualname__} that the dump of {place} drops, whose annotation names a base class"
    serializer = getattr(cls, "__pydantic_serializer__", None)
    alone = serializer.to_python(value, mode="json", by_alias=True, warnings=False) if serializer else missing.values()
    dropped = {alias: values.get(name) for name, alias in missing.items() if alias in alone}
    # An expression looks into an array by place, so there is a mark in each.
    return {
        alias: [Lost(reason)] * max(len(item), 1) if _is_array(item) else Lost(reason)
        for alias, item in dropped.items()
    }


# --- One field --------------------------------------------------------------------------------------------------------


def _member_walked(owner: Any, name: str, value: Any, shown: Any) -> Any:
    cls = _class_of(owner)
    if type(value) in _READ_BACK and shown != value and _is_written_like_another(owner, name, value, shown):
        return Lost(f"is changed by the serializer of {_Place(cls, name)}, which writes another value alike")
    if name in _with_serializers(cls) and not _is_secret(value):
        return _sorted(shown) if isinstance(value, AbstractSet) and is_array(shown) else shown
    return _walked(value, shown, _Place(cls, name))


@lru_cache(maxsize=256)
def _with_serializers(cls: Any) -> frozenset[str]:
    """Return the fields that have a serializer of the author's."""
    infos: dict[str, Any] = getattr(cls, "__pydantic_fields__", {})
    decorated: Collection[Any] = cls.__pydantic_decorators__.field_serializers.values() if infos else ()
    names = {name for each in decorated for name in each.info.fields}
    annotated = {name for name, info in infos.items() if any(hasattr(item, "when_used") for item in info.metadata)}
    return frozenset(infos if "*" in names else names | annotated)


def _is_written_like_another(owner: Any, name: str, value: Any, shown: Any) -> bool:
    """Whether what is shown of a value, read back, is another value of which the same is shown."""
    cls = _class_of(owner)
    try:
        other: Any = type(value)(str(shown) if type(shown) is float and type(value) is Decimal else shown)
        is_same = other == value or value != value  # noqa: PLR0124 - NaN is another value than itself
        if is_same or not _is_model(cls):
            return False
        copy = owner.model_copy(update={name: other})
        written = cls.__pydantic_serializer__.to_python(copy, mode="json", include={name}, warnings=False)
    except (TypeError, ValueError, ArithmeticError):
        return False
    return shown in (written.values() if is_dict(written) else [written])


# --- Arrays -----------------------------------------------------------------------------------------------------------


def _is_array(value: object) -> TypeGuard[Collection[Any]]:
    return isinstance(value, list | tuple | deque | AbstractSet)


def _sorted(shown: Collection[Any]) -> list[Any]:
    """Return the members of a set in an order that is the same in every process."""
    kinds = set(map(type, shown))
    if kinds <= {str} or (kinds <= {int, float} and all(number == number for number in shown)):  # noqa: PLR0124 - NaN
        return sorted(shown)
    try:
        return sorted(shown, key=_text)
    except TypeError:  # one is marked, and who looks at another one by its place would get any
        return [Lost("is of a set with members that the dump does not show")] * len(shown)


def _text(item: Any) -> str:
    return json.dumps(item, sort_keys=True)
