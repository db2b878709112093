"""The parts of a result that a replay would not return, found by comparing the result with the rebuilt one.

Parts that a class itself keeps out of its dump are not lost: excluded and computed fields, private attributes, cached
properties. Neither are a conversion that the annotation asks for, and the JSON form of a value that it does not name.

`aidem._rules.model_dump` also walks a value beside another one, but not the same two: a model and its JSON dump, whose
fields have aliases and whose keys are texts in the same order. It returns the dump with marks in it; here the path to
the first loss is returned. Only the few lines about arrays are alike, so the two walks share no code.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Collection
from collections.abc import Set as AbstractSet
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeGuard, cast

from aidem._rules.canonical_json import NotEncodableError, encode, is_array, is_dict, loaded
from aidem.exceptions import IdempotencyModelTypeError
from aidem.serialization._annotations import declared_by, hints
from aidem.serialization._pydantic import is_pydantic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_SCALARS: Final = frozenset({str, int, float, bool, types.NoneType})
_MISSING: Final = object()
_IDENTITY: Final[Any] = object.__eq__
# What comparing two objects may raise where one is not made for it, such as an array of numpy.
_NOT_COMPARED: Final = (TypeError, ValueError, AttributeError, ArithmeticError, LookupError)


class _Named(NamedTuple):
    """What an annotation says of a value.

    Attributes:
        classes: The classes that it names.
        is_filter: Whether a subclass of one of these is to lose what it adds, as under the annotation of a function.
    """

    classes: frozenset[type] = frozenset()
    is_filter: bool = False


_NOTHING: Final = _Named()


def lost(original: object, rebuilt: object, declared: frozenset[type]) -> str | None:
    """Return the path to the first part of a result that does not come back, such as `$.lines[0].price`.

    Args:
        original: What the function returned.
        rebuilt: What a replay will return.
        declared: The classes that the return annotation names: an instance of one must come back as an instance of it.

    Returns:
        None where nothing is lost.
    """
    try:
        path = _lost(original, rebuilt, _Named(declared, is_filter=True))
    except RecursionError:
        path = ""  # nested too deeply to be compared
    return None if path is None else f"${path}"


def _lost(original: object, rebuilt: object, named: _Named) -> str | None:
    cls = type(original)
    if cls is not type(rebuilt):
        if any(isinstance(original, declared) and not isinstance(rebuilt, declared) for declared in named.classes):
            return ""
    elif _is_single(cls):
        return None if _is_same(original, rebuilt) else ""
    fields = _fields_of(type(rebuilt))
    if fields is not None:
        return _lost_of_fields(original, rebuilt, fields, named)
    if is_pydantic(cls):  # the annotation does not name it, and its own dump came back, which the encoder would judge
        return "" if _text(original) is None else None
    return _lost_of_items(original, rebuilt, named)


def _lost_of_items(original: object, rebuilt: object, named: _Named) -> str | None:
    if is_dict(original) and is_dict(rebuilt):
        return _lost_of_dict(original, rebuilt, named)
    if not (is_array(original) and is_array(rebuilt)):
        return None if _is_same(original, rebuilt) else ""
    if len(original) != len(rebuilt):
        return ""
    for index, (item, twin) in enumerate(zip(original, rebuilt, strict=True)):
        if (path := _lost(item, twin, named)) is not None:
            return f"[{index}]{path}"
    return None


def _lost_of_dict(original: dict[Any, Any], rebuilt: dict[Any, Any], named: _Named) -> str | None:
    if len(original) != len(rebuilt):
        return ""
    keys: dict[str | None, Any] | None = None
    for key, value in original.items():
        twin = key
        if type(key) is not str or key not in rebuilt:
            keys = keys or {_text(key): key for key in rebuilt}
            twin = keys.get(_text(key), _MISSING)
            if twin is _MISSING or _lost(key, twin, named) is not None:
                return f".{key}"
        if (path := _lost(value, rebuilt[twin], named)) is not None:
            return f".{key}{path}"
    return None


def _is_same(original: object, rebuilt: object) -> bool:
    equal = are_equal(original, rebuilt)
    if equal:
        return True
    cls = type(original)
    if cls is type(rebuilt) and (equal is None or cls.__eq__ is _IDENTITY):  # nothing can be said about them
        return True
    if hasattr(rebuilt, "__next__"):  # pydantic's form of an Iterable, which a look would consume
        return True
    if _is_set(original) and (_is_set(rebuilt) or is_array(rebuilt)):
        return set(map(_text, original)) == set(map(_text, rebuilt)) - {None}
    text = _text(original)
    return (text is not None and text == _text(rebuilt)) or are_equal(_in_json(original), rebuilt) is True


def _is_set(value: object) -> TypeGuard[AbstractSet[Any]]:
    return isinstance(value, AbstractSet)


def are_equal(original: object, rebuilt: object) -> bool | None:
    """Whether two values are equal; None: they cannot be compared."""
    try:
        return bool(original == rebuilt)
    except _NOT_COMPARED:
        return None


def _text(value: object) -> str | None:
    """Return the JSON text of a value, the same for a number and its text; None: it has none."""
    try:
        return encode(value).strip('"')
    except NotEncodableError:
        return None


def _in_json(value: object) -> Any:
    """Return what pydantic writes for a single value whose field names no type."""
    if hasattr(value, "get_secret_value") or isinstance(value, Collection) is not isinstance(value, bytes):
        return _MISSING
    try:
        return loaded("pydantic_core", "to_jsonable_python")(value)
    except _NOT_COMPARED:  # it has nothing to write, or pydantic is not in use: `()` is called
        return _MISSING


def _find_out_if_single(cls: type) -> bool:
    return not (is_pydantic(cls) or dataclasses.is_dataclass(cls) or issubclass(cls, dict | list | tuple))


# --- Models and dataclasses -------------------------------------------------------------------------------------------


class _Fields(NamedTuple):
    """The fields of a model or a dataclass.

    Attributes:
        named: What the annotation of each field says.
        by_alias: The names of fields by the other names that they have in data.
        left_out: Fields that its dump does not contain.
        outside: Fields that its instances do not keep in their `__dict__`: in slots, or as an attribute of the class.
    """

    named: dict[str, _Named]
    by_alias: dict[str, str]
    left_out: frozenset[str]
    outside: tuple[str, ...]


def _find_fields(cls: type) -> _Fields | None:
    if is_pydantic(cls):
        fields: dict[str, Any] = vars(cls).get("__pydantic_fields__", {})  # BaseModel itself has none
        return _Fields(
            {name: _Named(declared_by(field.annotation)) for name, field in fields.items()},
            {
                alias: name
                for name, field in fields.items()
                for alias in (field.alias, *getattr(field.validation_alias, "choices", [field.validation_alias]))
                if isinstance(alias, str)  # a path into the data is no name
            },
            frozenset(name for name, field in fields.items() if field.exclude or getattr(field, "exclude_if", None)),
            _outside(cls, fields),
        )
    if not dataclasses.is_dataclass(cls):
        return None
    try:
        annotations = hints(cls)
    except IdempotencyModelTypeError:  # of a class inside a function, which pydantic has resolved
        annotations = dict.fromkeys((field.name for field in dataclasses.fields(cls)), Any)
    named = {name: _Named(declared_by(annotation)) for name, annotation in annotations.items()}
    return _Fields(named, {}, frozenset(), _outside(cls, named))


def _outside(cls: type, names: dict[str, Any]) -> tuple[str, ...]:
    dataclass_fields: dict[str, Any] = getattr(cls, "__dataclass_fields__", {})
    on_class = {name for name, field in dataclass_fields.items() if not field.init and hasattr(cls, name)}
    is_slot = types.MemberDescriptorType
    return tuple(name for name in names if name in on_class or isinstance(getattr(cls, name, None), is_slot))


# Not as decorators: mypy then takes a class for unhashable.
_is_single: Final[Callable[[type], bool]] = lru_cache(maxsize=1024)(_find_out_if_single)
_fields_of: Final[Callable[[type], _Fields | None]] = lru_cache(maxsize=1024)(_find_fields)


def _lost_of_fields(original: object, rebuilt: object, fields: _Fields, named: _Named) -> str | None:
    cls = type(original)
    if is_dict(original):  # it became a model or a dataclass by its annotation
        items = ((fields.by_alias.get(key, key), value) for key, value in original.items() if not _is_json(value))
        return _lost_of_items_in_fields(items, rebuilt, fields)
    own = fields if cls is type(rebuilt) else _fields_of(cls)
    if own is None:  # validation has made a model of what is none, such as a row of SQLAlchemy
        if not hasattr(original, "__dict__"):
            return None if cls in _SCALARS else ""
        given = vars(original)
        # Columns that are not loaded, and properties; for other fields a default is all there is.
        unloaded = [name for name in fields.named if name not in given and hasattr(cls, name)]
        return _lost_of_items_in_fields(given.items(), rebuilt, fields) or (f".{unloaded[0]}" if unloaded else None)
    # A base without fields names nothing that could be kept: it is no filter.
    is_filtered = named.is_filter and cls is not type(rebuilt) and bool(fields.named)
    ours, theirs = _attributes(original, own), _attributes(rebuilt, fields)
    for name, value in ours.items():
        twin = theirs.get(name, _MISSING)
        if twin is value or (type(value) in _SCALARS and type(twin) is type(value) and twin == value):
            continue
        field = fields.named.get(name)
        if field is None and (is_filtered or _is_no_data(cls, name, value)):
            continue
        path = "" if twin is _MISSING else _lost(value, twin, field or _NOTHING)
        if path is not None and name not in fields.left_out and name not in own.left_out:
            return f".{name}{path}"
    new = () if theirs.keys() <= ours.keys() else (fields.named.keys() & theirs.keys()) - ours.keys() - fields.left_out
    return f".{min(new)}" if new else None  # of a row of SQLModel, say, that has expired


def _lost_of_items_in_fields(items: Iterable[tuple[str | None, Any]], rebuilt: object, fields: _Fields) -> str | None:
    """Compare the fields of a model with what they were made of."""
    theirs = _attributes(rebuilt, fields)
    for name, value in items:
        if name in fields.named and (path := _lost(value, theirs[name], fields.named[name])) is not None:
            return f".{name}{path}"
    return None


def _is_json(value: object) -> bool:
    """Whether a value is its own JSON form: then only validation can have changed what came back of it."""
    return all(map(_is_json, cast("list[object]", value))) if type(value) is list else type(value) in _SCALARS


def _attributes(value: object, fields: _Fields) -> dict[str, Any]:
    attributes: dict[str, Any] = getattr(value, "__dict__", {})
    if fields.outside:
        attributes = attributes | {name: getattr(value, name) for name in fields.outside}
    extra: dict[str, Any] | None = getattr(value, "__pydantic_extra__", None)
    return attributes | extra if extra else attributes


def _is_no_data(cls: type, name: str, value: object) -> bool:
    """Whether an attribute that is no field is none that could be missed."""
    return name.startswith("_") or value is None or value == [] or isinstance(getattr(cls, name, None), cached_property)
