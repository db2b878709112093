"""How fast aidem is, as ratios to its peers that were measured in the same run: `python -m benchmarks`.

Every module here whose name has no underscore is a subject, and has one function that measures and yields rows:

    from benchmarks._measure import Effort, Stopwatch, race
    from benchmarks._rows import Row, at_most

    def rows(effort: Effort) -> Iterator[Row]:
        result = race({"aidem": ours, "Powertools": theirs}, rounds=effort.rounds(21))
        yield result.times("first call", lap="first", against="Powertools", by="cpu", target=at_most(1.0))

A contender such as `ours(stopwatch)` is one round of its side, and names what it times:

    def ours(stopwatch: Stopwatch) -> None:
        with stopwatch.lap("first", calls=1000):
            ...

- `Race.times` yields a row of microseconds a call, its ratio ours / theirs; `Race.rates` one of calls a second, also
  ours / theirs, so that more is better. A count or a size that needs no race is a `Row` of its own.
- `effort.rounds(n)` and `effort.calls(n)` are small under `--quick`, which shows that a benchmark works, not how fast.
- Coroutines are run by one `asyncio.Runner` per subject: connections stay open between rounds.
- Every subject has a section in docs/benchmarks.md, which a test checks.
- Every subject runs in a fresh interpreter, so it may set environment variables and import what it likes.
- Servers come from `benchmarks._servers`, in `with` blocks.
"""
