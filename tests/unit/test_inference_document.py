"""The parts of pages: escaping, charts, frames that are read back, figures compared."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavatar.inference.cards import Card, draw_card, read_cards
from lavatar.inference.chart import POINTS, Curve, chart, thinned, value_axis
from lavatar.inference.compared import compared, compared_measures, rows_of
from lavatar.inference.document import Html, document, grid, joined, tag


class Texts(HTMLParser):
    """The elements and the text of a fragment."""

    def __init__(self, fragment: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(fragment)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


@given(st.text(alphabet=st.characters(exclude_characters="\r\0", exclude_categories=["Cs"])))
def test_any_text_is_text_wherever_it_stands(text: str) -> None:
    found = Texts(tag("p", text, tag("b", text), title=text))
    assert (found.names, found.attributes, found.text) == (["p", "b"], [("title", text)], text + text)
    table = Texts(grid([text, "b"], [(text, text)], caption=text or "c"))
    assert set(table.names) == {"div", "table", "caption", "thead", "tr", "th", "tbody", "td"}


def test_attributes_and_what_is_left_out() -> None:
    assert tag("video", None, class_="a", aria_label="b", muted=True, loop=False, src=None) == (
        '<video class="a" aria-label="b" muted></video>'
    )
    assert joined(["<", tag("br"), None, ">"], " ") == "&lt; <br> &gt;"


def test_the_policy_lets_in_the_pages_own_style_and_script_alone() -> None:
    text = document("t", [Html("<p>x</p>")], "p { color: red; }", "let a = 1;")
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', text)
    for name, kind in (("style", "style-src"), ("script", "script-src")):
        (inner,) = re.findall(rf"<{name}>(.*)</{name}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert not re.search(r"unsafe|https?:|\*", policy)
    assert "script-src 'none'" in document("t", [])


def test_curves_are_thinned_to_the_means_of_neighbours() -> None:
    few = [(i, float(i)) for i in range(POINTS)]
    assert thinned(few) == tuple(few)
    many = [(i, float(i % 2)) for i in range(4 * POINTS)]
    assert thinned(many) == tuple((4 * i + 3, 0.5) for i in range(POINTS))


@pytest.mark.parametrize(
    ("values", "ends", "logarithmic"),
    [
        ([0.001, 0.5], (0.001, 1.0), True),
        ([1e-30, 1.0], (1e-8, 1.0), True),
        ([0.0, 0.0003, 0.2], (1e-4, 1.0), True),
        ([0.31, 0.42], (0.3, 0.45), False),
        ([-0.5, 100.0], (-50.0, 100.0), False),
        ([7.0, 7.0], (6.0, 8.0), False),
        ([0.0], (0.0, 0.2), False),
        ([0.001, 0.001], (0.0008, 0.0012), False),
    ],
)
def test_the_axis_has_round_ends_that_hold_all_values(
    values: list[float], ends: tuple[float, float], logarithmic: bool
) -> None:
    axis = value_axis(values)
    assert axis.logarithmic == logarithmic
    assert (axis.low, axis.high) == pytest.approx(ends)
    assert [axis.share(axis.low), axis.share(axis.high)] == [0.0, 1.0]


def test_a_chart_breaks_where_values_are_not_finite_and_names_its_curves() -> None:
    gap = Curve("a<b>", ((0, 1.0), (1, 2.0), (2, float("nan")), (3, 2.0), (4, float("inf"))))
    drawn = chart("title", [gap, Curve("flat", ((0, 1.0), (8, 1.0)))], last=16)
    assert re.findall(r'points="([^"]+)"', drawn)[0].count(",") == 2
    assert len(re.findall("<polyline", drawn)) == 2
    assert len(re.findall("<circle", drawn)) == 1, "the value between the gaps"
    assert "a&lt;b&gt;" in drawn
    assert "<b>" not in drawn
    assert "step 16" in drawn
    assert "No value is finite." in chart("t", [Curve("x", ((1, float("nan")),))])


def test_frames_are_read_back_and_nothing_else_is() -> None:
    address = "data:image/png;base64,AAAA"
    cards = [
        Card("Self", "best", [("a", address), ("b<", address)], "frame 1"),
        Card("Cross", "", [("c", address)], "x"),
    ]
    outside = f'<img alt="scale" src="{address}">'
    text = "".join(
        f"<h2>{card.section}</h2>{outside}" + (f"<h3>{card.kind}</h3>" if card.kind else "") + draw_card(card)
        for card in cards
    )
    assert read_cards(text + outside) == cards
    for src in (
        "http://127.0.0.1/x",
        "data:text/html;base64,AAAA",
        'data:image/png;base64,AA"',
        "data:image/png;base64,",
    ):
        assert read_cards(f"<div class=frame><img alt=a src='{src}'></div>") == []
    assert read_cards("<div class='frame'><h2><img><<<") == []


def test_figures_are_compared_the_right_way_round() -> None:
    first = {
        "psnr": 27.0, "lpips": 0.1, "spread": {"psnr": 1.0}, "flicker": 2.001,
        "expression": {"jaw": {"r": 0.5, "amplitude": 1.2}}, "landmark_error": {"mouth": 0.02, "eyes": None},
    }  # fmt: skip
    second = {
        "psnr": 28.5, "lpips": 0.2, "flicker": 2.002,
        "expression": {"jaw": {"r": 0.7, "amplitude": 0.9}}, "landmark_error": {"mouth": 0.03},
    }  # fmt: skip
    found = {each.figure.name: each for each in (*compared(first, second), *compared_measures(first, second))}
    assert found["PSNR"].cells == ("27.00 ± 1.00", "28.50")
    assert found["PSNR"].difference == 1.5
    verdicts = {name: each.verdict for name, each in found.items()}
    assert verdicts == {
        "PSNR": "better", "LPIPS": "worse", "flicker, 255ths": "the same", "mouth, %": "worse",
        "expression r": "better", "jaw r": "better", "jaw amplitude": "better",
    }  # fmt: skip
    assert found["mouth, %"].cells == ("2.0", "3.0")
    (alone,) = compared({}, {"psnr": 1.0})
    assert (alone.cells, alone.difference, alone.verdict) == (("-", "1.00"), None, "")
    names = [name for name, _, _ in rows_of({"self": first}, {"cross": {"truth": second}})]
    assert names == ["self", "cross", "cross against truth"]
