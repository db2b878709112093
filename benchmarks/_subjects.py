"""The subjects, each measured in an interpreter of its own: what one imports or sets reaches no other."""

from __future__ import annotations

import importlib
import multiprocessing
import pkgutil
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING

import benchmarks

if TYPE_CHECKING:
    from collections.abc import Iterable

    from benchmarks._measure import Effort
    from benchmarks._rows import Row

SUBJECTS = sorted(
    module.name for module in pkgutil.iter_modules(benchmarks.__path__) if not module.name.startswith("_")
)


def measured(subjects: Iterable[str], effort: Effort) -> dict[str, list[Row]]:
    """Return the rows of each subject; one that fails is reported, and does not cost the others theirs."""
    rows: dict[str, list[Row]] = {}
    context = multiprocessing.get_context("spawn")
    for subject in subjects:
        print(f"measuring {subject} …", file=sys.stderr, flush=True)
        try:
            with ProcessPoolExecutor(1, mp_context=context) as fresh_interpreter:
                rows[subject] = fresh_interpreter.submit(rows_of, subject, effort).result()
        except Exception:  # noqa: BLE001 - whatever went wrong there
            traceback.print_exc()
    return rows


def rows_of(subject: str, effort: Effort) -> list[Row]:
    """Return what a subject measures."""
    return list(importlib.import_module(f"benchmarks.{subject}").rows(effort))
