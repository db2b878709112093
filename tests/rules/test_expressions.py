"""JMESPath expressions over payloads."""

from __future__ import annotations

import base64
import dataclasses
import enum
import gzip
import json
import tracemalloc
import zlib
from datetime import date
from decimal import Decimal
from typing import Any
from uuid import UUID

import jmespath
import jmespath.parser
import pydantic
import pytest
from aws_lambda_powertools.utilities.jmespath_utils import PowertoolsFunctions
from jmespath.functions import Functions, signature

from aidem._rules.expressions import compile_expression, search
from aidem.exceptions import IdempotencyKeyError

MIB = 1024**2


def select(
    expression: str, data: Any, options: dict[str, Any] | None = None, *, max_inflated_bytes: int = 2 * MIB
) -> Any:
    return search(compile_expression(expression), data, options, max_inflated_bytes=max_inflated_bytes)


def base64_text(data: bytes) -> str:
    return base64.b64encode(data).decode()


class Color(enum.Enum):
    RED = "red"


BODY = {"user": "ü", "items": [1, 2]}
TEXT = json.dumps(BODY, ensure_ascii=False)
EVENTS = [
    ("[a.b, c]", {"a": {"b": 1}, "c": None}),
    ("missing", {}),
    ("powertools_json(body).[user, items]", {"body": TEXT}),
    ("powertools_base64(body)", {"body": base64_text(TEXT.encode())}),
    ("powertools_json(powertools_base64(body)).user", {"body": base64_text(TEXT.encode())}),
    ("powertools_base64_gzip(body)", {"body": base64_text(gzip.compress(TEXT.encode()))}),
    ("powertools_base64_gzip(body)", {"body": base64_text(gzip.compress(b"a") + gzip.compress(b"b") + b"\0\0")}),
    ("powertools_base64_gzip(body)", {"body": ""}),
    ("[to_string(body), to_string(id), to_string(@)]", {"body": "x", "id": 1}),
    ("to_string([a, b, c, d])", {"a": Decimal("1.50"), "b": UUID(int=1), "c": date(2026, 1, 2), "d": Color.RED}),
    ("Records[*].powertools_json(body).id", {"Records": [{"body": '{"id": 1}'}, {"body": '{"id": "2"}'}]}),
]


@pytest.mark.parametrize(("expression", "event"), EVENTS)
def test_expressions_select_what_they_select_in_powertools(expression: str, event: Any) -> None:
    expected = jmespath.search(expression, event, options=jmespath.Options(custom_functions=PowertoolsFunctions()))
    assert select(expression, event) == expected


class Model(pydantic.BaseModel):
    name: str = "secret"


@dataclasses.dataclass
class Data:
    name: str = "secret"


@pytest.mark.parametrize("value", [{"secret"}, Model(), Data()], ids=type)
def test_the_text_of_what_has_none_or_another_one_in_every_process_is_refused(value: Any) -> None:
    for data in (value, [value]):
        reason, _ = refusal("to_string(@)", data)
        assert reason == f"what it looks at is of type {type(value).__name__}"


def test_the_text_of_any_object_would_be_its_address_and_is_refused() -> None:
    assert refusal("to_string(@)", object())[0] == "evaluating it raised TypeError"


def test_an_expression_is_compiled_once() -> None:
    compiled = compile_expression("a.b.c")
    jmespath.parser.Parser.purge()  # jmespath keeps some too, and drops them at random
    assert compile_expression("a.b.c") is compiled


@pytest.mark.parametrize("expression", ["a[", "a..b", "", "a b", "'open", '"\\ud"', "(" * 100_000], ids=range(7))
def test_a_broken_expression_is_refused_with_a_sentence(expression: str) -> None:
    with pytest.raises(ValueError, match=r"^not a JMESPath expression: "):
        compile_expression(expression)


def refusal(
    expression: str, data: Any, options: dict[str, Any] | None = None, *, max_inflated_bytes: int = 2 * MIB
) -> tuple[str, BaseException | None]:
    with pytest.raises(IdempotencyKeyError) as caught:
        select(expression, data, options, max_inflated_bytes=max_inflated_bytes)
    message = str(caught.value)
    assert message.startswith(f"the JMESPath expression {expression!r} failed on the payload: ")
    shown: BaseException | None = caught.value
    while shown is not None:  # what a traceback in a log shows
        assert "secret" not in str(shown)
        shown = shown.__cause__ or (None if shown.__suppress_context__ else shown.__context__)
    return message.partition("payload: ")[2], caught.value.__cause__


