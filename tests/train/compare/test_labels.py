"""Places of labels, by hand and at random."""

import random
from itertools import combinations

import pytest

from torchrec_compress.train.compare.labels import Box, place

AREA = Box(-50, -50, 50, 50)


@pytest.mark.parametrize(
    ("segment", "crosses"),
    [
        (((-1, 1), (3, 1)), True),
        (((0.5, 0.5), (1.5, 1.5)), True),  # within
        (((1, 1), (1, 9)), True),  # from within
        (((-1, 1.5), (1.5, 4)), False),  # past a corner
        (((-1, 0.5), (0.5, -1)), False),
        (((-1, 2), (3, 2)), False),  # along an edge
        (((3, 1), (9, 1)), False),  # in its height, beside it
        (((1, -9), (1, -1)), False),
        (((1, 1), (1, 1)), True),
        (((2, 2), (4, 4)), False),  # a corner is no part
    ],
)
def test_what_crosses_a_box(segment, crosses):
    for line in (segment, segment[::-1]):
        assert Box(0, 0, 2, 2).crosses(line) is crosses


def test_what_is_nearest_to_a_point():
    box = Box(0, 0, 2, 1)
    assert [box.nearest(point) for point in ((5, 0.5), (-1, 3), (1, 0.2))] == [(2, 0.5), (0, 1), (1, 0.2)]


def test_labels_of_one_point_lie_around_it_the_first_nearest():
    points, sizes = [(0.0, 0.0)] * 12, [(10.0, 4.0)] * 12
    marks = [Box(-2, -2, 2, 2)]
    found = place(points, sizes, AREA, marks)
    boxes = [box for box in found if box is not None]
    assert len(boxes) == 12 and all(AREA.holds(box) for box in boxes)
    assert not any(one.overlaps(other) for one, other in combinations([*boxes, *marks], 2))
    away = [abs(box.nearest((0, 0))[0]) + abs(box.nearest((0, 0))[1]) for box in boxes]
    assert away[0] == min(away) and max(away) > 2 * away[0]
    assert [(round(box.right - box.left, 9), round(box.top - box.bottom, 9)) for box in boxes] == sizes
    assert place(points, sizes, AREA, marks) == found


def test_a_label_keeps_off_lines_where_it_can_and_lies_on_them_rather_than_nowhere():
    (free,) = place([(0, 0)], [(10, 4)], AREA, [])
    assert free is not None
    line = ((free[0], free[1] + 1), (free[2], free[1] + 1))
    (moved,) = place([(0, 0)], [(10, 4)], AREA, [], [line])
    assert moved is not None and free.crosses(line) and not moved.crosses(line)
    everywhere = [((-50.0, y), (50.0, y)) for y in range(-50, 50)]
    assert place([(0, 0)], [(10, 4)], AREA, [], everywhere) == [free]


def test_a_lead_keeps_off_other_marks_and_labels():
    """A point between two others, close by: its label goes up or down, and no lead runs through a mark."""
    points = [(0.0, 0.0), (-6.0, 0.0), (6.0, 0.0)]
    marks = [Box(x - 2, -2, x + 2, 2) for x, _ in points]
    boxes = [box for box in place(points, [(12.0, 4.0)] * 3, AREA, marks) if box is not None]
    for number, (point, box) in enumerate(zip(points, boxes, strict=True)):
        lead = (point, box.nearest(point))
        others = [mark for other, mark in enumerate(marks) if other != number]
        assert not any(other.crosses(lead) for other in [*others, *(set(boxes) - {box})])


def test_none_is_what_has_no_place():
    assert place([(0, 0)] * 2, [(90, 60), (90, 60)], AREA, [])[1] is None
    assert place([(0, 0)], [(101, 1)], AREA, []) == [None]
    ring = [Box(-20, -20, 20, 20)]
    assert place([(0, 0)], [(4, 4)], AREA, ring, reach=10) == [None]
    (far,) = place([(0, 0)], [(4, 4)], AREA, ring)
    assert far is not None and not far.overlaps(ring[0])


def test_many_at_random():
    drawn = random.Random(5)
    points = [(drawn.uniform(0, 900), drawn.uniform(0, 500)) for _ in range(120)]
    sizes = [(drawn.uniform(10, 120), 12.0) for _ in points]
    marks = [Box(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    found = place(points, sizes, Box(0, 0, 900, 500), marks)
    boxes = [box for box in found if box is not None]
    assert len(boxes) == 120
    assert not any(box.overlaps(mark) for box in boxes for mark in marks)
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    # leads past labels and marks, and labels past leads, where there is room: here for all but one
    leads = [(point, box.nearest(point)) for point, box in zip(points, boxes, strict=True)]
    crossed = [
        (number, other)
        for number, (point, lead) in enumerate(zip(points, leads, strict=True))
        for other in [*boxes[:number], *(mark for mark in marks if mark.nearest(point) != point)]
        if other.crosses(lead)
    ]
    crossed += [(number, lead) for number, box in enumerate(boxes) for lead in leads[:number] if box.crosses(lead)]
    assert len(crossed) == 1
