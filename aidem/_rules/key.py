"""From a payload to an idempotency key: prepared, selected from, encoded, hashed, prefixed.

    payload ── prepare ──► JSON-like data ── an expression ──► selected ── payload_digest ──► digest ──► prefix#digest

Every step is pure, and together they give the keys of AWS Powertools for Python.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sized
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Final

from aidem._rules.canonical_json import (
    ENCODABLE,
    NotEncodableError,
    dump_model,
    encode,
    explain,
    is_array,
    is_dict,
    plain,
)
from aidem.exceptions import IdempotencyKeyError

if TYPE_CHECKING:
    from collections.abc import Callable

_WAYS_OUT: Final = (
    "select other parts of it with event_key_jmespath or payload_validation_jmespath, or name the call with key="
)
_LEAVES: Final = frozenset({str, int, float, bool})
_JSON_TYPES: Final = frozenset({dict, list, type(None), *_LEAVES})
_NOTHING: Final = (None, "")


def prepare(payload: Any) -> Any:
    """Return the data in a payload: the fields of a dataclass, the dump of a model, the raw event of a wrapper.

    Raises:
        IdempotencyKeyError: The payload could not be turned into data.
    """
    if type(payload) in _JSON_TYPES or isinstance(payload, type):
        return payload
    try:
        if hasattr(payload, "__dataclass_fields__"):
            return dataclasses.asdict(payload)
        if callable(getattr(payload, "model_dump", None)):
            return dump_model(payload)
        if callable(as_dict := getattr(payload, "dict", None)):
            return as_dict()
        return getattr(payload, "raw_event", payload)
    except Exception as error:
        raise _refused(explain(payload, error)) from error


def prepare_each(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments by name, each of them prepared."""
    return {name: prepare(value) for name, value in arguments.items()}


def is_missing(selected: Any) -> bool:
    """Whether a value is no key: None, `""`, or a container of nothing but those at any depth. `0` is a key.

    Raises:
        IdempotencyKeyError: It is circular, too deep, or of a type that cannot be a key.
    """
    try:
        return _is_nothing(selected)
    except Exception as error:
        raise _refused(explain(selected, error)) from error


def _is_nothing(value: Any) -> bool:
    if value is None or type(value) in _LEAVES:  # nearly always, and asking whether something is sized takes long
        return value in _NOTHING
    if is_dict(value):
        return all(map(_is_nothing, value.values()))
    if is_array(value):
        return all(map(_is_nothing, value))
    return len(value) == 0 if isinstance(value, Sized) else _is_nothing(plain(value))


def payload_digest(selected: Any, hash_function: str) -> str:
    """Return the lower-case hex digest of the canonical text of a value.

    Raises:
        IdempotencyKeyError: The value cannot be encoded; the message names the path to the fault.
    """
    try:
        text = encode(selected)
    except NotEncodableError as error:
        raise _refused(error) from error
    digest: str = hash_constructor(hash_function)(text.encode(), usedforsecurity=False).hexdigest()
    return digest


def _refused(error: NotEncodableError) -> IdempotencyKeyError:
    return IdempotencyKeyError(f"the payload cannot be a key: {error}; allowed are {ENCODABLE}; {_WAYS_OUT}")


@cache
def hash_constructor(hash_function: str) -> Callable[..., Any]:
    """Return what makes a hash."""
    if hash_function in hashlib.algorithms_guaranteed:  # their own constructors are the faster ones
        constructor: Callable[..., Any] = getattr(hashlib, hash_function)
        return constructor
    return partial(hashlib.new, hash_function)


def check_hash_function(name: str) -> None:
    """Check that a hash function exists and has digests of one length.

    Raises:
        ValueError: It does not, or they are not; the message names what it must be.
    """
    try:
        digest_size = hashlib.new(name, usedforsecurity=False).digest_size
    except (TypeError, ValueError):
        digest_size = 0
    if digest_size == 0:
        allowed = ", ".join(sorted(known for known in hashlib.algorithms_guaranteed if not known.startswith("shake_")))
        raise ValueError(f"a hash of fixed length in hashlib, such as {allowed}")


def default_prefix(lambda_function_name: str | None, module: str, qualname: str) -> str:
    """Return the prefix of a function's keys, where none was chosen."""
    return f"{lambda_function_name or 'test-func'}.{module}.{qualname}"


def idempotency_key(prefix: str, digest: str) -> str:
    """Return the key under which records are stored."""
    return f"{prefix}#{digest}"


def derived_key(key: str, name: str) -> str:
    """Return the key for a downstream service that an idempotency key and a name make."""
    return hashlib.sha256(f"{key}#{name}".encode()).hexdigest()


def key_of(selected: Any, *, prefix: str, hash_function: str) -> str:
    """Return the key under which the record of a value is stored.

    Raises:
        IdempotencyKeyError: The value cannot be encoded.
    """
    return idempotency_key(prefix, payload_digest(selected, hash_function))
