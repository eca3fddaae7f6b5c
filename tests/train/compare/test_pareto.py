"""The front against its definition, and labels by what Matplotlib measures."""

import math
import random
from itertools import combinations
from typing import Any

import pytest

from torchrec_compress.canvas import figure
from torchrec_compress.train.compare import pareto, plots
from torchrec_compress.train.compare.labels import Box
from torchrec_compress.train.compare.pareto import Variant, draw_pareto, front, needs_lead
from torchrec_compress.train.compare.plots import draw

NAN = float("nan")


def names(points: dict[str, tuple[float, float]], less: bool = False) -> str:
    return "".join(variant.name for variant in front([Variant(name, *point) for name, point in points.items()], less))


@pytest.mark.parametrize(
    ("points", "best"),
    [
        ({"a": (3, 0.7), "b": (1, 0.5), "c": (2, 0.6)}, "bca"),
        ({"a": (1, 0.7), "b": (2, 0.7), "c": (3, 0.8)}, "ac"),  # as good in more bytes
        ({"a": (1, 0.6), "b": (1, 0.7), "c": (2, 0.6)}, "b"),  # better in as many bytes
        ({"a": (1, 0.6), "b": (1, 0.6), "c": (2, 0.6), "d": (2, 0.7), "e": (2, 0.7)}, "abde"),  # alike in both
        ({"a": (5, 0.1)}, "a"),
        ({}, ""),
        ({"a": (1, NAN), "b": (2, 0.5), "c": (3, NAN), "d": (4, 0.6)}, "bd"),
        ({"a": (1, NAN)}, ""),
    ],
)
def test_the_front_of_points_by_hand(points, best):
    assert names(points) == best
    assert names({name: (size, -value) for name, (size, value) in points.items()}, less=True) == best


@pytest.mark.parametrize("less", [False, True])
def test_the_front_is_what_no_other_dominates(less):
    drawn = random.Random(0)
    for _ in range(200):
        variants = [Variant(str(n), drawn.randint(1, 6), drawn.randint(0, 5) / 10) for n in range(drawn.randint(1, 9))]

        def dominated(mine: Variant, variants: list[Variant] = variants) -> bool:
            as_good = [
                v
                for v in variants
                if v.size <= mine.size and (v.value <= mine.value if less else v.value >= mine.value)
            ]
            return any(v[1:3] != mine[1:3] for v in as_good)

        found = front(variants, less)
        assert {v.name for v in found} == {v.name for v in variants if not dominated(v)}
        assert [v.size for v in found] == sorted(v.size for v in found)


def columns(rng: random.Random) -> list[Variant]:
    """Three budgets, as a comparison of all methods at equal bytes has them."""
    return [
        Variant(f"hash embeddings {ratio}x, {n}", 1e8 / ratio, rng.uniform(0.76, 0.88), rng.uniform(0, 0.002))
        for ratio in (20, 100, 500)
        for n in range(13)
    ] + [Variant("full", 1e8, 0.8834, 0.0016)]


def scattered(rng: random.Random) -> list[Variant]:
    return [Variant(f"variant {n}", 10 ** rng.uniform(5, 8), rng.gauss(0.8, 0.01), 0.001) for n in range(40)]


def crowded(rng: random.Random) -> list[Variant]:
    """Nearly all in one spot, far from the others."""
    many = [Variant(f"variant {n}", 10 ** rng.gauss(6, 0.003), rng.gauss(0.8, 0.0003)) for n in range(38)]
    return [*many, Variant("full", 1e8, 0.82), Variant("hash", 1e5, 0.7)]


def long_named(rng: random.Random) -> list[Variant]:
    return [
        v._replace(name=f"{v.name}: users 8 int8 numbers, articles 64 of $x_{{$, then codes") for v in scattered(rng)
    ]


def alike(rng: random.Random) -> list[Variant]:
    return [Variant(f"variant {n}", 1e6, 0.8) for n in range(40)]


