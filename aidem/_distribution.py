"""The name and version under which this package is installed; as `aidem` it is only imported."""

from __future__ import annotations

from typing import Final

DISTRIBUTION: Final = "aidem-idempotency"  # as in pyproject.toml

__version__ = "0.2.0"
"""The version of the installed package."""


def how_to_install(extra: str) -> str:
    """Say how to install an extra, until the distribution is on the package index."""
    return (
        f"install {DISTRIBUTION}[{extra}], which is not on the package index yet, from a checkout or a wheel: "
        f"pip install '/path/to/it[{extra}]'"
    )
