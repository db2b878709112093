"""JMESPath expressions over payloads, with functions for JSON, base64 and gzip inside strings."""

from __future__ import annotations

import base64
import gzip
import io
import json
from collections.abc import Set as AbstractSet
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jmespath
from jmespath.exceptions import JMESPathError, JMESPathTypeError
from jmespath.functions import Functions, signature

from aidem._rules.canonical_json import NotEncodableError, plain
from aidem.exceptions import IdempotencyKeyError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jmespath.parser import ParsedResult


@lru_cache(maxsize=256)
def compile_expression(expression: str) -> ParsedResult:
    """Compile an expression.

    Raises:
        ValueError: The expression is broken; the message says where.
    """
    try:
        return jmespath.compile(expression)
    except (JMESPathError, RecursionError) as error:
        message = f"not a JMESPath expression: {expression!r}: {error}"
        raise ValueError(message) from error


def check_calls(compiled: ParsedResult, options: Mapping[str, Any] | None) -> None:
    """Check that the functions which an expression calls exist, and take as many arguments as they are given.

    Raises:
        ValueError: One does not; the message names it.
    """
    chosen = vars(_options(options, max_inflated_bytes=0))["custom_functions"]
    functions: Functions = chosen or Functions()
    if type(functions).call_function is not Functions.call_function:
        return  # it finds functions in a way of its own
    nodes: list[Any] = [compiled.parsed]
    while nodes:
        node = nodes.pop()
        if node["type"] == "function_expression":
            name, given = node["value"], len(node["children"])
            if name not in functions.FUNCTION_TABLE:
                raise ValueError(f"there is no function {name}(), only {', '.join(sorted(functions.FUNCTION_TABLE))}")
            parameters = functions.FUNCTION_TABLE[name]["signature"]
            at_least = "at least " if parameters and parameters[-1].get("variadic") else ""
            if given < len(parameters) or (given > len(parameters) and not at_least):
                raise ValueError(f"{name}() takes {at_least}{len(parameters)} arguments, and is given {given}")
        nodes += [child for child in node["children"] if isinstance(child, dict)]  # a slice has numbers


def search(compiled: ParsedResult, data: Any, options: Mapping[str, Any] | None, *, max_inflated_bytes: int) -> Any:
    """Return what an expression selects from data.

    Args:
        compiled: What `compile_expression` returned.
        data: The prepared payload.
        options: Arguments of `jmespath.Options`; they replace the built-in functions. None or empty: the built-in ones.
        max_inflated_bytes: To how many bytes all calls of `powertools_base64_gzip` together may inflate.

    Raises:
        IdempotencyKeyError: The expression does not suit the data, or one of its functions failed.
    """
    chosen = _options(options, max_inflated_bytes=max_inflated_bytes)
    try:
        return compiled.search(data, options=chosen)
    except JMESPathTypeError as error:
        # Its own message shows the value, so it is neither quoted nor chained.
        raise _failed(compiled, f"{error.function_name}() does not take a value of type {error.actual_type}") from None
    except (JMESPathError, InflatedTooLargeError, NotEncodableError) as error:
        raise _failed(compiled, str(error)) from error
    except Exception as error:
        raise _failed(compiled, f"evaluating it raised {type(error).__name__}") from error


def _options(options: Mapping[str, Any] | None, *, max_inflated_bytes: int) -> jmespath.Options:
    return jmespath.Options(**(options or {"custom_functions": _BuiltInFunctions(max_inflated_bytes)}))


def _failed(compiled: ParsedResult, reason: str) -> IdempotencyKeyError:
    return IdempotencyKeyError(f"the JMESPath expression {compiled.expression!r} failed on the payload: {reason}")


class InflatedTooLargeError(ValueError):
    """A small compressed text that inflates to more than a payload may have."""

    def __init__(self, max_inflated_bytes: int) -> None:
        super().__init__(f"powertools_base64_gzip() inflates it to more than max_inflated_bytes={max_inflated_bytes}")


class _BuiltInFunctions(Functions):
    """The functions of one evaluation. The names are those of AWS Powertools, so that expressions can be kept."""

    def __init__(self, max_inflated_bytes: int) -> None:
        self._max_inflated_bytes = max_inflated_bytes
        self._left = max_inflated_bytes

    @signature({"types": []})
    def _func_to_string(self, value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), default=_text)

    @signature({"types": ["string"]})
    def _func_powertools_json(self, text: str) -> Any:
        return json.loads(text)

    @signature({"types": ["string"]})
    def _func_powertools_base64(self, text: str) -> str:
        return base64.b64decode(text).decode()

    @signature({"types": ["string"]})
    def _func_powertools_base64_gzip(self, text: str) -> str:
        with gzip.GzipFile(fileobj=io.BytesIO(base64.b64decode(text))) as file:
            inflated = file.read(self._left + 1)
        self._left -= len(inflated)
        if self._left < 0:
            raise InflatedTooLargeError(self._max_inflated_bytes)
        return inflated.decode()


def _text(value: object) -> str:
    """Return the text of a value as jmespath writes it, unless that differs between processes or hides something."""
    text, kind = str(value), type(value).__qualname__
    if isinstance(value, AbstractSet) or isinstance(plain(value), dict | list):
        raise NotEncodableError("what it looks at", f"is of type {kind}")
    return text
