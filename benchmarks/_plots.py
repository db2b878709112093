"""Drawings of the results: as wide as a phone, and in the colours of the reader's system, light or dark."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from matplotlib.axes import Axes

    from benchmarks._rows import Row

INK, GROUND, FIRST, REPLAY = "#1b1f24", "#ffffff", "#2f55c8", "#9db4f5"
DARK = {INK: "#e3e6ea", GROUND: "#1e2129", FIRST: "#8aa5ff", REPLAY: "#44589e"}
KINDS = {"first call": FIRST, "replay": REPLAY}
INCHES_WIDE = 4.0
OURS = "aidem"


def draw_costs(layers: Mapping[str, Iterable[Row]], path: Path) -> None:
    """Draw the times of one call at a time, those of aidem beside those of its peers on the same layer."""
    times = {layer: found for layer, rows in layers.items() if (found := _times(rows))}
    heights = [len(sides) for sides in times.values()]
    figure = Figure((INCHES_WIDE, 0.42 * sum(heights) + 0.45 * len(heights) + 0.3), layout="constrained")
    axes = figure.subplots(len(times), 1, squeeze=False, height_ratios=heights)[:, 0]
    for each, (layer, sides) in zip(axes, times.items(), strict=True):
        _draw_layer(each, layer, sides)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    _save(figure, path)


def _times(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """Return microseconds by side and kind of call."""
    sides: dict[str, dict[str, float]] = {}
    for row in rows:
        kind = next((kind for kind in KINDS if row.what.startswith(kind)), None)
        if kind is not None and row.unit == "µs" and row.theirs is not None and not row.is_growth:
            sides.setdefault(OURS, {})[kind] = row.ours
            sides.setdefault(row.against, {})[kind] = row.theirs
    return sides


def _draw_layer(axes: Axes, layer: str, sides: Mapping[str, Mapping[str, float]]) -> None:
    widest = max(value for kinds in sides.values() for value in kinds.values())
    for number, (kind, color) in enumerate(KINDS.items()):
        values = [kinds[kind] for kinds in sides.values()]
        bars = axes.barh([place + 0.36 * number for place in range(len(sides))], values, 0.34, color=color, label=kind)
        axes.bar_label(bars, [_said(value) for value in values], padding=3)
    axes.set_yticks([place + 0.18 for place in range(len(sides))], sides)
    axes.set_title(layer, loc="left", fontweight="bold")
    axes.set_xlim(0, 1.3 * widest)
    axes.set_xticks([])
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.set_frame_on(False)


def _said(microseconds: float) -> str:
    return f"{microseconds / 1000:.2f} ms" if microseconds >= 1000 else f"{microseconds:.3g} µs"


def draw_growth(layers: Mapping[str, Iterable[Row]], path: Path) -> None:
    """Draw the time of a call among so many records, relative to that among a thousand."""
    figure = Figure((INCHES_WIDE, 3.2), layout="constrained")
    axes = figure.subplots()
    for (layer, rows), style in zip(_grown(layers).items(), ("o-", "s--"), strict=False):
        for kind, points in rows.items():
            axes.plot(*zip(*points, strict=True), style, color=KINDS[kind], label=f"{layer}, {kind}")
    axes.set_xscale("log")
    axes.set_xlabel("records")
    axes.set_xticks([10**power for power in range(3, 7)], ["1,000", "10,000", "100,000", "1,000,000"])
    axes.set_ylabel("time of a call, 1 = among 1,000")
    axes.set_ylim(0, 1.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    _save(figure, path)


def _grown(layers: Mapping[str, Iterable[Row]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Return points by layer and kind of call."""
    grown: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for layer, rows in layers.items():
        for row in rows:
            size = re.search(r"among ([\d,]+) records", row.what)
            if row.is_growth and row.ratio is not None and size is not None:
                kind = next(kind for kind in KINDS if row.what.startswith(kind))
                points = grown.setdefault(layer, {}).setdefault(kind, [(1000, 1.0)])
                points.append((int(size[1].replace(",", "")), row.ratio))
    return grown


def _save(figure: Figure, path: Path) -> None:
    """Write text as text, the same for the same figures, and its colours as what a dark system changes."""
    settings = {"svg.fonttype": "none", "svg.hashsalt": path.stem}
    with mpl.rc_context(settings), io.StringIO() as file:
        figure.savefig(file, format="svg", metadata={"Date": None}, facecolor=GROUND)
        drawn = file.getvalue()
    light = "".join(f"--c{color[1:]}: {color}; " for color in DARK)
    dark = "".join(f"--c{color[1:]}: {darker}; " for color, darker in DARK.items())
    for color in DARK:
        drawn = drawn.replace(color, f"var(--c{color[1:]})")
    style = f"<style>svg {{ {light}}} @media (prefers-color-scheme: dark) {{ svg {{ {dark}}} }}</style>"
    path.write_text(re.sub(r"(<svg [^>]*>)", rf"\1\n {style}", drawn, count=1), "utf-8")


mpl.rcParams |= {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
