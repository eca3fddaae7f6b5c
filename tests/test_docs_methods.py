"""docs/methods.md: every method has its section, and what a section says of settings, bytes and figures is so."""

import dataclasses
import re
from pathlib import Path

import pytest
from torchrec import EmbeddingBagConfig

from torchrec_compress import methods
from torchrec_compress.methods import METHODS, CodebookConfig

README = Path(__file__).parents[1] / "README.md"
PAGE = README.parent / "docs" / "methods.md"
SECTIONS = dict(re.findall(r"^## (.+)\n\n((?:(?!^## ).*\n)*)", PAGE.read_text(), flags=re.MULTILINE))
SHARED = "What all codes share"
LINK = re.compile(r"\[[^\]]+\]\(([^)#]*)#?([^)]*)\)")
FIGURE = re.compile(r"(?<![\d.])\.\d{4}\b")
each = pytest.mark.parametrize("name", METHODS)


def fields(config: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


def settings(text: str) -> tuple[str, set[str]]:
    """Return the class that the first sentence of a section names, and its settings."""
    first = " ".join(text.split("\n\n")[0].split()).split(". ")[0].rstrip(".")
    name, *named = re.findall(r"`([^`]+)`", first)
    inherited = fields(CodebookConfig) if "CodebookConfig" in named else set()
    return name, inherited | ({*named} - {"CodebookConfig"})


def anchors(page: Path) -> set[str]:
    """Return how the headings of a page are linked to."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_method_has_one_section_and_the_readme_links_to_it() -> None:
    headings = re.findall(r"^## (.+)$", PAGE.read_text(), flags=re.MULTILINE)
    assert sorted(headings) == sorted([SHARED, *(f"`{name}`" for name in METHODS)])
    assert "(docs/methods.md)" in README.read_text()


@each
def test_a_section_names_the_config_and_all_its_settings(name: str) -> None:
    assert settings(SECTIONS[f"`{name}`"]) == (METHODS[name].__name__, fields(METHODS[name]))


def test_what_codes_share_are_the_settings_of_their_config() -> None:
    assert settings(SECTIONS[SHARED]) == ("CodebookConfig", fields(CodebookConfig))


@each
def test_bytes_are_those_of_the_config(name: str) -> None:
    table = EmbeddingBagConfig(name="user", num_embeddings=1_000_000, embedding_dim=64, feature_names=["user"])
    told = re.findall(rf"`({METHODS[name].__name__}\([^`]*\))`:\s+([\d,]+)", SECTIONS[f"`{name}`"])
    assert told
    for config, number in told:
        assert f"{eval(config, dict(vars(methods))).stored_bytes(table):,}" == number.rstrip(","), config


@each
def test_figures_stand_where_their_links_lead(name: str) -> None:
    for line in SECTIONS[f"`{name}`"].split("\n- "):
        linked = "".join((PAGE.parent / path).read_text() for path, _ in LINK.findall(line) if path)
        assert [figure for figure in FIGURE.findall(line) if figure not in linked] == [], line


def test_links_lead_somewhere() -> None:
    links = LINK.findall(PAGE.read_text())
    assert len(links) > 20
    for path, anchor in links:
        page = (PAGE.parent / path) if path else PAGE
        assert page.exists(), path
        assert not anchor or anchor in anchors(page), f"{path}#{anchor}"
