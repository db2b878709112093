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
        from benchmarks import _page  # draws, which other runs need nothing for

        _page.write(rows)
    sys.exit(len(rows) < len(options.only or SUBJECTS))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=benchmarks.__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, metavar="SUBJECT", help=", ".join(SUBJECTS))
    parser.add_argument("--quick", action="store_true", help="see that it works; the figures mean nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows and versions")
    parser.add_argument("--write-docs", action="store_true", help="keep the rows for docs/benchmarks.md, and write it")
    options = parser.parse_args()
    if options.write_docs and options.quick:
        parser.error("--write-docs takes figures that mean something, without --quick")
    return options


if __name__ == "__main__":
    main()
