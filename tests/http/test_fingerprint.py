"""What names a request, and what must not change under its key."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aidem._http.request import HeaderLines, full_path, lookup_key, parts, request_digest
from tests.support.asgi import JSON, scope_of

FORM = b"multipart/form-data; boundary="


def fingerprint(
    *chunks: bytes, content_type: bytes | None = None, hash_function: str = "sha256", **scope: object
) -> str:
    if content_type is not None:
        scope["headers"] = [(b"content-type", content_type)]
    taken = digest_of(scope_of(**scope), hash_function)  # type: ignore[arg-type]
    for chunk in chunks:
        taken.update(chunk)
    return taken.hexdigest()


def digest_of(scope: Any, hash_function: str) -> Any:
    return request_digest(scope, HeaderLines(scope).values(b"content-type"), hash_function)


def form(boundary: bytes, *pieces: bytes) -> bytes:
    return b"".join(b"--" + boundary + b"\r\n\r\n" + piece + b"\r\n" for piece in pieces) + b"--" + boundary + b"--\r\n"


def key_of(space: str | None, key: str, prefix: str = "shop", hash_function: str = "sha256") -> str:
    return lookup_key(prefix, space=space, key=key, hash_function=hash_function)


# --- The key of the record --------------------------------------------------------------------------------------------


def test_a_key_is_the_prefix_and_the_hash_of_scope_and_key_with_their_lengths() -> None:
    written = (3).to_bytes(8, "big") + b"ann" + (1).to_bytes(8, "big") + b"k"
    assert key_of("ann", "k") == "shop#" + hashlib.sha256(written).hexdigest()


def test_scope_and_key_cannot_run_into_each_other() -> None:
    keys = [key_of("a", "bc"), key_of("ab", "c"), key_of(None, "abc"), key_of(None, "a"), key_of("a", "a")]
    assert len(set(keys)) == len(keys)


@given(pairs=st.lists(st.tuples(st.none() | st.text(), st.text()), min_size=2, max_size=2, unique=True))
def test_two_callers_or_two_keys_never_share_a_record(pairs: list[tuple[str | None, str]]) -> None:
    first, second = pairs
    assert key_of(*first) != key_of(*second)


def test_the_same_key_under_another_prefix_is_another_record() -> None:
    assert key_of("ann", "k", prefix="shop") != key_of("ann", "k", prefix="bank")


def test_a_scope_may_hold_what_utf8_cannot() -> None:
    assert key_of("\ud800", "k") != key_of("\ud801", "k")


def test_the_hash_function_of_the_config_hashes_key_and_request() -> None:
    assert len(key_of("ann", "k", hash_function="sha512")) == len("shop#") + 128
    assert len(fingerprint(b"{}", hash_function="md5")) == 32


@given(texts=st.lists(st.lists(st.binary(max_size=9), max_size=4), min_size=2, max_size=2, unique_by=tuple))
def test_no_two_lists_of_parts_are_written_the_same_way(texts: list[list[bytes]]) -> None:
    first, second = texts
    assert parts(*first) != parts(*second)


# --- What must not change ---------------------------------------------------------------------------------------------


def test_method_path_query_content_type_and_body_count() -> None:
    requests = [
        fingerprint(b"{}"),
        fingerprint(b"{} "),
        fingerprint(b"{}", method="PATCH"),
        fingerprint(b"{}", path="/refunds"),
        fingerprint(b"{}", query=b"dry_run=1"),
        fingerprint(b"{}", content_type=b"text/plain"),
        fingerprint(b"{}", headers=()),
        fingerprint(b"{}", headers=[JSON, JSON]),
    ]
    assert len(set(requests)) == len(requests)


def test_other_headers_and_the_caller_do_not_count() -> None:
    volatile = [(b"date", b"now"), (b"traceparent", b"00-1"), (b"user-agent", b"b"), (b"authorization", b"new")]
    moved = fingerprint(b"{}", headers=[*volatile, JSON], key=b'"another"', client=("192.0.2.9", 1), scheme="http")
    assert moved == fingerprint(b"{}")


def test_how_a_body_is_cut_into_chunks_does_not_count() -> None:
    assert fingerprint(b"{", b"", b"}") == fingerprint(b"{}")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"method": "POST", "path": "/a"}, {"method": "POST/", "path": "a"}),
        ({"path": "/a", "query": b"bc"}, {"path": "/ab", "query": b"c"}),
        ({"query": b"a", "content_type": b"bc"}, {"query": b"ab", "content_type": b"c"}),
        ({"content_type": b"a", "body": b"bc"}, {"content_type": b"ab", "body": b"c"}),
        ({"headers": [(b"content-type", b"a"), (b"content-type", b"b")]}, {"content_type": b"ab"}),
    ],
)
def test_no_part_can_be_taken_for_the_next(one: dict[str, object], other: dict[str, object]) -> None:
    def of(request: dict[str, object]) -> str:
        body = request.get("body", b"")
        assert isinstance(body, bytes)
        return fingerprint(body, **{name: value for name, value in request.items() if name != "body"})  # type: ignore[arg-type]

    assert of(one) != of(other)


def test_a_server_that_has_no_query_or_root_path_to_tell_is_understood() -> None:
    scope = scope_of()
    del scope["query_string"], scope["root_path"]
    taken = digest_of(scope, "sha256")
    taken.update(b"{}")
    assert taken.hexdigest() == fingerprint(b"{}")


# --- Mounted apps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("root_path", "path", "full"),
    [
        ("", "/pay", "/pay"),
        ("/v1", "/v1/pay", "/v1/pay"),
        ("/v1", "/pay", "/v1/pay"),
        ("/v1", "/v1", "/v1"),
        ("/v1/", "/v1/pay", "/v1/pay"),
        ("/v1", "/v10/pay", "/v1/v10/pay"),
    ],
)
def test_the_path_is_that_which_the_client_sees(root_path: str, path: str, full: str) -> None:
    assert full_path(scope_of(path=path, root_path=root_path)) == full


def test_one_route_mounted_twice_is_two() -> None:
    assert fingerprint(path="/v1/pay", root_path="/v1") != fingerprint(path="/v2/pay", root_path="/v2")


# --- Multipart --------------------------------------------------------------------------------------------------------


def test_a_multipart_body_is_the_same_under_another_boundary() -> None:
    one = fingerprint(form(b"aaa", b"file", b"more"), content_type=FORM + b"aaa")
    assert one == fingerprint(form(b"bbbbbb", b"file", b"more"), content_type=FORM + b"bbbbbb")
    assert one == fingerprint(form(b"c d", b"file", b"more"), content_type=FORM + b'"c d"')
    assert one == fingerprint(
        form(b'c"d', b"file", b"more"), content_type=FORM.replace(b"boundary", b"BOUNDARY") + rb'"c\"d"'
    )


def test_what_is_between_the_boundaries_counts() -> None:
    bodies = [(b"file", b"more"), (b"more", b"file"), (b"filemore",), (b"file", b"more", b""), (b"file",), ()]
    requests = [fingerprint(form(b"aaa", *pieces), content_type=FORM + b"aaa") for pieces in bodies]
    assert len(set(requests)) == len(requests)


def test_a_body_that_is_not_multipart_counts_with_whatever_looks_like_a_boundary() -> None:
    one = fingerprint(form(b"aaa", b"x"), content_type=b"text/plain; boundary=aaa")
    assert one != fingerprint(form(b"bbb", b"x"), content_type=b"text/plain; boundary=bbb")


def test_other_parameters_and_the_kind_of_multipart_count() -> None:
    types = [
        b"multipart/form-data; boundary=aaa",
        b"multipart/mixed; boundary=aaa",
        b"multipart/form-data; charset=utf-8; boundary=aaa",
        b"multipart/form-data; boundary=; charset=utf-8",
        b"multipart/form-data",
        b'multipart/form-data; note="; boundary=bbb"; boundary=aaa',
    ]
    requests = [fingerprint(form(b"aaa", b"x"), content_type=content_type) for content_type in types]
    assert len(set(requests)) == len(requests)


def test_a_boundary_is_found_wherever_the_chunks_are_cut() -> None:
    body = form(b"aaa", b"--aa", b"\r\n--aa\r", b"")
    whole = fingerprint(body, content_type=FORM + b"aaa")
    for cut, again in itertools.combinations(range(len(body) + 1), 2):
        chunks = body[:cut], body[cut:again], body[again:]
        assert fingerprint(*chunks, content_type=FORM + b"aaa") == whole


def test_a_boundary_that_no_client_may_send_is_none() -> None:
    for boundary in (b'"a\0"', b'"a\r\n--a"', b'"a\n"'):
        body = b"\0\0--a"
        assert fingerprint(body, content_type=FORM + boundary) != fingerprint(body, content_type=FORM + b"a")
        kept = fingerprint(body, content_type=FORM + boundary)
        assert kept != fingerprint(body, content_type=FORM)


@given(
    bodies=st.lists(
        st.lists(st.sampled_from([b"\r\n--a", b"\r\n--", b"a", b"b", b"--a", b"\r\n", b"\0", b"\1"])).map(b"".join),
        min_size=2,
        max_size=2,
        unique=True,
    )
)
def test_no_two_multipart_bodies_with_one_boundary_are_taken_for_one(bodies: list[bytes]) -> None:
    first, second = bodies
    assert fingerprint(first, content_type=FORM + b"a") != fingerprint(second, content_type=FORM + b"a")
