from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import aidem.testing
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.testing import FakeClock, PersistenceLayerConformance, Trial

THEIR_TESTS = """
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.testing import PersistenceLayerConformance

class TestTheirLayer(PersistenceLayerConformance):
    async def make_layer(self, clock):
        return MemoryPersistenceLayer(clock=clock)
"""


def test_a_fake_clock_stands_still_until_it_is_moved() -> None:
    clock = FakeClock(start=1000.5)
    assert clock() == clock() == 1000.5
    clock.advance(1.25)
    assert clock() == 1001.75
    clock.advance(-2)
    assert clock() == 999.75
    clock.set(3.5)
    assert clock() == 3.5


def test_a_fake_clock_never_falls_into_the_millisecond_before() -> None:
    clock = FakeClock(start=1)
    for milliseconds in range(1000, 3000):
        assert int(clock() * 1000) == milliseconds  # int(1.001 * 1000) is 1000
        clock.advance(0.001)


async def test_the_suite_asks_how_the_layer_is_made() -> None:
    with pytest.raises(NotImplementedError, match="async def make_layer"):
        await PersistenceLayerConformance().make_layer(FakeClock())


async def test_a_trial_reports_a_completion_that_was_not_stored() -> None:
    class Forgetful(MemoryPersistenceLayer):
        async def complete(self, record: object, *, now: float) -> bool:  # type: ignore[override]
            self._records.clear()
            return True

    class Suite(PersistenceLayerConformance):
        async def make_layer(self, clock: FakeClock) -> MemoryPersistenceLayer:
            return Forgetful(clock=clock)

    async with Suite().make_trial() as trial:
        claim = await trial.claimed(trial.claim())
        with pytest.raises(AssertionError, match="must be stored"):
            await trial.completed(claim)


async def test_a_failure_never_shows_a_result() -> None:
    class Suite(PersistenceLayerConformance):
        async def make_layer(self, clock: FakeClock) -> MemoryPersistenceLayer:
            return MemoryPersistenceLayer(clock=clock)

    async with Suite().make_trial() as trial:
        await trial.completed(await trial.claimed(trial.claim()))
        with pytest.raises(AssertionError, match="must be granted") as refused:
            await trial.claimed(trial.claim("theirs"))
        assert "paid" not in str(refused.value)
        assert isinstance(trial, Trial)


def test_without_pytest_one_sentence_says_what_needs_it() -> None:
    code = "import sys; sys.modules['pytest'] = None; from aidem.testing import PersistenceLayerConformance"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr.endswith("ImportError: PersistenceLayerConformance needs pytest: pip install pytest\n")


def test_all_but_the_suite_works_without_pytest() -> None:
    code = "import sys; sys.modules['pytest'] = None; from aidem.testing import FakeClock, crash_everywhere"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_module_has_no_other_names() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = aidem.testing.nothing  # type: ignore[attr-defined]


def test_the_suite_needs_nothing_but_pytest(tmp_path: Path) -> None:
    (tmp_path / "test_theirs.py").write_text(THEIR_TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-c", "/dev/null", "--rootdir", str(tmp_path)]
    result = subprocess.run(
        [*command, "-p", "no:cacheprovider", str(tmp_path)], capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 0, result.stdout
    count = sum(name.startswith("test_") for name in dir(PersistenceLayerConformance))
    assert f"{count} passed" in result.stdout