@pytest.mark.parametrize(
    ("cloud", "best_possible"),
    [(columns, 0.9), (scattered, None), (crowded, None), (long_named, 0.9), (alike, None)],
)
def test_no_two_labels_overlap_at_forty_points(tmp_path, cloud, best_possible):
    variants = cloud(random.Random(1))
    assert len(variants) == 40
    with figure(tmp_path / "a.png", 9, 6, 130) as drawn:
        draw_pareto(drawn, variants, sizes="bytes", metric="AUC", best_possible=best_possible)
    (axes,), text_type = drawn.axes, type(drawn.axes[0].title)
    assert drawn.dpi == 130  # what is measured is what is written
    area, letters = axes.get_window_extent(), [text for text in axes.texts if text.get_text()]
    extents = [text_type.get_window_extent(text) for text in letters]
    assert len(extents) == 40 + (best_possible is not None)
    for one, other in combinations(extents, 2):
        assert min(one.x1, other.x1) <= max(one.x0, other.x0) or min(one.y1, other.y1) <= max(one.y0, other.y0)
    for box in extents:
        assert area.x0 <= box.x0 and box.x1 <= area.x1 and area.y0 <= box.y0 and box.y1 <= area.y1
    for x, y in (axes.transData.transform(variant[1:3]) for variant in variants):  # nor lies one on a point
        mark = Box(x - 5, y - 5, x + 5, y + 5)
        assert not any(mark.overlaps(Box(*box.extents)) for box in extents)
    told = {text.get_text() for text in letters} - {"best possible"}
    if drawn.legends:  # numbers in the plot, names beside it
        assert told == {str(number) for number in range(1, 41)}
        listed = [text.get_text() for text in drawn.legends[0].get_texts()]
        assert listed == [f"{number}  {variant.name}" for number, variant in enumerate(variants, start=1)]
        assert drawn.legends[0].get_window_extent().x0 >= area.x1
        assert drawn.legends[0].get_window_extent().y0 >= 0 and drawn.legends[0].get_window_extent().x1 <= drawn.bbox.x1
    else:
        assert told == {variant.name for variant in variants}
    assert bool(drawn.legends) is (cloud in (crowded, long_named, alike))


def test_numbers_go_as_far_as_they_must_and_all_names_are_listed_in_the_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(pareto, "_REACH", 0.01)
    variants = [Variant(f"variant {n}", 1e6, 0.8) for n in range(70)]
    with figure(tmp_path / "a.png", 9, 6, 130) as drawn:
        draw_pareto(drawn, variants, sizes="bytes", metric="AUC")
    extent = drawn.legends[0].get_window_extent()
    assert extent.y0 >= 0 and extent.x1 <= drawn.bbox.x1
    places = [text.get_position() for text in drawn.axes[0].texts if text.get_text()]
    assert len(set(places)) == 70 and max(math.hypot(*place) for place in places) > 40


def test_what_is_led_to_its_point():
    points = [(0.0, 0.0), (20.0, 0.0)]
    for box, led in ((Box(3, -1, 6, 1), False), (Box(9, -1, 12, 1), True), (Box(-9, -1, -7, 1), True)):
        assert needs_lead(box, points[0], points, near=6) is led
    assert not needs_lead(Box(5, -1, 8, 1), points[0], points, near=6)
    assert needs_lead(Box(5, -1, 14, 1), points[0], points, near=6)  # nearly the other's


def test_a_label_that_lies_far_from_its_point_is_led_to_it(tmp_path):
    with figure(tmp_path / "a.png", 9, 6, 130) as drawn:
        draw_pareto(drawn, crowded(random.Random(1)), sizes="bytes", metric="AUC")
    axes: Any = drawn.axes[0]
    leads = [text for text in axes.texts if not text.get_text()]
    assert len(leads) > 20 and all(lead.arrow_patch is not None for lead in leads)
    starts = {tuple(lead.xy) for lead in leads}
    far = [text for text in axes.texts if text.get_text() and math.hypot(*text.get_position()) > 40]
    assert far and all(tuple(text.xy) in starts for text in far)


