"""`async with` for persistence layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType


class OpenedByAsyncWith:
    """Opens itself at the start of an `async with` block, and closes itself at its end."""

    __slots__ = ()

    if TYPE_CHECKING:  # each layer has its own

        async def open(self) -> None: ...

        async def aclose(self) -> None: ...

    async def __aenter__(self) -> Self:
        """Open the layer."""
        await self.open()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the layer."""
        await self.aclose()
