"""Results and exceptions as JSON text, and back.

A serializer turns a result into JSON data, and rebuilds it for a replay. The text is written by the encoder that also
writes keys. Without a serializer a replay returns plain JSON data.
"""

from __future__ import annotations

import dataclasses
import logging
from types import GetSetDescriptorType, MemberDescriptorType
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from aidem._rules.canonical_json import ENCODABLE, NotEncodableError, decode, encode, loaded
from aidem.exceptions import (
    IdempotencyModelTypeError,
    IdempotencyNoSerializationModelError,
    IdempotencySerializationError,
    IdempotencyUsageError,
)
from aidem.serialization._annotations import name_of, parts, return_annotation
from aidem.serialization._dataclasses import AnnotationSerializer, DataclassSerializer
from aidem.serialization._losses import are_equal, lost
from aidem.serialization._pydantic import PydanticSerializer, is_pydantic
from aidem.serialization._rebuilders import lenient_rebuilder, names_more_than_json

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "CustomDictSerializer",
    "DataclassSerializer",
    "ModelSerializer",
    "NoOpSerializer",
    "OutputSerializer",
    "PydanticSerializer",
]

logger = logging.getLogger("aidem")

UNAVAILABLE_TEXT: Final = "aidem:unavailable"
_EXCEPTION_PREFIX: Final = "aidem:exception:"
_NONE_TEXT: Final = "null"
_BY_ANNOTATION: Final = (PydanticSerializer, AnnotationSerializer)  # not `… | …`, which is made anew for each result


class OutputSerializer(Protocol):
    """Turns results into JSON data and back. Neither method is called for None."""

    def to_dict(self, data: Any) -> Any:
        """Return the JSON data of a result: a dict or any other JSON value."""
        ...

    def from_dict(self, data: Any) -> Any:
        """Return the result for JSON data."""
        ...


class ModelSerializer(OutputSerializer, Protocol):
    """A serializer whose class can be passed as `output_serializer`, to be made for the return annotation."""

    @classmethod
    def instantiate(cls, model_type: Any) -> OutputSerializer:
        """Make a serializer for a return annotation; None: the function has none."""
        ...


class NoOpSerializer:
    """Does not convert results: a replay returns plain JSON data."""

    def to_dict(self, data: Any) -> Any:
        """Return the result unchanged."""
        return data

    def from_dict(self, data: Any) -> Any:
        """Return the data unchanged."""
        return data


class CustomDictSerializer:
    """Converts results by two functions.

    Args:
        to_dict: Returns the JSON data of a result.
        from_dict: Returns the result for JSON data.
    """

    def __init__(self, to_dict: Callable[[Any], Any], from_dict: Callable[[Any], Any]) -> None:
        self._to_dict = to_dict
        self._from_dict = from_dict

    def to_dict(self, data: Any) -> Any:
        """Return the JSON data of a result, by the first function."""
        return self._to_dict(data)

    def from_dict(self, data: Any) -> Any:
        """Return the result for JSON data, by the second function."""
        return self._from_dict(data)


def resolve(
    output_serializer: OutputSerializer | type[ModelSerializer] | None, function: Callable[..., Any] | None
) -> OutputSerializer:
    """Return the serializer for the results of a function. To be called at its first call, when all names are defined.

    Args:
        output_serializer: A serializer, or a class that makes one for the return annotation; None: chosen by the return
            annotation.
        function: The function, method, partial or callable object; None: there is no return annotation.

    Raises:
        IdempotencyModelTypeError: The return annotation does not suit the serializer.
        IdempotencyNoSerializationModelError: The class needs a return annotation, and it is missing or cannot be
            resolved.
        IdempotencyUsageError: The class has no `instantiate`, or the function returns a response of Starlette or
            FastAPI.
    """
    if output_serializer is None:
        return _deduced(function)
    if not isinstance(output_serializer, type):
        return output_serializer
    if not hasattr(output_serializer, "instantiate"):
        name = output_serializer.__qualname__
        raise IdempotencyUsageError(f"output_serializer: {name} has no instantiate(); pass an instance, {name}(...)")
    try:
        annotation = return_annotation(function)
    except Exception as error:
        raise IdempotencyNoSerializationModelError(
            f"the return annotation of the function cannot be resolved: {error}; "
            f"import at run time what it names, or pass {output_serializer.__qualname__}(Model)"
        ) from error
    return output_serializer.instantiate(annotation)