@pytest.mark.parametrize("less", [False, True])
def test_the_line_is_the_front_and_marks_of_it_are_filled(tmp_path, less):
    variants = [Variant("a", 1e5, 0.5), Variant("b", 1e6, 0.7), Variant("c", 2e6, 0.6), Variant("d", 3e6, NAN)]
    with figure(tmp_path / "a.png", 5, 4, 100) as drawn:
        draw_pareto(drawn, variants, sizes="bytes", metric="AUC", less_is_better=less)
    axes: Any = drawn.axes[0]
    (line,) = [line for line in axes.lines if line.get_drawstyle() == "steps-post"]
    best = [variants[0]] if less else variants[:2]
    assert list(zip(*line.get_data(), strict=True)) == [variant[1:3] for variant in best]
    marks = [line for line in axes.lines if line.get_marker() in ("o", "s", "D")]
    filled = [mark.get_xdata()[0] for mark in marks if mark.get_markerfacecolor() != "white"]
    assert filled == [variant.size for variant in best] and len(marks) == 3
    assert {text.get_text() for text in axes.texts} - {""} == {"a", "b", "c"}


def test_one_point(tmp_path):
    with figure(tmp_path / "a.png", 5, 4, 100) as drawn:
        draw_pareto(drawn, [Variant("full", 1e6, 0.7)], sizes="bytes", metric="AUC")
    assert [text.get_text() for text in drawn.axes[0].texts] == ["full"]


def report(held: list[int | None], auc: list[float]) -> dict:
    rows = {
        f"variant {number}": {
            "bytes": 10 ** (number + 3),
            "held_bytes": held[number],
            "usage": {},
            "test": {"auc": {"mean": value, "spread": 0.0}, "logloss": {"mean": 0.5 - value / 10, "spread": 0.01}},
        }
        for number, value in enumerate(auc)
    }
    return {"variants": rows, "bayes": {}}


def test_bytes_held_are_drawn_where_they_are_known(tmp_path):
    both = ["auc_against_bytes.png", "auc_against_held_bytes.png"]
    assert draw(report([None, 5000], [0.7, 0.8]), tmp_path)[:2] == both
    assert draw(report([None, None], [0.7, 0.8]), tmp_path) == [both[0], "logloss_against_bytes.png"]
    # of what has no quality there is no plot
    assert draw(report([7, 5000], [NAN, NAN]), tmp_path) == []
    assert draw(report([7, None], [NAN, 0.8]), tmp_path)[0] == both[0]


def test_less_logloss_is_better_and_the_best_possible_is_a_line(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(plots, "draw_pareto", lambda drawn, variants, **given: asked.append((variants, given)))
    told = report([7, 8], [0.7, 0.8]) | {"bayes": {"bayes_auc": 0.9, "bayes_logloss": 0.3}}
    draw(told, tmp_path)
    assert [(given["metric"], given["less_is_better"], given["best_possible"]) for _, given in asked] == [
        *[("test AUC", False, 0.9)] * 2,
        *[("test logloss", True, 0.3)] * 2,
    ]
    sizes = [[variant.size for variant in variants] for variants, _ in asked]
    assert sizes == [[1000, 10_000], [7, 8]] * 2
    assert [given["sizes"].split(":")[0] for _, given in asked[:2]] == [
        "bytes of all tables, everything counted",
        "bytes held in training",
    ]


def test_the_same_report_is_drawn_to_the_same_bytes(tmp_path):
    drawn = []
    for name in ("a.png", "b.png"):
        with figure(tmp_path / name, 9, 6, 130) as made:
            draw_pareto(made, columns(random.Random(2)), sizes="bytes", metric="AUC")
        drawn.append((tmp_path / name).read_bytes())
    assert drawn[0] == drawn[1]
