"""The self-contained page behind `--html` of `pixellm data stats` and `data show`: figures, bars, cards."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, select_autoescape

_TEMPLATE = "data_page.html.jinja"


@dataclass(frozen=True, slots=True)
class Figure:
    """A number with what it counts."""

    label: str
    value: str


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of a histogram."""

    label: str
    count: int


@dataclass(frozen=True, slots=True)
class Histogram:
    """Bars under a title; `total` is what they are shares of (there may be more than the bars show)."""

    title: str
    bars: tuple[Bar, ...]
    total: int

    @property
    def tallest(self) -> int:
        """The largest count, at least 1."""
        return max([1, *(bar.count for bar in self.bars)])


@dataclass(frozen=True, slots=True)
class Words:
    """A run of text; `color` (CSS) ties it to a mask; `is_marker`: the mask itself stands before it."""

    text: str
    color: str | None = None
    is_marker: bool = False


@dataclass(frozen=True, slots=True)
class CardTurn:
    """A question and its answer in pieces."""

    question: str
    answer: tuple[Words, ...]


@dataclass(frozen=True, slots=True)
class Card:
    """A sample: its picture as a data URL, a line about it, its turns."""

    picture: str
    title: str
    license: str
    turns: tuple[CardTurn, ...]


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page; what is empty is not shown."""

    title: str
    note: str = ""
    figures: tuple[Figure, ...] = ()
    histograms: tuple[Histogram, ...] = ()
    licenses: tuple[tuple[str, int], ...] = ()
    cards: tuple[Card, ...] = ()


def write_page(path: Path, title: str, sections: Sequence[Section]) -> Path:
    """Renders the page into one file that needs no other; its folder is made. Returns its path."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["jinja", "html"]),
        trim_blocks=True,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    page = environment.get_template(_TEMPLATE).render(title=title, sections=sections)
    path.write_text(page, encoding="utf-8")
    return path