def _deduced(function: Callable[..., Any] | None) -> OutputSerializer:
    try:
        annotation = return_annotation(function)
    except Exception as error:  # noqa: BLE001 - evaluating an annotation can raise anything
        _warn_once(
            name_of(function),
            f"cannot be resolved: {error}; callers get plain JSON data unless you import at run time what it names, or "
            "pass an output_serializer",
        )
        return NoOpSerializer()
    if annotation is None:
        return NoOpSerializer()
    _refuse_response(annotation, function)
    classes = list(parts(annotation))
    if any(map(is_pydantic, classes)):
        return PydanticSerializer(annotation)
    if any(map(dataclasses.is_dataclass, classes)):
        return DataclassSerializer(annotation)
    try:
        rebuild = lenient_rebuilder(annotation)
    except IdempotencyModelTypeError as error:
        if names_more_than_json(annotation):
            _warn_once(
                name_of(function),
                f"does not say how results are rebuilt: {error}; callers get plain JSON data unless you pass an "
                "output_serializer",
            )
        return NoOpSerializer()
    return NoOpSerializer() if rebuild is None else AnnotationSerializer(annotation, rebuild)


_warned: Final[set[str]] = set()


def _warn_once(name: str, what: str) -> None:
    """Log that the results of a function will not be of the type of its return annotation."""
    if name not in _warned:
        _warned.add(name)
        logger.warning("the return annotation of %s %s", name, what)


def check_returns(function: Callable[..., Any]) -> None:
    """Check the return annotation of a function, if it can be resolved before the first call.

    Raises:
        IdempotencyUsageError: The function returns a response of Starlette or FastAPI.
    """
    try:
        annotation = return_annotation(function)
    except Exception:  # noqa: BLE001 - names that are defined further down are there at the first call
        return
    _refuse_response(annotation, function)


def _refuse_response(annotation: Any, function: Any) -> None:
    response = loaded("starlette.responses", "Response")
    for part in parts(annotation):
        if isinstance(part, type) and issubclass(part, response):
            raise IdempotencyUsageError(
                f"{name_of(function)} returns a {part.__qualname__}, and HTTP responses cannot be replayed from JSON; "
                "return the data that it is made of, let aidem.fastapi.IdempotentRoute or "
                "aidem.asgi.IdempotencyMiddleware keep whole responses, or pass an output_serializer"
            )


def round_trip(result: Any, serializer: OutputSerializer) -> tuple[str, Any]:
    """Return the stored text of a result, and the result that a replay will return.

    Raises:
        IdempotencySerializationError: The result cannot be stored.
        Exception: A signal handler raised it meanwhile.
    """
    text = result_text(result, serializer)
    replayed = result_from_text(text, serializer)
    if isinstance(serializer, _BY_ANNOTATION):
        path = lost(result, replayed, serializer.declared)
        if path is not None and not are_equal(
            result, decode(text)
        ):  # a result that is JSON: only validation changed it
            raise IdempotencySerializationError(
                f"the result cannot be stored: {path} would be changed or lost in a replay; "
                "leave it out of the result, or pass an output_serializer that keeps it"
            )
    return text, replayed


def result_text(result: Any, serializer: OutputSerializer) -> str:
    """Return the stored text of a result.

    Raises:
        IdempotencySerializationError: The result cannot be stored.
        Exception: A signal handler raised it meanwhile.
    """
    if result is None:
        return _NONE_TEXT
    try:
        return encode(serializer.to_dict(result))
    except IdempotencySerializationError:
        raise
    except NotEncodableError as error:
        raise IdempotencySerializationError(
            f"the result cannot be stored: {error}; allowed are {ENCODABLE}, or pass an output_serializer"
        ) from error
    except Exception as error:
        if not _fails(lambda: encode(serializer.to_dict(result))):
            raise error.__cause__ or error  # noqa: B904 - pydantic wraps what is raised in a serializer of a field
        raise _failed(serializer, "to_dict", error) from error