@pytest.mark.parametrize(
    ("expression", "body", "error"),
    [
        ("powertools_json(body)", "secret", json.JSONDecodeError),
        ("powertools_base64(body)", "secretsecr", ValueError),
        ("powertools_base64(body)", base64_text(b"secret\xff"), UnicodeDecodeError),
        ("powertools_base64_gzip(body)", base64_text(b"secret"), gzip.BadGzipFile),
        ("powertools_base64_gzip(body)", base64_text(gzip.compress(b"secret" * 9)[:-9]), EOFError),
        ("powertools_base64_gzip(body)", base64_text(gzip.compress(b"secret")[:10] + b"\xff" * 20), zlib.error),
        ("body[::0]", ["secret"], ValueError),
    ],
    ids=range(7),
)
def test_a_function_that_fails_is_a_key_error_that_names_the_expression_only(
    expression: str, body: Any, error: type[Exception]
) -> None:
    reason, cause = refusal(expression, {"body": body})
    assert isinstance(cause, error)
    assert reason == f"evaluating it raised {type(cause).__name__}"


def test_a_value_of_the_wrong_type_is_named_by_its_type() -> None:
    reason, cause = refusal("powertools_json(body)", {"body": {"card": "secret"}})
    assert reason == "powertools_json() does not take a value of type object"
    assert cause is None


@pytest.mark.parametrize(
    ("expression", "reason"), [("foo(@)", "Unknown function: foo()"), ("length()", "Expected 1 arg")]
)
def test_a_call_that_cannot_be_is_described(expression: str, reason: str) -> None:
    assert reason in refusal(expression, {"a": "secret"})[0]


def test_a_small_event_cannot_inflate_without_bound() -> None:
    at_the_bound = base64_text(gzip.compress(b"a" * 2 * MIB))
    assert len(select("powertools_base64_gzip(@)", at_the_bound)) == 2 * MIB
    beyond = base64_text(gzip.compress(b"a" * (2 * MIB + 1)))
    reason, _ = refusal("powertools_base64_gzip(@)", beyond)
    assert reason == "powertools_base64_gzip() inflates it to more than max_inflated_bytes=2097152"


@pytest.mark.parametrize(
    "expression",
    [
        "Records[*].powertools_base64_gzip(body)",
        "map(&powertools_base64_gzip(body), Records)",
        "[powertools_base64_gzip(Records[0].body), powertools_base64_gzip(Records[0].body)]",
        "powertools_base64_gzip(powertools_base64_gzip(Records[1].body))",
    ],
)
def test_many_small_parts_together_cannot_inflate_without_bound(expression: str) -> None:
    half = base64_text(gzip.compress(b"a" * (MIB // 2)))
    twice = base64_text(gzip.compress(base64_text(gzip.compress(b"a" * MIB)).encode()))
    event = {"Records": [{"body": half}, {"body": twice}, {"body": half}]}
    assert refusal(expression, event, max_inflated_bytes=MIB - 1)[0].startswith("powertools_base64_gzip() inflates it")
    assert select(expression, event, max_inflated_bytes=3 * MIB) is not None


def test_every_evaluation_has_the_whole_bound_for_itself() -> None:
    text = base64_text(gzip.compress(b"a" * 2 * MIB))
    assert select("powertools_base64_gzip(@)", text) == select("powertools_base64_gzip(@)", text)


def test_what_lies_beyond_the_bound_is_never_inflated() -> None:
    beyond = base64_text(gzip.compress(bytes(32 * MIB)))
    tracemalloc.start()
    try:
        refusal("powertools_base64_gzip(@)", beyond)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * MIB


class Own(Functions):
    @signature({"types": ["string"]})
    def _func_shout(self, text: str) -> str:
        return text.upper()


def test_own_options_replace_the_built_in_functions() -> None:
    options = {"custom_functions": Own()}
    assert select("shout(a)", {"a": "x"}, options) == "X"
    assert refusal("powertools_json(a)", {"a": "{}"}, options)[0] == "Unknown function: powertools_json()"


def test_empty_options_are_no_options() -> None:
    assert select("powertools_json(a)", {"a": "1"}, {}) == 1
