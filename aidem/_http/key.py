"""The value of an `Idempotency-Key` header: what it names, and what is refused.

The header is a structured-field string, as RFC 8941 (section 3.3.3) writes it: `"8e03978e"`. Many clients send the bare
value instead, so that is understood as well, unless the layer is strict. Both forms of a value name the same key.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_KEY_CHARACTERS: Final = 255

_QUOTED: Final = re.compile(rb'"([ !#-\[\]-~]*(?:\\["\\][ !#-\[\]-~]*)*)"')
_BARE: Final = re.compile(rb"[!#-+\--:<-~]+")  # visible ASCII without `"`, `,` and `;`
_ESCAPED: Final = re.compile(rb"\\(.)")


class MalformedKeyError(ValueError):
    """The header cannot name a key; the message says why, and does not show the value."""


def parse_key(values: Sequence[bytes], *, strict: bool) -> str:
    """Return the key that the values of the header name.

    Args:
        values: The value of every header line of that name, at least one.
        strict: Whether only a structured-field string is understood.

    Raises:
        MalformedKeyError: They name no key.
    """
    if len(values) > 1:
        raise MalformedKeyError("the header was sent more than once")
    key = _unquoted(values[0].strip(b" \t"), strict=strict)
    if not key:
        raise MalformedKeyError("the key is empty")
    if len(key) > MAX_KEY_CHARACTERS:
        raise MalformedKeyError(f"the key is longer than {MAX_KEY_CHARACTERS} characters")
    return key


def _unquoted(value: bytes, *, strict: bool) -> str:
    if quoted := _QUOTED.fullmatch(value):
        text = quoted[1]
        return (_ESCAPED.sub(rb"\1", text) if b"\\" in text else text).decode("ascii")
    if not value:
        return ""
    if strict:
        raise MalformedKeyError('the value is no structured-field string; quote it: "..."')
    if not _BARE.fullmatch(value):
        raise MalformedKeyError("the value is neither one quoted string nor visible ASCII characters without , and ;")
    return value.decode("ascii")
