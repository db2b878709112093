"""JMESPath expressions over payloads, with functions for JSON, base64 and gzip inside strings."""

from __future__ import annotations

import base64
import gzip
import io
import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import jmespath
from jmespath.exceptions import JMESPathError, JMESPathTypeError
from jmespath.functions import Functions, signature

from aidem.exceptions import IdempotencyKeyError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jmespath.parser import ParsedResult

MAX_INFLATED_BYTES: Final = 64 * 1024 * 1024


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


def search(compiled: ParsedResult, data: Any, options: Mapping[str, Any] | None) -> Any:
    """Return what an expression selects from data.

    Args:
        compiled: What `compile_expression` returned.
        data: The prepared payload.
        options: Arguments of `jmespath.Options`; they replace the built-in functions. None or empty: the built-in ones.

    Raises:
        IdempotencyKeyError: The expression does not suit the data, or one of its functions failed.
    """
    chosen = jmespath.Options(**options) if options else _BUILT_IN
    try:
        return compiled.search(data, options=chosen)
    except JMESPathTypeError as error:
        # Its own message shows the value, so it is neither quoted nor chained.
        raise _failed(compiled, f"{error.function_name}() does not take a value of type {error.actual_type}") from None
    except JMESPathError as error:
        raise _failed(compiled, str(error)) from error
    except InflatedTooLargeError as error:
        raise _failed(compiled, str(error)) from error
    except Exception as error:
        raise _failed(compiled, f"evaluating it raised {type(error).__name__}") from error


def _failed(compiled: ParsedResult, reason: str) -> IdempotencyKeyError:
    return IdempotencyKeyError(f"the JMESPath expression {compiled.expression!r} failed on the payload: {reason}")


class InflatedTooLargeError(ValueError):
    """A small compressed text that inflates to more than a payload may have."""

    def __init__(self) -> None:
        super().__init__(f"the payload inflates to more than {MAX_INFLATED_BYTES // 1024**2} MiB")


class _BuiltInFunctions(Functions):
    """The names are those of AWS Powertools, so that expressions can be kept."""

    @signature({"types": ["string"]})
    def _func_powertools_json(self, text: str) -> Any:
        return json.loads(text)

    @signature({"types": ["string"]})
    def _func_powertools_base64(self, text: str) -> str:
        return base64.b64decode(text).decode()

    @signature({"types": ["string"]})
    def _func_powertools_base64_gzip(self, text: str) -> str:
        with gzip.GzipFile(fileobj=io.BytesIO(base64.b64decode(text))) as file:
            inflated = file.read(MAX_INFLATED_BYTES + 1)
        if len(inflated) > MAX_INFLATED_BYTES:
            raise InflatedTooLargeError
        return inflated.decode()


_BUILT_IN: Final = jmespath.Options(custom_functions=_BuiltInFunctions())
