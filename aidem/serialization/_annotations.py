"""Reading type annotations: what a function returns, what a class holds."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from aidem.exceptions import IdempotencyModelTypeError, IdempotencyNoSerializationModelError

if TYPE_CHECKING:
    from collections.abc import Iterator


def return_annotation(function: Any) -> Any:
    """Return the resolved return annotation; None: there is none. Annotations of parameters are not looked at."""
    function = _underlying(function)
    annotations = getattr(function, "__annotations__", {})
    if "return" not in annotations:
        return None
    source = inspect.unwrap(function)
    # What it sees beside its module: type parameters, and names of the function around it.
    names = {parameter.__name__: parameter for parameter in getattr(source, "__type_params__", ())}
    for name, cell in zip(source.__code__.co_freevars, source.__closure__ or (), strict=True):
        with suppress(ValueError):  # a name that is not bound yet
            names[name] = cell.cell_contents
    holder = types.SimpleNamespace(__annotations__={"return": annotations["return"]})
    return typing.get_type_hints(holder, source.__globals__, names, include_extras=True)["return"]


def required(model_type: Any, *, by: type) -> Any:
    """Return the return annotation that a serializer takes its model from.

    Raises:
        IdempotencyNoSerializationModelError: The function has none.
    """
    if model_type is None:
        raise IdempotencyNoSerializationModelError(
            f"{by.__name__} takes its model from the return annotation, and the function has none; "
            f"annotate it, or pass {by.__name__}(Model)"
        )
    return model_type


def name_of(function: Any) -> str:
    """Return module and qualified name of the plain function behind a callable that has a return annotation."""
    function = _underlying(function)
    return f"{function.__module__}.{function.__qualname__}"


def _underlying(function: Any) -> Any:
    """Return the plain function in a partial, a method, a classmethod or a callable object."""
    while not inspect.isfunction(function):
        if isinstance(function, functools.partial):
            function = function.func
        elif hasattr(function, "__func__"):
            function = function.__func__
        elif hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        elif inspect.isfunction(call := type(function).__call__):
            return call
        else:
            return None
    return function


def parts(annotation: Any, *, within: tuple[Any, ...] = ()) -> Iterator[Any]:
    """Yield every class that an annotation consists of, without looking into the fields of classes."""
    if any(annotation is outer for outer in within):  # an alias that contains itself
        return
    bared = bare(annotation)
    yield typing.get_origin(bared) or bared
    for argument in typing.get_args(bared):
        yield from parts(argument, within=(*within, annotation))


def declared_by(annotation: Any) -> frozenset[type]:
    """Return the classes that an annotation names and that an instance can be asked for."""
    declared = set[type]()
    for part in parts(annotation):
        if isinstance(part, type):
            with suppress(TypeError):  # Any, a TypedDict, a protocol
                isinstance(None, part)
                declared.add(part)
    return frozenset(declared)


def bare(annotation: Any) -> Any:
    """Return what is behind Annotated, NewType and type aliases."""
    if typing.get_origin(annotation) is typing.Annotated:
        return bare(annotation.__origin__)
    if annotation is None:
        return types.NoneType
    behind = getattr(annotation, "__supertype__", None) or getattr(annotation, "__value__", None)
    return annotation if behind is None or isinstance(annotation, type) else bare(behind)


def hints(cls: Any) -> dict[str, Any]:
    """Return the resolved annotations of the fields of a class."""
    try:
        resolved = typing.get_type_hints(cls)
    except Exception as error:
        raise IdempotencyModelTypeError(
            f"the annotations of {cls.__qualname__} cannot be resolved: {error}; import at run time what they name"
        ) from error
    if dataclasses.is_dataclass(cls):
        return {field.name: resolved[field.name] for field in dataclasses.fields(cls)}
    return resolved


def filled_in(hint: Any, chosen: dict[Any, Any]) -> Any:
    """Put the arguments of a generic class in the place of its type variables."""
    if isinstance(hint, TypeVar):
        return chosen.get(hint, hint)
    parameters: tuple[Any, ...] = getattr(hint, "__parameters__", ())
    if not parameters or isinstance(hint, type):
        return hint
    return hint[tuple(chosen.get(parameter, parameter) for parameter in parameters)]
