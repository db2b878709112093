"""`python -m benchmarks [--only SUBJECT …] [--quick] [--json FILE] [--write-docs]`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import benchmarks
from benchmarks import _report
from benchmarks._measure import Effort
from benchmarks._subjects import SUBJECTS, measured


def main() -> None:
    options = _options()
    rows = measured(options.only or SUBJECTS, Effort(quick=options.quick))
    print(_report.table(rows))
    if options.json is not None:
        text = json.dumps(_report.as_json(rows, quick=options.quick), indent=2, ensure_ascii=False)
        options.json.write_text(f"{text}\n", encoding="utf-8")
    if options.write_docs:
        _report.write_docs(rows)
    sys.exit(len(rows) < len(options.only or SUBJECTS))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=benchmarks.__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, metavar="SUBJECT", help=", ".join(SUBJECTS))
    parser.add_argument("--quick", action="store_true", help="see that it works; the figures mean nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows and versions")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/benchmarks.md")
    options = parser.parse_args()
    if options.write_docs and (options.only or options.quick):
        parser.error("--write-docs takes a whole run, without --only and --quick")
    return options


if __name__ == "__main__":
    main()
