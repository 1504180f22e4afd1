"""Frames as the page of an evaluation shows them: drawn, and read from such a page again for pages that sum up."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

from lavatar.inference.document import Html, tag

_NUMBER = re.compile(r"&#[0-9]{100,};?")
"""A character by a number that none has, and that may be too long to be read."""
_PICTURE = re.compile(r"data:image/(?:jpeg|png);base64,[A-Za-z0-9+/=]+")


@dataclass
class Card:
    """One frame. `kind`: best, median or worst, empty where frames have no order. Pictures: label and data address."""

    section: str
    kind: str
    pictures: list[tuple[str, str]] = field(default_factory=list)
    text: str = ""


def draw_card(card: Card, numbers: Html | None = None) -> Html:
    """`numbers`: the text with more markup than the card's own."""
    figures = [
        tag("figure", tag("img", alt=label, src=address), tag("figcaption", label)) for label, address in card.pictures
    ]
    below = tag("div", numbers or card.text, class_="numbers")
    return tag("div", tag("div", *figures, class_="pictures"), below, class_="frame")


def read_cards(page: str) -> list[Card]:
    """The frames of an evaluation's page, in order. Whatever else stands there is left out."""
    reader = _Reader()
    reader.feed(_NUMBER.sub("\N{REPLACEMENT CHARACTER}", page))
    reader.close()
    return [card for card in reader.cards if card.pictures]


class _Reader(HTMLParser):
    """Collects what `draw_card` wrote: addresses of pictures and text, never markup."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.cards: list[Card] = []
        self._heading, self._kind = "", ""
        self._into = ""  # where text goes: h2, h3, numbers
        self._open = False  # in a card, above its numbers

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        if name == "h2":
            self._into, self._heading, self._kind = "h2", "", ""
        elif name == "h3":
            self._into, self._kind = "h3", ""
        elif name == "div" and given.get("class") == "frame":
            self.cards.append(Card(self._heading, self._kind))
            self._open = True
        elif name == "div" and given.get("class") == "numbers":
            self._into, self._open = "numbers", False
        elif name == "img" and self._open and _PICTURE.fullmatch(given.get("src", "")):
            self.cards[-1].pictures.append((given.get("alt", ""), given["src"]))

    def parse_marked_section(self, i: int, report: bool = True) -> int:
        """Of a kind that HTMLParser knows; where that gives up, up to the next end of a tag."""
        try:
            return super().parse_marked_section(i, report)
        except AssertionError:
            return self.parse_bogus_comment(i)

    def handle_endtag(self, name: str) -> None:
        if name in ("h2", "h3", "div"):
            self._into = ""

    def handle_data(self, data: str) -> None:
        if self._into == "h2":
            self._heading += data
        elif self._into == "h3":
            self._kind += data
        elif self._into == "numbers" and self.cards:
            self.cards[-1].text += data
