"""Plots as inline SVG, by matplotlib. Colours are CSS variables, so that one file serves light and dark.

Each plot is drawn twice, for a wide and for a narrow page: shrinking one drawing would make its text unreadable.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime.report.sections import LatencyRun, LayerTimes, ParityRow, RatioRow, Search

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: CSS pixels; matplotlib's SVG has 72 units per inch, and the page scales a unit to a pixel.
WIDE, NARROW = 860, 330
#: Series colours in order; the page's style sheet gives each a value for light and for dark.
SERIES = ("--c1", "--c2", "--c3", "--c4", "--c5", "--c6", "--c7", "--c8")
_VARIABLES = ("--ink", "--soft", "--line", "--good", "--bad", *SERIES)
# matplotlib knows no CSS variables: each is drawn in a colour of its own that is then replaced by name.
_STAND_IN = {name: f"#0102{index + 16:02x}" for index, name in enumerate(_VARIABLES)}
_serial = itertools.count()  # a notebook may hold plots of several processes, so it is not enough alone

Draw = Callable[["Axes", bool], None]
Values = NDArray[Any]


def colour(name: str) -> str:
    """The stand-in colour of a CSS variable."""
    return _STAND_IN[name]


def both(draw: Draw, height: float, label: str, narrow_height: float | None = None) -> str:
    """The wide and the narrow drawing, heights in CSS pixels; the style sheet shows one."""
    wide = _svg(draw, WIDE, height, label, narrow=False)
    narrow = _svg(draw, NARROW, narrow_height or height, label, narrow=True)
    return f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'


def sigma(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Sigma of every layer, as its `Spread`: a histogram where there are several, and a dot at the median."""
    several = any(spread.get("counts") for _, spread in rows)

    def draw(axes: Axes, narrow: bool) -> None:
        for index, (_, spread) in enumerate(rows):
            low, middle, high = (spread[key] for key in ("min", "median", "max"))
            if counts := spread.get("counts"):
                edges, foot = np.linspace(low, high, len(counts) + 1), index + 0.4
                bars = foot - 0.8 * np.asarray(counts) / max(counts)  # rows count downwards
                axes.stairs(bars, edges, baseline=foot, fill=True, color=colour("--c1"), alpha=0.4)
            else:
                axes.hlines(index, low, high, color=colour("--c1"), alpha=0.45, linewidth=3)
            axes.plot([middle], [index], "o", color=colour("--c1"), markersize=5)
        _rows(axes, [name for name, _ in rows], narrow)
        axes.set_xlabel("sigma [taps]")
        axes.set_xlim(left=0, right=max(spread["max"] for _, spread in rows) * 1.06)

    return both(draw, 54 + (34 if several else 17) * len(rows), f"Sigma of {len(rows)} layers")


