from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import pytest

from torchrec_compress.schema import Natural, Positive, Range, Text, build, nearest, plain, settle_numbers, words
from torchrec_compress.train.command_line import read
from torchrec_compress.train.config import RunConfig


@dataclass(frozen=True)
class Inner:
    width: Positive
    rate: Annotated[float, Range(0, 1, above=True)] = 0.5


@dataclass(frozen=True)
class Outer:
    name: Literal["a", "b"] = "a"
    count: Natural | None = None
    text: str | None = "x"
    flag: bool = False
    sizes: Positive | dict[str, Positive] | None = None
    widths: list[Positive] = field(default_factory=list)
    shares: tuple[float, ...] = ()
    inner: Inner = field(default_factory=lambda: Inner(4))
    many: dict[str, Inner] = field(default_factory=dict)
    free: dict[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"namee": "a"}, "unknown key 'namee'; did you mean 'name'\\?"),
        ({"inner": {"widthh": 3}}, "unknown key 'inner.widthh'; did you mean 'inner.width'\\?"),
        ({"rate": 0.1}, "unknown key 'rate'; did you mean 'inner.rate'\\?"),
        ({"name": "c"}, r"name: must be one of \['a', 'b'\], got 'c'"),
        ({"name": True}, "name: must be one of"),
        ({"count": -1}, "count: must be at least 0, got -1"),
        ({"count": True}, "count: must be int at least 0 or null, got True"),
        ({"count": 3.0}, "count: must be int"),
        ({"count": 2**63}, "count: must be int of at most 64 bits"),
        ({"text": 3}, "text: must be str or null, got 3"),
        ({"text": "a\0b"}, "text: must be text without NUL"),
        ({"text": "\udcff"}, "text: must be text without NUL and of valid Unicode"),
        ({"flag": 1}, "flag: must be bool, got 1"),
        ({"sizes": 0}, "sizes: must be at least 1, got 0"),
        ({"sizes": {"u": 0}}, "sizes.u: must be at least 1, got 0"),
        ({"sizes": "x"}, "sizes: must be int at least 1 or a mapping or null, got 'x'"),
        ({"widths": [4, 0]}, r"widths\[1\]: must be at least 1, got 0"),
        ({"widths": 4}, "widths: must be a list, got 4"),
        ({"shares": [0.5, "x"]}, r"shares\[1\]: must be float, got 'x'"),
        ({"shares": 0.5}, "shares: must be a list, got 0.5"),
        ({"inner.rate": 0}, r"inner.rate: must be in \(0, 1\], got 0"),
        ({"inner.rate": math.nan}, "inner.rate: must be finite, got nan"),
        ({"inner.rate": 10**400}, "inner.rate: must be finite, got an int of 1329 bits"),
        ({"inner": {"rate": math.inf}}, "inner.rate: must be finite, got inf"),
        ({"inner": 3}, "inner: must be a mapping, got 3"),
        ({"many": {"a": {}}}, r"many.a: must set \['width'\]"),
        ({"many": {"a": {"width": "x"}}}, "many.a.width: must be int"),
        ({"many": {3: {"width": 4}}}, "many: keys must be text, got 3; put it in quotes"),
        ({"free": {"a": object()}}, "free.a: must be plain data, got <object"),
        ({"free": {"a": {True: 1}}}, "free.a: keys must be text, got True"),
        ({"free": {"a": [math.inf]}}, r"free.a\[0\]: must be finite"),
        ({"name.a": 1}, "name: has no keys of its own, got 'a'"),
        ({5: 1}, "config: keys must be text, got 5"),
        ([1], "config: must be a mapping of keys, got a list of 1"),
    ],
)
def test_every_wrong_value_names_its_key(values, message):
    with pytest.raises(ValueError, match=message):
        build(Outer, values)


def test_integers_of_numpy_are_ints_and_nothing_else_is():
    made = build(Outer, {"count": np.int64(3), "inner": {"width": np.uint8(4), "rate": np.float32(0.5)}})
    made = build(Outer, {"free": {"a": [np.int16(2)]}}, base=made)
    kinds = [type(value) for value in (made.count, made.inner.width, made.inner.rate, made.free["a"][0])]
    assert made == Outer(count=3, inner=Inner(4, 0.5), free={"a": [2]}) and kinds == [int, int, float, int]
    for bad in (np.bool_(True), np.float64(3), np.array([3])):
        with pytest.raises(ValueError, match="count: must be int at least 0 or null, got"):
            build(Outer, {"count": bad})


def test_texts_and_numbers_of_numpy_are_pythons_own_in_code():
    @dataclass(frozen=True)
    class Made:
        name: str
        kind: Literal["a", "b"]
        count: int

    made = Made(np.str_("x"), np.str_("a"), np.int8(3))  # type: ignore[arg-type]
    settle_numbers(made)
    assert [type(value) for value in (made.name, made.kind, made.count)] == [str, str, int] and made.kind == "a"


def test_nested_keys_change_what_they_name_and_nothing_else():
    start = build(Outer, {"inner.rate": 1, "free": {"a": {"b": 1}}, "many.x": {"width": 2}})
    assert start.inner == Inner(4, 1.0) and type(start.inner.rate) is float
    changed = build(Outer, {"inner": {"width": 8}, "free.a.c": 2, "many.x.rate": 0.25, "sizes.a.b": 3}, base=start)
    assert changed.inner == Inner(8, 1.0) and changed.free == {"a": {"b": 1, "c": 2}}
    assert changed.many == {"x": Inner(2, 0.25)} and changed.sizes == {"a.b": 3}
    assert start.free == {"a": {"b": 1}}, "what was given is never written to"
    assert build(Outer, {"free": {"z": 1}}, base=start).free == {"z": 1}, "a mapping of free keys is replaced"


def test_text_is_read_as_its_key_asks():
    def given(key: str, text: str) -> Any:
        return getattr(build(Outer, {key: Text(text, lambda text: {"[1]": [1], "7": 7, "null": None}[text])}), key)

    assert given("text", "7") == "7" and given("text", "null") is None and given("name", "b") == "b"
    assert given("count", "7") == 7 and given("widths", "[1]") == [1] and given("sizes", "null") is None


def test_aliases_cannot_make_a_value_that_does_not_fit():
    bomb: Any = [1] * 10
    for _ in range(12):
        bomb = [bomb] * 10
    endless: list[Any] = []
    endless.append(endless)
    for value in (bomb, endless):
        with pytest.raises(ValueError, match=r"key.*: must hold at most"):
            plain(value, "key")
        with pytest.raises(ValueError, match="text: must be str or null, got a list of"):
            build(Outer, {"text": value})


def test_words_and_the_nearest_name():
    assert words(int | None) == "int or null" and words(Positive) == "int at least 1"
    assert nearest("x", []) == "" and nearest("withd", ["width"]) == "; did you mean 'width'?"


@pytest.mark.parametrize("text", ["!!bool maybe", "!!timestamp x", "!!int ''", "!!python/name:os.system"])
def test_a_tag_whose_value_does_not_fit_names_the_key(text):
    with pytest.raises(ValueError, match=r"seed: must be YAML of plain data"):
        read(RunConfig(), ["--seed", text], "train")
