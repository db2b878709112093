"""Options of the HTTP layer: a wrong one is refused where it is given, by name."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

import pytest

from aidem import IdempotencyConfig
from aidem._http.options import HttpOptions
from aidem.asgi import IdempotencyMiddleware, IdempotencyOptions, by_header
from aidem.exceptions import IdempotencyConfigError
from aidem.persistence.memory import MemoryPersistenceLayer
from tests.support.asgi import scope_of


async def app(scope: Any, receive: Any, send: Any) -> None: ...


def middleware(**options: Any) -> IdempotencyMiddleware:
    return IdempotencyMiddleware(app, **{"key_prefix": "shop", "scope": None} | options)


@pytest.mark.parametrize("missing", ["key_prefix", "scope"])
def test_prefix_and_scope_must_be_given(missing: str) -> None:
    options = {"key_prefix": "shop", "scope": None}
    del options[missing]
    with pytest.raises(TypeError, match=missing):
        IdempotencyMiddleware(app, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("key_prefix", ""),
        ("key_prefix", 7),
        ("scope", "authorization"),
        ("scope", by_header),
        ("persistence_store", "redis://localhost"),
        ("persistence_store", MemoryPersistenceLayer),
        ("config", {"lease_seconds": 3}),
        ("methods", "POST"),
        ("methods", ()),
        ("methods", (1,)),
        ("methods", 7),
        ("methods", ("POST", "get")),
        ("methods", {"HEAD"}),
        ("methods", ["OPTIONS"]),
        ("required", 1),
        ("strict", "yes"),
        ("header_name", ""),
        ("header_name", "Idempotency Key"),
        ("header_name", "Idempotency-Key:"),
        ("header_name", b"idempotency-key"),
        ("header_name", None),
        ("replayed_header", "replayed\r\n"),
        ("replayed_header", None),
        ("max_request_bytes", -1),
        ("max_request_bytes", 1.5),
        ("max_response_bytes", True),
        ("store_if", 200),
        ("store_if", None),
        ("store_if", app),
        ("fingerprint", "body"),
        ("fingerprint", app),
        ("problem_body", {"error": "no"}),
        ("problem_body", app),
        ("store_set_cookie", None),
        ("documentation_url", 7),
    ],
)
def test_an_option_that_cannot_work_is_refused_by_name(option: str, value: Any) -> None:
    with pytest.raises(IdempotencyConfigError, match=f"^{option}="):
        middleware(**{option: value})


@pytest.mark.parametrize(
    "settings",
    [
        {"event_key_jmespath": "id"},
        {"payload_validation_jmespath": "id"},
        {"jmespath_options": {}},
        {"max_inflated_bytes": 1},
        {"raise_on_no_idempotency_key": True},
        {"response_hook": lambda response, record: response},
        {"stored_exceptions": (ValueError,)},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_setting_that_has_no_meaning_here_is_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(IdempotencyConfigError, match=f"^{next(iter(settings))}="):
        middleware(config=IdempotencyConfig(**settings))


def test_every_other_setting_is_used_as_it_is() -> None:
    config = IdempotencyConfig(
        expires_after_seconds=7,
        use_local_cache=True,
        local_cache_max_items=1,
        hash_function="sha512",
        lease_seconds=None,
        renew_lease=False,
        wait_timeout_seconds=3,
        on_abandoned="raise",
        max_clock_skew_seconds=1,
    )
    assert HttpOptions(key_prefix="shop", scope=None, config=config).settings is config


def test_without_a_config_results_are_kept_for_24_hours() -> None:
    assert HttpOptions(key_prefix="shop", scope=None).settings == IdempotencyConfig(expires_after_seconds=24 * 3600)


def test_every_option_of_the_fronts_is_checked_and_has_the_type_that_it_is_given() -> None:
    given = {
        name: annotation.__forward_arg__.removeprefix("Required[").removesuffix(
            "]" * annotation.__forward_arg__.startswith("Required[")
        )
        for name, annotation in IdempotencyOptions.__annotations__.items()
    }
    assert given == {field.name: field.type for field in dataclasses.fields(HttpOptions) if field.init}


def test_every_option_of_the_fronts_is_described_with_its_default() -> None:
    described = re.findall(r"^ {4}    (\w+): (?:.|\n {8}    )+$", inspect.getsource(IdempotencyOptions), re.MULTILINE)
    assert described == [field.name for field in dataclasses.fields(HttpOptions) if field.init]


def test_methods_may_be_written_in_lower_case() -> None:
    assert HttpOptions(key_prefix="shop", scope=None, methods=["put"]).methods == {"PUT"}


# --- by_header --------------------------------------------------------------------------------------------------------


def scope_with(*values: bytes) -> dict[str, Any]:
    return scope_of(headers=[(b"authorization", value) for value in values])


def test_by_header_tells_callers_apart_by_their_credential() -> None:
    scope = by_header("Authorization")
    assert scope(scope_with(b"Bearer ann")) == scope(scope_with(b"Bearer ann"))
    scopes = [scope(scope_with(*values)) for values in ([b"ann"], [b"bob"], [b"ann", b"bob"], [b"annbob"])]
    assert len(set(scopes)) == len(scopes)


def test_by_header_keeps_no_credential() -> None:
    assert "ann" not in str(by_header("authorization")(scope_with(b"ann")))


@pytest.mark.parametrize("values", [(), (b"",)])
def test_by_header_has_no_scope_for_a_request_without_the_header(values: tuple[bytes, ...]) -> None:
    assert by_header("authorization")(scope_with(*values)) is None
