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

from aidem._json import ENCODABLE, NotEncodableError, encode, explain, is_array, is_dict
from aidem.exceptions import IdempotencyKeyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_JSON_TYPES: Final = frozenset({dict, list, str, int, float, bool, type(None)})


def prepare(payload: Any) -> Any:
    """Return the data in a payload: the fields of a dataclass, the dump of a model, the raw event of a wrapper.

    Raises:
        IdempotencyKeyError: The payload could not be turned into data.
    """
    if type(payload) in _JSON_TYPES or isinstance(payload, type):
        return payload
    try:
        return _prepared(payload)
    except Exception as error:
        raise _refused(explain(payload, error)) from error


def _prepared(payload: Any) -> Any:
    if hasattr(payload, "__dataclass_fields__"):
        return dataclasses.asdict(payload)
    if callable(model_dump := getattr(payload, "model_dump", None)):
        return model_dump(mode="json")
    if callable(as_dict := getattr(payload, "dict", None)):
        return as_dict()
    return getattr(payload, "raw_event", payload)


def is_missing(selected: Any) -> bool:
    """Whether a value is no key: None, empty, or a container of nothing but None. `0` and `False` are keys."""
    if is_dict(selected):
        values: Iterable[Any] = selected.values()
    elif is_array(selected):
        values = selected
    else:
        return selected is None or (isinstance(selected, Sized) and len(selected) == 0)
    for value in values:  # noqa: SIM110 - nearly always the first one decides, before `all` would have begun
        if value is not None:
            return False
    return True


def payload_digest(selected: Any, hash_function: str) -> str:
    """Return the digest of the canonical text of a value.

    Raises:
        IdempotencyKeyError: The value cannot be encoded; the message names the path to the fault.
    """
    try:
        text = encode(selected)
    except NotEncodableError as error:
        raise _refused(error) from error
    return hash_text(text, hash_function)


def _refused(error: NotEncodableError) -> IdempotencyKeyError:
    return IdempotencyKeyError(f"the payload cannot be a key: {error}; allowed are {ENCODABLE}")


def hash_text(text: str, hash_function: str) -> str:
    """Return the lower-case hex digest of a text in UTF-8."""
    digest: str = hash_constructor(hash_function)(text.encode(), usedforsecurity=False).hexdigest()
    return digest


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
