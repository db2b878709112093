"""Which lines are the user's own: not those of aidem, of the standard library and of installed packages."""

from __future__ import annotations

import gc
import linecache
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CoroutineType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

_AIDEM: Final = str(Path(__file__).parents[1]) + os.sep
_STANDARD_LIBRARY: Final = str(Path(os.__file__).parent) + os.sep
_PACKAGES: Final = frozenset({"site-packages", "dist-packages"})

_FRAMES: Final = ("cr_frame", "gi_frame", "ag_frame")
_AWAITED: Final = ("cr_await", "gi_yieldfrom", "ag_await")
_OPAQUE: Final = frozenset({"async_generator_asend", "async_generator_athrow", "anext_awaitable", "coroutine_wrapper"})
"""Types without a public name that stand between an `await` and what runs; they do not say what that is."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of source code."""

    file: str
    number: int

    @classmethod
    def of(cls, frame: FrameType) -> Line:
        """Return the line that a frame is at."""
        return cls(frame.f_code.co_filename, frame.f_lineno)

    @property
    def where(self) -> str:
        """The file, relative to the working directory if it lies there, and the number."""
        path = Path(self.file)
        return f"{path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}:{self.number}"

    @property
    def source(self) -> str:
        """What is written there; empty if the file cannot be read."""
        return linecache.getline(self.file, self.number).strip()


def is_aidem(file: str) -> bool:
    """Whether a file of source code is of aidem."""
    return file.startswith(_AIDEM)


@cache
def is_own(file: str) -> bool:
    """Whether a file of source code is the user's. Code without a file, as a dataclass generates it, is not."""
    return not (file.startswith(("<", _AIDEM, _STANDARD_LIBRARY)) or _PACKAGES & set(Path(file).parts))


def frames_of(coroutine: Any) -> Iterator[FrameType]:
    """Yield the frames of a suspended coroutine and of what it awaits, from the outside in."""
    awaited = coroutine
    while awaited is not None:
        if type(awaited) is CoroutineType:  # most are; this is asked at every step
            frame, awaited = awaited.cr_frame, awaited.cr_await
        elif type(awaited).__name__ in _OPAQUE:
            frame, referents = None, gc.get_referents(awaited)
            awaited = next((inner for inner in referents if _first(inner, _FRAMES) is not None), None)
        else:
            frame, awaited = _first(awaited, _FRAMES), _first(awaited, _AWAITED)
        if frame is not None:
            yield frame


def innermost_own_line(coroutine: Any) -> Line | None:
    """Return where a suspended coroutine waits: the innermost line of the user's; None: it waits in no such line."""
    line: Line | None = None
    for frame in frames_of(coroutine):
        if is_own(frame.f_code.co_filename):
            line = Line.of(frame)
    return line


def own_line_of_thread(frame: FrameType | None) -> Line | None:
    """Return the innermost line of the user's on the stack of a thread; None: there is none."""
    while frame is not None and not is_own(frame.f_code.co_filename):
        frame = frame.f_back
    return None if frame is None else Line.of(frame)


def _first(holder: Any, names: tuple[str, ...]) -> Any:
    return next((found for name in names if (found := getattr(holder, name, None)) is not None), None)