def result_from_text(text: str, serializer: OutputSerializer) -> Any:
    """Return the result for a stored text; every call returns a new object.

    Raises:
        IdempotencySerializationError: The text is not JSON, or the result cannot be rebuilt.
        Exception: A signal handler raised it meanwhile.
    """
    if text == _NONE_TEXT:
        return None
    try:
        data = decode(text)
    except (ValueError, RecursionError) as error:
        raise IdempotencySerializationError(f"the stored result is not JSON: {type(error).__name__}") from error
    try:
        return serializer.from_dict(data)
    except IdempotencySerializationError:
        raise
    except Exception as error:
        if not _fails(lambda: serializer.from_dict(data)):
            raise
        raise _failed(serializer, "from_dict", error) from error


def _fails(action: Callable[[], object]) -> bool:
    """Whether an action fails again; if it does not, its first exception came from a signal handler."""
    try:
        action()
    except Exception:  # noqa: BLE001 - a serializer can raise anything
        return True
    return False


def _failed(serializer: OutputSerializer, method: str, error: Exception) -> IdempotencySerializationError:
    return IdempotencySerializationError(f"{type(serializer).__qualname__}.{method}() raised {type(error).__name__}")


def exception_text(error: Exception) -> str:
    """Return the stored text of an exception: the name of its type, and its arguments.

    Raises:
        IdempotencySerializationError: The arguments are not JSON values, or do not rebuild an equal exception.
    """
    name = _type_name(type(error))
    try:
        made_by, args, *_ = cast("tuple[Any, ...]", error.__reduce__())  # an OSError's has the file, its args have not
        args = args if made_by is type(error) else error.args
        text = _EXCEPTION_PREFIX + encode({"args": args, "type": name})
        rebuilt = exception_from_text(text, (type(error),))
        same = _facts(rebuilt) == _facts(error)
    except Exception as fault:
        raise IdempotencySerializationError(
            f"an exception of type {name} cannot be stored: {type(fault).__name__}; "
            "give it arguments that are JSON values, and from which it can be rebuilt"
        ) from fault
    if not same:
        raise IdempotencySerializationError(
            f"an exception of type {name} cannot be stored: rebuilt from its arguments, it is not equal; "
            "pass all its data to Exception.__init__, as JSON values"
        )
    return text


def exception_from_text(text: str, allowed: tuple[type[Exception], ...]) -> Exception:
    """Return the exception for a stored text; only types in `allowed` are rebuilt.

    Raises:
        IdempotencySerializationError: It has another type, or cannot be rebuilt.
    """
    try:
        return _exception_from_text(text, allowed)
    except IdempotencySerializationError:
        raise
    except Exception as error:
        if not _fails(lambda: _exception_from_text(text, allowed)):
            raise
        raise IdempotencySerializationError(
            f"the stored exception cannot be rebuilt: {type(error).__name__}"
        ) from error


def _exception_from_text(text: str, allowed: tuple[type[Exception], ...]) -> Exception:
    stored = decode(text.removeprefix(_EXCEPTION_PREFIX))
    name, args = stored["type"], stored["args"]
    for cls in allowed:
        if _type_name(cls) == name:
            return cls(*args)
    raise IdempotencySerializationError(f"the stored exception is of type {name}; list it in stored_exceptions")


def _type_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _facts(error: Exception) -> tuple[Any, ...]:
    """Return all data of an exception: text, arguments, attributes, slots, and the fields of types written in C."""
    attributes = {name: value for name, value in vars(error).items() if name != "__notes__"}
    for cls in type(error).__mro__:
        for name, member in vars(cls).items():
            if isinstance(member, MemberDescriptorType | GetSetDescriptorType) and not name.startswith("__"):
                attributes[name] = getattr(error, name, None)
    # By their repr, or True would pass for 1, and the member of a StrEnum for its text.
    return type(error), str(error), repr(error.args), attributes
