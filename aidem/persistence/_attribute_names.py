"""What the parts of a record are called in a store, where users choose that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aidem.exceptions import IdempotencyPersistenceConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence


def check_names(names: Sequence[str]) -> None:
    """Refuse names of which one would hide another.

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
