import itertools
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from askew.errors import ArtifactError
from askew.overview import CATEGORIES, MAX_LABELS, MEASURES, SHOWN, Tally, page, plots

EVIL = '<script>alert(1)</script><img src=x onerror="alert(1)">\'"&amp; $\\frac{ \x00 \ud800 \u202e 漢字'
VOID = {"meta", "br", "img", "link", "input"}


def full(seed: int = 0) -> Tally:
    """A tally with something in every measure and category."""
    random, tally = np.random.default_rng(seed), Tally()
    for name in MEASURES:
        tally.add(name, random.lognormal(3, 1, 500))
    for name in CATEGORIES:
        tally.count(name, {"a": 7, "b": int(random.integers(1, 7))})
    return tally


class Outline(HTMLParser):
    """What a browser would make of a page: its elements with their attributes, properly nested, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, *tags: str) -> Iterator[dict[str, str | None]]:
        return (attributes for tag, attributes in self.elements if tag in tags)


# --- counts --------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 3000), max_size=30), min_size=1, max_size=5))
def test_tallies_of_chunks_add_up_to_the_tally_of_the_whole(chunks: list[list[int]]) -> None:
    whole, merged = Tally(), Tally()
    for values, into in [(list(itertools.chain(*chunks)), whole), *((chunk, merged) for chunk in chunks)]:
        part = Tally()
        for name in MEASURES:
            part.add(name, np.array(values, dtype=float))
        part.count("grades", {"1": len(values)})
        into.merge(Tally.from_json(part.to_json()))
    assert merged.to_json() == whole.to_json()


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=200), st.sampled_from([0.0, 0.05, 0.5, 0.95, 1.0]))
def test_quantiles_are_within_a_quarter_of_the_exact_ones(values: list[int], fraction: float) -> None:
    tally = Tally()
    tally.add("image_bytes", np.array(values))
    exact = int(np.quantile(values, fraction, method="inverted_cdf"))
    found = tally.quantile("image_bytes", fraction)
    assert found is not None
    assert abs(found - exact) <= 0.34 * exact  # the widest bin of small numbers holds 6 and 7, of others a quarter


@given(st.lists(st.integers(0, 39), min_size=1), st.floats(0, 1))
def test_quantiles_in_bins_of_one_number_are_exact(values: list[int], fraction: float) -> None:
    tally = Tally()
    tally.add("query_words", np.array(values))
    rank = max(int(np.ceil(fraction * len(values))), 1)
    assert tally.quantile("query_words", fraction) == sorted(values)[rank - 1]


def test_what_is_beyond_the_bins_is_counted_and_nan_is_missing() -> None:
    tally = Tally()
    tally.add("query_words", np.array([-3.0, 1.0, 700.0, 1e300, np.nan, np.inf]))
    histogram = tally.histograms["query_words"]
    assert (histogram.size, histogram.missing, histogram.low) == (4, 2, -3)
    assert histogram.counts[[0, 1, -1]].tolist() == [1, 1, 2]
    assert tally.quantile("query_words", 0.0) == 0  # the lower edge of the first bin
    assert tally.quantile("query_words", 1.0) is not None


@pytest.mark.parametrize("values", [np.array([]), np.array([np.nan])], ids=["none", "missing"])
def test_a_measure_without_values_has_no_quantile_and_no_plot(values: np.ndarray) -> None:  # type: ignore[type-arg]
    tally = Tally()
    tally.add("title_characters", values)
    assert tally.quantile("title_characters", 0.5) is None
    assert tally.quantile("image_bytes", 0.5) is None
    assert plots(tally) == {}
    assert "Nothing was measured" in page(tally, {})


@pytest.mark.parametrize("kind", [np.int32, np.uint64, np.float32, np.bool_])
def test_values_of_every_type_are_counted(kind: type) -> None:
    tally = Tally()
    tally.add("items_per_query", np.array([0, 1, 1]).astype(kind))
    assert tally.histograms["items_per_query"].counts[:2].tolist() == [1, 2]


def test_json_is_read_back_and_does_not_depend_on_the_order_of_counting() -> None:
    one, other = Tally(), Tally()
    one.merge(full())
    one.count("splits", {"x": 1})
    other.count("splits", {"x": 1})
    other.merge(full())
    assert one.to_json() == other.to_json() == Tally.from_json(one.to_json()).to_json()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"histograms": {"image_bytes": {"counts": [1, 2]}}, "categories": {}}',
        '{"histograms": {"unheard_of": {"counts": []}}, "categories": {}}',
        '{"histograms": {"image_bytes": {}}, "categories": {}}',
        '{"histograms": [], "categories": {}}',
    ],
)
def test_json_that_is_no_tally_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match="tally"):
        Tally.from_json(text)


def test_an_unknown_measure_or_category_is_a_mistake_of_the_program() -> None:
    with pytest.raises(KeyError):
        Tally().add("unheard_of", np.zeros(1))
    with pytest.raises(AssertionError, match="unheard_of"):
        Tally().count("unheard_of", {})


# --- plots ---------------------------------------------------------------------------------------


def test_there_is_a_plot_of_each_measure_always_of_the_same_bytes() -> None:
    drawn = plots(full())
    assert list(drawn) == [f"{name}.svg" for name in MEASURES]
    assert drawn == plots(full())
    for svg in drawn.values():
        assert ET.fromstring(svg).tag.endswith("svg")  # noqa: S314


@pytest.mark.parametrize("values", [[0], [39], [40], [10**9], [0, 10**9], list(range(60))], ids=str)
@pytest.mark.parametrize("name", MEASURES)
def test_every_range_of_values_is_drawn(name: str, values: list[int]) -> None:
    tally = Tally()
    tally.add(name, np.array(values))
    assert b"</text>" in plots(tally)[f"{name}.svg"]


# --- page ----------------------------------------------------------------------------------------


def test_text_of_any_kind_comes_out_inert() -> None:
    tally = full()
    for name in SHOWN:
        tally.count(name, {EVIL: 3})
    text = page(tally, {EVIL: EVIL, "list": [EVIL], "mapping": {EVIL: EVIL}})
    outline = Outline(text)
    assert not list(outline.named("script", "img", "iframe", "object", "link"))
    assert not [key for _, attributes in outline.elements for key in attributes if key.startswith("on")]
    assert "<script>alert(1)</script>" in outline.text  # shown as it is
    assert "\x00" not in text
    text.encode()


def test_the_page_fetches_nothing() -> None:
    text = page(full(), {"home": "https://example.org/"})
    outline = Outline(text)
    names = ("src", "href", "srcset", "action", "data", "xlink:href")
    links = [attributes[name] or "" for _, attributes in outline.elements for name in names if name in attributes]
    assert all(link.startswith("#") for link in links)
    assert not re.search(r"@import|url\((?!#)", text)
    assert any(meta.get("content", "").startswith("default-src 'none'") for meta in outline.named("meta"))  # type: ignore[union-attr]


def test_the_page_can_be_read_without_seeing_it() -> None:
    outline = Outline(page(full(), {"items": 3}))
    assert all(th.get("scope") in ("row", "col") for th in outline.named("th"))
    labels = [svg["aria-label"] for svg in outline.named("svg")]
    assert len(labels) == len(MEASURES) == len(list(outline.named("figcaption")))
    assert all(label and "median" in label for label in labels)
    assert all(svg["role"] == "img" for svg in outline.named("svg"))
    assert [attributes["lang"] for attributes in outline.named("html")] == ["en"]
    ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_page_follows_light_and_dark_mode_with_its_plots() -> None:
    text = page(full(), {})
    assert "prefers-color-scheme: dark" in text
    figures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    colours = set(re.findall(r"(?:fill|stroke): ?([^;\"]+)", "".join(figures)))
    assert colours <= {"none", "var(--ink)", "var(--bar)"}


def test_the_page_has_the_same_bytes_in_every_process() -> None:
    code = (
        "import hashlib, numpy, askew.overview as o; t = o.Tally(); t.add('image_bytes', numpy.arange(999));"
        "t.count('splits', {'b': 1, 'a': 1}); print(hashlib.sha256(o.page(t, {'k': 1}).encode()).hexdigest())"
    )
    runs = [subprocess.check_output([sys.executable, "-c", code], text=True) for _ in range(2)]
    assert runs[0] == runs[1]


def test_labels_are_in_order_and_those_of_a_long_tail_are_one_row() -> None:
    tally = Tally()
    tally.count("grades", {"10": 1, "2": 5, "-1": 3})
    tally.count("quarantined", {f"item/{n}": n + 1 for n in range(MAX_LABELS + 30)})
    text = Outline(page(tally, {})).text
    assert re.search(r"-1.*2.*10", text, re.DOTALL)
    assert "30 others" in text
    assert text.index("item/79") < text.index("item/78") < text.index("30 others")
    assert "item/29" not in text


def test_missing_cells_are_shares_of_their_column() -> None:
    tally = Tally()
    tally.count("cells", {"title": 200, "brand": 50})
    tally.count("missing", {"title": 20, "brand": 25})
    text = Outline(page(tally, {})).text
    assert "10.0%" in text
    assert "50.0%" in text
    assert CATEGORIES["cells"].title not in text


def test_a_page_of_nothing_is_a_page() -> None:
    assert "Nothing was counted" in Outline(page(Tally(), {})).text