def search(section: Search) -> str:
    """What a search tried, the best of it joined by a line; the one taken is ringed."""
    points = sorted((point for point in section.tried if math.isfinite(point.y)), key=lambda point: (point.x, point.y))

    def draw(axes: Axes, narrow: bool) -> None:
        best = list(itertools.accumulate((point.y for point in points), min if section.falling else max))
        axes.step([point.x for point in points], best, where="post", color=colour("--c1"), linewidth=1.2, alpha=0.6)
        for point in points:
            tone = colour("--c1" if point.allowed else "--bad")
            axes.plot([point.x], [point.y], "o", color=tone, markersize=5)
            if point.chosen:
                axes.plot([point.x], [point.y], "o", color=tone, markersize=13, fillstyle="none")
        if section.limit is not None:
            axes.axhline(section.limit, color=colour("--soft"), linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xlabel(section.x)
        axes.set_ylabel(section.y)
        axes.set_xlim(left=0)

    return both(draw, 240, f"{section.y} over {section.x}", 220)


def latency(runs: Sequence[LatencyRun]) -> str:
    """Histograms of latency, with each median as a line; on a log axis where the medians are far apart."""
    medians = [float(np.median(run.latencies)) for run in runs]
    wide_apart = max(medians) > 4 * min(medians) > 0
    edges = _edges([run.latencies for run in runs], logarithmic=wide_apart)

    def draw(axes: Axes, narrow: bool) -> None:
        for run, name in zip(runs, itertools.cycle(SERIES)):
            share = np.histogram(run.latencies, edges)[0] / len(run.latencies) * 100
            axes.stairs(share, edges, fill=True, color=colour(name), alpha=0.28)
            axes.stairs(share, edges, color=colour(name), linewidth=1.4)
            axes.axvline(float(np.median(run.latencies)), color=colour(name), linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_xlabel("latency [ms]")
        axes.set_ylabel("share of queries [%]")
        axes.set_xlim(edges[0], edges[-1])
        if wide_apart:
            _logarithmic(axes, "g")
        axes.set_ylim(bottom=0)

    return both(draw, 250, "Distribution of latency", 220)


def over_time(runs: Sequence[LatencyRun]) -> str:
    """Median latency and its 10th to 90th percentile in up to 120 stretches of the run."""

    def draw(axes: Axes, narrow: bool) -> None:
        for run, name in zip(runs, itertools.cycle(SERIES)):
            groups = np.array_split(run.latencies, min(60 if narrow else 120, len(run.latencies)))
            low, middle, high = np.array([np.percentile(group, [10, 50, 90]) for group in groups]).T
            at = np.linspace(0, 100, len(groups)) if len(groups) > 1 else np.array([50.0])
            axes.fill_between(at, low, high, color=colour(name), alpha=0.22, linewidth=0)
            axes.plot(at, middle, color=colour(name), linewidth=1.5)
        axes.set_xlabel("part of the run [%]")
        axes.set_ylabel("latency [ms]")
        axes.set_xlim(0, 100)

    return both(draw, 200, "Latency over the run", 190)


def ratios(rows: Sequence[RatioRow]) -> str:
    """Each ratio with its interval, and a line at 1."""

    def draw(axes: Axes, narrow: bool) -> None:
        for index, row in enumerate(rows):
            axes.hlines(index, row.low, row.high, color=colour("--c1"), linewidth=3, alpha=0.5)
            axes.plot([row.value], [index], "o", color=colour("--c1"), markersize=6)
        axes.axvline(1, color=colour("--soft"), linewidth=1, linestyle=(0, (4, 3)))
        _rows(axes, [row.name for row in rows], narrow)
        axes.set_xlabel("latency / reference (95 % interval)")
        low, high = min(1.0, *(r.low for r in rows)), max(1.0, *(r.high for r in rows))
        margin = max(0.02, 0.08 * (high - low))
        axes.set_xlim(low - margin, high + margin)

    return both(draw, 58 + 30 * len(rows), "Latency ratios")


def layer_times(section: LayerTimes, most: int = 30) -> str:
    """A bar per layer, the slowest `most`, in order of execution."""
    slowest = set(sorted(section.times, key=lambda name: -section.times[name])[:most])
    shown = {name: time for name, time in section.times.items() if name in slowest}

    def draw(axes: Axes, narrow: bool) -> None:
        axes.barh(range(len(shown)), list(shown.values()), color=colour("--c1"), height=0.7)
        _rows(axes, list(shown), narrow)
        axes.set_xlabel("median time [ms]")

    return both(draw, 54 + 17 * len(shown), f"Median time of {len(shown)} layers")


def parity(rows: Sequence[ParityRow]) -> str:
    """Per comparison: the error found (dot), the tolerance (bar end), and the margin between them, on a log axis."""
    floor = 1e-9
    found = [max(row.rel_rms or 0.0, floor) for row in rows]

    def draw(axes: Axes, narrow: bool) -> None:
        for index, (row, error) in enumerate(zip(rows, found, strict=True)):
            tone = colour("--good" if row.passed else "--bad")
            if row.rel_rms is None:
                axes.plot([row.tolerance], [index], "x", color=tone, markersize=7, markeredgewidth=2)
                continue
            axes.plot([error], [index], "o" if error > floor else "<", color=tone, markersize=6)
            if row.bitwise:
                continue
            axes.hlines(index, error, row.tolerance, color=tone, linewidth=3, alpha=0.35)
            axes.plot([row.tolerance], [index], "|", color=colour("--ink"), markersize=12, markeredgewidth=1.6)
        _logarithmic(axes, ".0e")
        several = len({row.output for row in rows}) > 1
        names = ((row.case, row.shape, row.output * several) for row in rows)
        _rows(axes, [" ".join(filter(None, parts)) for parts in names], narrow)
        axes.set_xlabel("error / RMS")

    return both(draw, 60 + 19 * len(rows), "Error found against tolerance")


def radial(profiles: Sequence[tuple[str, Values]]) -> str:
    """Lines of a quantity over the distance from the centre, pixels; each is scaled to a maximum of 1."""

    def draw(axes: Axes, narrow: bool) -> None:
        for (_, profile), name, width in zip(profiles, SERIES, (4, 1.6), strict=False):
            scaled = profile / max(float(profile.max()), 1e-30)
            axes.plot(
                np.arange(len(profile)), scaled, color=colour(name), linewidth=width, alpha=0.45 if width > 2 else 1
            )
        axes.set_xlabel("distance from the centre [pixels]")
        axes.set_ylabel("mean |gradient|, scaled")
        axes.set_ylim(0, 1.05)
        axes.set_xlim(left=0)

    return both(draw, 220, "Effective receptive field by radius", 200)


def image(values: Values, low: float, high: float) -> str:
    """A heat map as a data URI: one PNG pixel per value, for `image-rendering: pixelated`."""
    from base64 import b64encode

    from matplotlib import colormaps
    from matplotlib.image import imsave

    scaled = np.clip((np.asarray(values, dtype=np.float64) - low) / max(high - low, 1e-30), 0, 1)
    stream = io.BytesIO()
    imsave(stream, colormaps["viridis"](scaled), format="png")
    return "data:image/png;base64," + b64encode(stream.getvalue()).decode()


def _svg(draw: Draw, width: float, height: float, label: str, *, narrow: bool) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "text.parse_math": False,  # a layer may be called a$b$c
        "svg.hashsalt": "gmconv-deploy",
        "font.family": "sans-serif",
        "font.size": 11,
        "text.color": colour("--ink"),
        "axes.labelcolor": colour("--soft"),
        "axes.edgecolor": colour("--line"),
        "xtick.color": colour("--soft"),
        "ytick.color": colour("--soft"),
        "xtick.labelcolor": colour("--soft"),
        "ytick.labelcolor": colour("--ink"),
        "grid.color": colour("--line"),
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "grid.linewidth": 0.8,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        axes = figure.add_subplot()
        draw(axes, narrow)
        axes.tick_params(length=0)
        if narrow:
            _thin_out(axes)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _embed(stream.getvalue(), label)


def _logarithmic(axes: Axes, number: str) -> None:
    """A log scale for what is drawn by now, its ticks written in this format; a short axis has ticks in a decade."""
    from matplotlib.ticker import LogLocator

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    # At 1, 2, 3 and 5 of a decade, ends four times apart have two ticks or more between them.
    wider = math.sqrt(max(4 * low / high, 1))
    axes.set_xlim(low / wider, high * wider)
    ratio = high / low
    steps = (1, 2, 3, 5) if ratio < 10 else (1, 2, 5) if ratio < 100 else (1,)
    axes.xaxis.set_major_locator(LogLocator(subs=steps))
    axes.xaxis.set_major_formatter(lambda value, _: format(value, number))
    axes.minorticks_off()


def _thin_out(axes: Axes) -> None:
    """Ticks for a narrow plot."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    locator = axes.xaxis.get_major_locator()
    if isinstance(locator, LogLocator):
        locator.set_params(numticks=4)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4))


def _embed(svg: str, label: str) -> str:
    """An SVG document as an element: no prolog, no metadata, ids of its own, CSS variables, a size in pixels."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    serial = f"{zlib.crc32(svg.encode()):x}-{next(_serial)}"
    svg = re.sub(r'\bid="([^"]+)"', rf'id="p{serial}-\1"', svg)
    svg = re.sub(r'(xlink:href="|url\()#([^")]+)', rf"\1#p{serial}-\2", svg)
    for name, stand_in in _STAND_IN.items():
        svg = svg.replace(stand_in, f"var({name})")
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups()  # type: ignore[union-attr]
    head = f'<svg role="img" aria-label="{label}" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return re.sub(r"<svg[^>]*>", f'{head} xmlns:xlink="http://www.w3.org/1999/xlink">', svg, count=1)


def _rows(axes: Axes, names: Sequence[str], narrow: bool) -> None:
    """One named row per item, the first on top; long names lose their middle, where that does not tell them apart the
    end that all share, and are numbered where nothing else does."""
    room = 20 if narrow else 48
    short = [_shortened(name, room) for name in names]
    if len(set(short)) < len(set(names)):
        ends = zip(*(reversed(name) for name in names), strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda ends: len(set(ends)) == 1, ends))
        short = [_shortened(name[: len(name) - shared], room) for name in names]
    if len(set(short)) < len(set(names)):
        short = [f"{index} {_shortened(name, room - 3)}" for index, name in enumerate(names, 1)]
    axes.set_yticks(range(len(names)), short)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")


def _shortened(name: str, room: int) -> str:
    half = (room - 1) // 2
    return name if len(name) <= room else f"{name[:half]}…{name[-half:]}"


def _edges(series: Sequence[Values], *, logarithmic: bool) -> Values:
    """Common histogram edges, from the smallest value to each series' 99.5th percentile or three medians."""
    low = min(float(values.min()) for values in series)
    high = max(min(float(np.percentile(values, 99.5)), 3 * float(np.median(values))) for values in series)
    if not math.isfinite(high) or high <= low:
        high = low * 1.01 + 1e-6
    return np.geomspace(low, high, 101) if logarithmic and low > 0 else np.linspace(low, high, 81)
