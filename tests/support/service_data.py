"""What both the service and its tests know."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

BINARY = bytes(range(256)) * 4
DOCUMENT = b"a line of text\n" * 10_000  # more than one message of a file


@dataclass(frozen=True)
class Arrivals:
    """The events of a stream that are known to have arrived: files whose names begin with the path."""

    path: str

    def note(self, number: int) -> None:
        Path(f"{self.path}.{number}").touch()

    def has(self, number: int) -> bool:
        return Path(f"{self.path}.{number}").exists()
