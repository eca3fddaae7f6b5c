"""Quality against bytes: a point a variant, each with its name, and the line of the best at no more bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torchrec_compress.train.compare.labels import Box, Point, Segment, place

_COLORS, _MARKS = 10, "osD^vPX*"
_SIZE = 7  # of letters, in points
_MARK = 4.0  # half of a mark and a little more, in points
_PAD = 1.0  # pixels around a label: letters may be drawn half a pixel off
_REACH = 1.0  # inches that a name may lie from its point; farther, numbers and a legend are easier to read
_INCHES_A_LETTER, _INCHES_A_LINE = 0.06, 0.14  # of the legend, at most


class Variant(NamedTuple):
    """A point of the plot.

    Attributes:
        name: of the variant.
        size: bytes, above 0.
        value: of the metric, mean over seeds; NaN is not drawn.
        spread: of it, 0 or more.
    """

    name: str
    size: float
    value: float
    spread: float = 0.0


def front(variants: Sequence[Variant], less_is_better: bool = False) -> list[Variant]:
    """Return the variants of which no other is as small and as good, and smaller or better; by bytes, ascending.

    Variants of equal bytes and quality are on it together; one without a value never is.

    Example:
        >>> [v.name for v in front([Variant("a", 2, 0.7), Variant("b", 1, 0.6), Variant("c", 3, 0.65)])]
        ['b', 'a']
    """
    sign = -1 if less_is_better else 1
    found: list[Variant] = []
    for variant in sorted(
        (variant for variant in variants if not math.isnan(variant.value)),
        key=lambda variant: (variant.size, -sign * variant.value),
    ):
        last = found[-1] if found else None
        if last is None or sign * variant.value > sign * last.value or variant[1:3] == last[1:3]:
            found.append(variant)
    return found


def draw_pareto(
    drawn: Any,
    variants: Sequence[Variant],
    *,
    sizes: str,
    metric: str,
    less_is_better: bool = False,
    best_possible: float | None = None,
) -> None:
    """Draw quality against bytes into an empty figure, whose layout is settled by it.

    Names stand beside their points, with a line to it where they had to go farther. Where they have no room there,
    numbers stand in their place, and names beside the plot, which gets wider.

    Args:
        drawn: the figure, as `canvas.figure` yields it.
        variants: one with a value at least; those without are left out.
        sizes, metric: what the axes show.
        less_is_better: of the metric.
        best_possible: a line at this value.
    """
    shown = [variant for variant in variants if not math.isnan(variant.value)]
    best, axes = front(shown, less_is_better), drawn.subplots()
    handles = [_mark(axes, number, variant, variant in best) for number, variant in enumerate(shown)]
    corners = [variant.size for variant in best], [variant.value for variant in best]
    axes.plot(*corners, drawstyle="steps-post", color="black", linewidth=1, alpha=0.5, zorder=1)
    note = None
    if best_possible is not None:
        axes.axhline(best_possible, color="grey", linestyle=":", linewidth=1)
        where = {"xycoords": ("axes fraction", "data"), "fontsize": _SIZE, "color": "grey", "va": "bottom"}
        note = axes.annotate("best possible", (0.01, best_possible), **where)
    axes.set_xscale("log")
    axes.set_xlabel(sizes)
    axes.set_ylabel(metric)
    axes.set_title("line, filled: the best at no more bytes", fontsize=_SIZE, loc="right")
    axes.grid(alpha=0.3)
    axes.margins(x=0.1, y=0.08)
    axes.autoscale(False)
    plot, names = _Plot(drawn, axes, shown, best, note), [variant.name for variant in shown]
    if not _label(plot, names, _REACH):
        numbers = [str(number) for number in range(1, len(shown) + 1)]
        _list_beside(drawn, handles, [f"{number}  {name}" for number, name in zip(numbers, names, strict=True)])
        _label(plot, numbers, math.inf)


class _Plot(NamedTuple):
    """A plot whose points are drawn, and whose limits stay.

    Attributes:
        drawn, axes: where.
        shown: its points.
        best: those of the front.
        note: a text that is there already, or None.
    """

    drawn: Any
    axes: Any
    shown: Sequence[Variant]
    best: Sequence[Variant]
    note: Any


def _color(number: int) -> str:
    return f"C{number % _COLORS}"


def _mark(axes: Any, number: int, variant: Variant, is_best: bool) -> Any:
    color = _color(number)
    return axes.errorbar(
        variant.size,
        variant.value,
        variant.spread,
        fmt=_MARKS[number // _COLORS % len(_MARKS)],
        color=color,
        markerfacecolor=color if is_best else "white",
        capsize=3,
        markersize=6,
        elinewidth=1,
    )


def _list_beside(drawn: Any, handles: Sequence[Any], lines: Sequence[str]) -> None:
    """Make room beside the plot for all names, and list them there."""
    width, height = drawn.get_size_inches()
    wider = _INCHES_A_LETTER * max(map(len, lines)) + 0.5
    drawn.set_size_inches(width + wider, max(height, _INCHES_A_LINE * len(lines) + 0.5))
    legend = drawn.legend(handles, lines, loc="outside right upper", fontsize=_SIZE, labelspacing=0.3)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _label(plot: _Plot, texts: Sequence[str], reach: float) -> bool:
    """Draw a text beside each point; return False, and draw none, where one has no room within reach, in inches.

    Without a bound on reach all are drawn: one that has no room at all, of thousands, over others.
    """
    drawn, axes, shown, best, note = plot
    drawn.set_layout_engine("constrained")
    drawn.draw_without_rendering()  # places the axes; from here on they stay
    drawn.set_layout_engine("none")
    # those of the front first: they have the best places
    order = sorted(range(len(shown)), key=lambda number: shown[number] not in best)
    made = [_text(plot, number, texts[number]) for number in order]
    sizes = [text.get_window_extent() for text in made]
    points = [_point(axes.transData.transform(shown[number][1:3])) for number in order]
    pixels = drawn.dpi / 72
    marks = [Box(x - _MARK * pixels, y - _MARK * pixels, x + _MARK * pixels, y + _MARK * pixels) for x, y in points]
    boxes = place(
        points,
        [(box.width + 2 * _PAD, box.height + 2 * _PAD) for box in sizes],
        Box(*axes.get_window_extent().extents),
        marks if note is None else [*marks, Box(*note.get_window_extent().extents)],
        _lines(plot),
        reach * drawn.dpi,
    )
    if None in boxes and reach < math.inf:
        for text in made:
            text.remove()
        return False
    for number, text, point, box in zip(order, made, points, boxes, strict=True):
        if box is None:
            continue
        text.set_position(((box.left + _PAD - point[0]) / pixels, (box.bottom + _PAD - point[1]) / pixels))
        end = box.nearest(point)
        if needs_lead(box, point, points, 2 * _MARK * pixels):
            to = ((end[0] - point[0]) / pixels, (end[1] - point[1]) / pixels)
            line = {"arrowstyle": "-", "color": _color(number), "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", shown[number][1:3], to, textcoords="offset points", arrowprops=line, zorder=1)
    return True


def _text(plot: _Plot, number: int, text: str) -> Any:
    variant = plot.shown[number]
    return plot.axes.annotate(
        text,
        variant[1:3],
        (0, 0),
        textcoords="offset points",
        va="bottom",
        fontsize=_SIZE,
        fontweight="bold" if variant in plot.best else "normal",
        color=_color(number),
        parse_math=False,
    )


def _point(pixels: Any) -> Point:
    return float(pixels[0]), float(pixels[1])


def needs_lead(box: Box, point: Point, points: Sequence[Point], near: float) -> bool:
    """Return whether a label is not near its point, or about as near to another.

    Example:
        >>> needs_lead(Box(5, 0, 9, 2), (0, 0), [(0, 0)], near=6), needs_lead(Box(7, 0, 9, 2), (0, 0), [(0, 0)], near=6)
        (False, True)
        >>> needs_lead(Box(5, 0, 9, 2), (0, 0), [(0, 0), (11, 0)], near=6)
        True
    """
    away = math.dist(box.nearest(point), point)
    return away > near or any(other != point and math.dist(box.nearest(other), other) < 1.5 * away for other in points)


def _lines(plot: _Plot) -> list[Segment]:
    """Return what labels had better not lie on, in pixels: the steps of the front, and spreads."""
    corners = [(variant.size, variant.value) for variant in plot.best]
    pairs = [((v.size, v.value - v.spread), (v.size, v.value + v.spread)) for v in plot.shown if v.spread > 0]
    for (size, value), (next_size, next_value) in pairwise(corners):
        pairs += [((size, value), (next_size, value)), ((next_size, value), (next_size, next_value))]
    transform = plot.axes.transData.transform
    return [(_point(transform(start)), _point(transform(end))) for start, end in pairs]
