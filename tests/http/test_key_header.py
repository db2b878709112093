"""What an `Idempotency-Key` header names, and what is refused."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aidem._http.answers import MAX_KEY_CHARACTERS, RefusedError
from aidem._http.request import parse_key

PRINTABLE = "".join(map(chr, range(0x20, 0x7F)))
KEYS = st.text(alphabet=PRINTABLE, min_size=1, max_size=MAX_KEY_CHARACTERS)
BARE_KEYS = st.text(alphabet=sorted(set(PRINTABLE) - set(' ",;')), min_size=1, max_size=MAX_KEY_CHARACTERS)
LIKELY_BYTES = st.lists(st.sampled_from([b'"', b"\\", b",", b";", b" ", b"\t", b"a", b"=", b"\0", b"\n", b"\xe9"]))


def quoted(key: str) -> bytes:
    return b'"%s"' % re.sub(r'(["\\])', r"\\\1", key).encode("ascii")


def parsed(*values: bytes, strict: bool = False) -> str:
    return parse_key(values, strict=strict)


def test_a_quoted_string_names_what_is_between_the_quotes() -> None:
    assert parsed(b'"8e03978e-40d5-43dd-bc93-6894a57f9324"') == "8e03978e-40d5-43dd-bc93-6894a57f9324"


def test_a_quoted_string_may_hold_escapes_spaces_commas_and_semicolons() -> None:
    assert parsed(rb'"a \"b\", c;d\\e"') == r'a "b", c;d\e'


@pytest.mark.parametrize("value", [b"order-7/a:b", b"a=b", b"a\\b", b"~!#$%&'()*+-./:<=>?@[]^_`{|}"])
def test_a_bare_value_names_itself(value: bytes) -> None:
    assert parsed(value) == value.decode()


def test_both_forms_name_the_same_key() -> None:
    assert parsed(b"order-7") == parsed(b'"order-7"')
    assert parsed(b"a\\b") == parsed(rb'"a\\b"')


def test_white_space_around_the_value_does_not_count() -> None:
    assert parsed(b' \t"k" \t') == parsed(b" k\t") == "k"


@pytest.mark.parametrize("value", [b"", b'""', b"  ", b"\t"])
def test_an_empty_key_is_refused(value: bytes) -> None:
    with pytest.raises(RefusedError, match="empty"):
        parsed(value)


def test_a_key_of_255_characters_is_the_longest_after_unquoting() -> None:
    assert parsed(quoted('"' * 255)) == '"' * 255
    for value in (b"k" * 256, quoted("k" * 256)):
        with pytest.raises(RefusedError, match="longer than 255"):
            parsed(value)


@pytest.mark.parametrize(
    "value",
    [
        b'"a";p=1',  # parameters
        b'"a" ;p',
        b'"a", "b"',  # several values
        b"a,b",
        b"a;b",
        b'"a',  # not closed
        b'a"',
        b'a"b',
        b'"a"b',
        b'"a\\b"',  # no such escape
        b'"a\\"',
        b'"a\tb"',  # control characters
        b'"a\0b"',
        b'"a\x7f"',
        b'"a\nb"',
        b"a b",
        b"a\x7f",
        b"\xc3\xa9",  # not ASCII
        b'"\xe9"',
    ],
)
def test_what_is_neither_one_string_nor_one_bare_value_is_refused(value: bytes) -> None:
    with pytest.raises(RefusedError):
        parsed(value)


def test_two_header_lines_are_refused_though_they_are_equal() -> None:
    with pytest.raises(RefusedError, match="more than once"):
        parsed(b'"k"', b'"k"')


def test_strictly_a_bare_value_is_refused_and_a_quoted_one_is_not() -> None:
    assert parsed(b'"k"', strict=True) == "k"
    with pytest.raises(RefusedError, match="quote it"):
        parsed(b"k", strict=True)


def test_the_reason_does_not_show_the_value() -> None:
    for values in ([b"secret,"], [b"secret" * 100], [b'"secret']):
        with pytest.raises(RefusedError) as caught:
            parsed(*values)
        assert "secret" not in str(caught.value)


@given(key=KEYS, strict=st.booleans())
def test_every_legal_string_comes_back_from_its_quoted_form(key: str, strict: bool) -> None:
    assert parsed(quoted(key), strict=strict) == key


@given(key=BARE_KEYS)
def test_every_bare_value_is_the_same_key_as_its_quoted_form(key: str) -> None:
    assert parsed(key.encode()) == parsed(quoted(key)) == key


@given(value=st.binary(max_size=300) | LIKELY_BYTES.map(b"".join), strict=st.booleans())
@example(value=b'"a"', strict=True)
def test_garbage_is_refused_or_is_one_of_the_two_forms_of_its_key(value: bytes, strict: bool) -> None:
    try:
        key = parsed(value, strict=strict)
    except RefusedError:
        return
    forms = {quoted(key)} if strict else {quoted(key), key.encode()}
    assert value.strip(b" \t") in forms  # so no two keys are taken for one
    assert 1 <= len(key) <= MAX_KEY_CHARACTERS
    assert set(key) <= set(PRINTABLE)
