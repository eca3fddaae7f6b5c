"""Where the labels of a plot's points go: beside their points, none over another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

Point = tuple[float, float]
Segment = tuple[Point, Point]

# right and left before above and below, as a label is wider than it is high; steep ones last
_DIRECTIONS = [math.radians(angle) for angle in (20, -20, 160, -160, 0, 180, 45, -45, 135, -135, 90, -90, 70, -70)]
_FIRST, _GROWTH = 0.5, 1.3  # of the distance from a point, in heights of a label


class Box(NamedTuple):
    """A rectangle whose sides are those of the plot.

    Example:
        >>> Box(0, 0, 2, 1).overlaps(Box(1, 0, 3, 1)), Box(0, 0, 2, 1).overlaps(Box(2, 0, 3, 1))
        (True, False)
    """

    left: float
    bottom: float
    right: float
    top: float

    def overlaps(self, other: Box) -> bool:
        """Return whether two boxes have more than an edge in common."""
        return (
            self.left < other.right and other.left < self.right and self.bottom < other.top and other.bottom < self.top
        )

    def holds(self, other: Box) -> bool:
        """Return whether the other lies within this one."""
        return (
            self.left <= other.left
            and other.right <= self.right
            and self.bottom <= other.bottom
            and other.top <= self.top
        )

    def nearest(self, point: Point) -> Point:
        """Return what of the box is nearest to a point."""
        return min(max(point[0], self.left), self.right), min(max(point[1], self.bottom), self.top)

    def crosses(self, segment: Segment) -> bool:
        """Return whether a segment has a part in the box: what Liang and Barsky's clipping leaves of it."""
        (x, y), (to_x, to_y) = segment
        low, high = 0.0, 1.0
        for start, move, least, most in ((x, to_x - x, self.left, self.right), (y, to_y - y, self.bottom, self.top)):
            if move == 0:
                if not least < start < most:
                    return False
                continue
            near, far = sorted(((least - start) / move, (most - start) / move))
            low, high = max(low, near), min(high, far)
        return low < high


def place(
    points: Sequence[Point],
    sizes: Sequence[tuple[float, float]],
    area: Box,
    taken: Sequence[Box],
    lines: Sequence[Segment] = (),
    reach: float = math.inf,
) -> list[Box | None]:
    """Return where labels go, each as near to its point as what is there leaves room, in the order given.

    Labels stay in the area, off what is taken and off each other. Where that can be had within reach, they also stay
    off lines and off the lines that lead from other labels to their points, and their own leads past all labels.

    Args:
        points: of the labels.
        sizes: width and height of each label, in the unit of the points.
        area: that labels stay in.
        taken: where none may lie, the points' own marks too.
        lines: that labels had better not lie on.
        reach: how far a label may lie from its point; infinite, as far as the area goes.

    Returns:
        Boxes, None where no place is left.

    Example:
        >>> first, second = place([(0, 0), (0, 0)], [(4, 2), (4, 2)], Box(-20, -20, 20, 20), [Box(-1, -1, 1, 1)])
        >>> first.overlaps(second)
        False
    """
    reach = min(reach, math.dist(area[:2], area[2:]))
    found: list[Box | None] = []
    leads: list[Segment] = []
    for point, size in zip(points, sizes, strict=True):
        placed = [box for box in found if box is not None]
        marks = [box for box in taken if box.nearest(point) != point]  # but its own, where its lead begins
        nearest = None
        for box in _candidates(point, size, reach):
            if not area.holds(box) or any(box.overlaps(other) for other in (*taken, *placed)):
                continue
            nearest = nearest or box
            lead = (point, box.nearest(point))
            if not any(box.crosses(line) for line in (*lines, *leads)) and not any(
                other.crosses(lead) for other in (*placed, *marks)
            ):
                nearest = box
                break
        found.append(nearest)
        if nearest is not None:
            leads.append((point, nearest.nearest(point)))
    return found


def _candidates(point: Point, size: tuple[float, float], reach: float) -> Iterator[Box]:
    """Yield boxes all around a point, the nearest first."""
    (x, y), (width, height) = point, size
    distance = _FIRST * height
    while distance <= reach:
        for angle in _DIRECTIONS:
            across, up = math.cos(angle), math.sin(angle)
            # the box stands on the far side of the circle, its middle in the same direction where it is square
            left = x + across * distance + (across - 1) * width / 2
            bottom = y + up * distance + (up - 1) * height / 2
            yield Box(left, bottom, left + width, bottom + height)
        distance *= _GROWTH
