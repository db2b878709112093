"""Stored data that other programs may have written: attribute names of users, and values of unexpected types."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aidem.exceptions import IdempotencyPersistenceConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

NOT_A_TEXT: Final = "aidem:not a text"
"""Replaces stored data that is not text: it is not JSON, and equal to no owner and no hash."""


def text(value: object) -> str | None:
    """Return what is stored where a text should be; `NOT_A_TEXT` for anything else."""
    return value if value is None or isinstance(value, str) else NOT_A_TEXT


def decoded(value: bytes) -> str:
    """Return a stored text; `NOT_A_TEXT` for one that is not UTF-8."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return NOT_A_TEXT


def check_names(names: Sequence[str]) -> None:
    """Refuse names of attributes of which one would hide another.

    Raises:
        IdempotencyPersistenceConfigError: Two are equal, or one is empty.
    """
    if len({*names}) < len(names) or not all(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise IdempotencyPersistenceConfigError(
            f"every attribute needs a name of its own: {twice} is used more than once"
            if twice
            else "every attribute needs a name: one of them is empty"
        )
