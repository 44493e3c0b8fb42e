"""`pixellm data show`: samples with their masks, questions and answers, as a picture or a self-contained page."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from pixellm.jobs.data_page import Card, CardTurn, Section, Words, write_page
from pixellm.platform.data.compose import Dialogue
from pixellm.platform.data.contact_sheet import (
    MARKER_WORD,
    Color,
    choose_samples,
    coloured_turns,
    draw_contact_sheet,
    paint_sample,
    sample_title,
)
from pixellm.platform.data.schema import Row
from pixellm.platform.data.shards import open_shards

_MAX_SIDE_PX = 640
_JPEG_QUALITY = 82


def show(uri: str | Path | Sequence[str | Path], out_png: str | Path, n: int = 12) -> Path:
    """Draws a contact sheet into a PNG file.

    Args:
        uri: of shards, or of several.
        out_png: the file; its folder is made.
        n: samples, spread evenly over the shards, with their masks, question and answer.
    """
    return draw_contact_sheet([open_shards(one) for one in _listed(uri)], Path(out_png), n)


def write_samples_page(uri: str | Path | Sequence[str | Path], path: str | Path, n: int = 12) -> Path:
    """Writes samples of each of some shards as one self-contained HTML file; returns its path.

    Args:
        uri: of shards, or of several.
        path: the file; its folder is made.
        n: samples of each of the shards, spread evenly.
    """
    sections = []
    for one in _listed(uri):
        dataset = open_shards(one)
        cards = tuple(_card(row, dialogue) for row, dialogue in choose_samples([dataset], n))
        note = f"{one} · {len(dataset):,} pictures · digest {dataset.digest[:12]}"
        sections.append(Section(title=dataset.info.name, note=note, cards=cards))
    return write_page(Path(path), "Samples", sections)


def _listed(uri: str | Path | Sequence[str | Path]) -> list[str | Path]:
    return [uri] if isinstance(uri, str | Path) else list(uri)


def _card(row: Row, dialogue: Dialogue | None) -> Card:
    turns = tuple(CardTurn(question, _joined(words)) for question, words in coloured_turns(row, dialogue))
    return Card(_data_url(paint_sample(row, dialogue)), sample_title(row, dialogue), row.license, turns)


def _joined(words: Sequence[tuple[str, Color | None]]) -> tuple[Words, ...]:
    """Runs of one colour as one piece, with spaces where a person writes them."""
    pieces: list[Words] = []
    for word, color in words:
        css = "rgb({}, {}, {})".format(*color) if color else None
        space = " " if pieces and word[0] not in ".,;:!?" else ""
        if word == MARKER_WORD:
            pieces += [Words(space), Words("", css, is_marker=True)]
        elif pieces and pieces[-1].is_marker and not space:
            pieces[-1] = Words(word, pieces[-1].color, is_marker=True)
        elif pieces and pieces[-1].color == css and not pieces[-1].is_marker:
            pieces[-1] = Words(pieces[-1].text + space + word, css)
        else:
            pieces += [Words(space), Words(word, css)] if css else [Words(space + word)]
    return tuple(piece for piece in pieces if piece.text or piece.is_marker)


def _data_url(picture: Image.Image) -> str:
    picture.thumbnail((_MAX_SIDE_PX, _MAX_SIDE_PX))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
