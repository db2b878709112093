"""The command line: `python -m tests.simulation --help`."""

from __future__ import annotations

import argparse
import sys
import time

from tests.simulation.runs import MOST_BAD_SEEDS, history_of, simulate


def main() -> int:
    parser = argparse.ArgumentParser(prog="simulate", description="Look for a seed that breaks a promise of aidem.")
    parser.add_argument("--start", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument("--count", type=int, default=1000, help="how many seeds (default: 1000)")
    parser.add_argument(
        "--most-bad", type=int, default=MOST_BAD_SEEDS, help="stop after so many bad seeds (default: 20)"
    )
    parser.add_argument("--seed", type=int, help="run this seed alone and print its history")
    parser.add_argument("-v", "--verbose", action="store_true", help="print what happened how often")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        history = history_of(arguments.seed)
        print("\n".join(history))
        return any("VIOLATION" in line for line in history)
    started_at = time.monotonic()
    report = simulate(range(arguments.start, arguments.start + arguments.count), most_bad=arguments.most_bad)
    if arguments.verbose:
        for what, count in sorted(report.happened.items()):
            print(f"{count:9d} {what}")
    print(f"{report} in {time.monotonic() - started_at:.0f} s, {len(report.violations)} bad")
    return bool(report.violations)


if __name__ == "__main__":
    sys.exit(main())
