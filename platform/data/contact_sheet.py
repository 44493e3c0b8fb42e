"""A contact sheet: samples side by side, their masks in colour, the question and the answer written underneath.

The words in an answer that belong to a mask carry its colour, so that a wrong pairing is seen at a glance.
"""

import colorsys
import importlib.util
import io
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, ImageOps

from pixellm.platform.data.compose import ComposeLimits, Dialogue, Group, can_compose, compose
from pixellm.platform.data.schema import SEG_MARKER, Row
from pixellm.platform.data.shards import ShardedDataset
from pixellm.platform.masks import rle_decode

_CELL_WIDTH = 420
_PICTURE_HEIGHT = 300
_TEXT_HEIGHT = 172
_MARGIN = 14
_COLUMNS = 4
_FONT_PX = 14
_TITLE_PX = 12
_INK = (30, 30, 34)
_GREY = (120, 120, 128)

#: Stands in a coloured answer for the mask itself.
MARKER_WORD = "\0"

#: Where a row can give such a question, it is what the row is about.
_TELLING_GROUPS: tuple[Group, ...] = ("muse", "referring")

Color = tuple[int, int, int]
_Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def draw_contact_sheet(datasets: Sequence[ShardedDataset], out_png: Path, count: int = 12, *, seed: int = 0) -> Path:
    """Draws samples spread evenly over the datasets, their kinds of questions in turn.

    Args:
        datasets: shards of any kind, at least one.
        out_png: the file to write; its folder is made.
        count: samples, at most.
        seed: of the composed questions.
    """
    cells = [draw_sample(row, dialogue) for row, dialogue in choose_samples(datasets, count, seed=seed)]
    columns = min(_COLUMNS, len(cells))
    step_x, step_y = _CELL_WIDTH + _MARGIN, _PICTURE_HEIGHT + _TEXT_HEIGHT + _MARGIN
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * step_x + _MARGIN, rows * step_y + _MARGIN), "white")
    for position, cell in enumerate(cells):
        sheet.paste(cell, (_MARGIN + position % columns * step_x, _MARGIN + position // columns * step_y))
    out_png.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out_png)
    return out_png


def choose_samples(
    datasets: Sequence[ShardedDataset], count: int, *, seed: int = 0
) -> Iterator[tuple[Row, Dialogue | None]]:
    """Yields at most `count` samples, as many of each dataset and spread over it, with a question if there is one."""
    position = 0
    for place, dataset in enumerate(datasets):
        share = count // len(datasets) + (place < count % len(datasets))
        for number in np.unique(np.linspace(0, len(dataset) - 1, min(share, len(dataset))).round().astype(int)):
            row = dataset.read_row(int(number))
            yield row, _some_dialogue(row, position, seed)
            position += 1


def draw_sample(row: Row, dialogue: Dialogue | None) -> Image.Image:
    """One cell: the picture with the masks that the dialogue asks for (all of them without one), and its text."""
    cell = Image.new("RGB", (_CELL_WIDTH, _PICTURE_HEIGHT + _TEXT_HEIGHT), "white")
    picture = ImageOps.contain(paint_sample(row, dialogue), (_CELL_WIDTH, _PICTURE_HEIGHT))
    cell.paste(picture, ((_CELL_WIDTH - picture.width) // 2, 0))
    _write_text(ImageDraw.Draw(cell), row, dialogue)
    return cell


def paint_sample(row: Row, dialogue: Dialogue | None) -> Image.Image:
    """The picture at its own size with the masks that the dialogue asks for; all of the row's without a dialogue."""
    indices = dict.fromkeys(dialogue.target_indices if dialogue else range(len(row.targets)))
    photo = ImageOps.exif_transpose(Image.open(io.BytesIO(row.image))).convert("RGB")
    masks = [rle_decode(row.targets[index].mask) for index in indices]
    return Image.fromarray(paint_masks(np.asarray(photo), masks, palette(len(indices))))


def sample_title(row: Row, dialogue: Dialogue | None) -> str:
    """A line that says which picture it is, and what kind of question is asked."""
    kind = dialogue.kind if dialogue else "no question"
    return f"{row.source} {row.image_id} · {kind} · {row.width}×{row.height}"


def coloured_turns(row: Row, dialogue: Dialogue | None) -> list[tuple[str, list[tuple[str, Color | None]]]]:
    """Each question with its answer's words; a target's name and `MARKER_WORD` have the colour of its mask."""
    asked = dict.fromkeys(dialogue.target_indices) if dialogue else {}
    color_of = dict(zip(asked, palette(len(asked)), strict=True))
    names_of = {index: {row.targets[index].phrase} for index in asked}
    for known in row.dialogues:
        for index, phrase in zip(known.target_ids, known.phrases, strict=False):
            names_of.get(index, set()).add(phrase)
    return [
        (
            turn.question,
            _coloured_words(
                turn.answer,
                [names_of[index] for index in turn.target_indices],
                [color_of[index] for index in turn.target_indices],
            ),
        )
        for turn in (dialogue.turns if dialogue else ())
    ]


def paint_masks(
    picture_HW3: npt.NDArray[np.uint8], masks: list[npt.NDArray[np.bool_]], colors: list[Color]
) -> npt.NDArray[np.uint8]:
    """Tints each mask (H×W bool) in its colour and draws its outline; returns a new H×W×3 uint8 picture."""
    painted = picture_HW3.astype(np.float32)
    for mask, color in zip(masks, colors, strict=True):
        painted[mask] = 0.5 * painted[mask] + 0.5 * np.asarray(color, dtype=np.float32)
    for mask, color in zip(masks, colors, strict=True):
        painted[_outline(mask)] = color
    return painted.round().astype(np.uint8)


def palette(count: int) -> list[Color]:
    """Colours far apart in hue, strong enough to be read as text on white."""
    colors: list[Color] = []
    for index in range(count):
        hue = (0.98 + index * 0.618034) % 1.0
        red, green, blue = colorsys.hsv_to_rgb(hue, 0.9, 0.72 if 0.1 < hue < 0.55 else 0.9)
        colors.append((round(255 * red), round(255 * green), round(255 * blue)))
    return colors


def _some_dialogue(row: Row, position: int, seed: int) -> Dialogue | None:
    """The row's reasoning question, or one by its expressions, or else questions by name and plain ones in turn."""
    limits = ComposeLimits(max_targets=6, max_questions=2, min_target_share=0.001)
    kinds: tuple[Group, ...] = ("segmentation", "segmentation", "vqa")
    for written in _TELLING_GROUPS:
        if can_compose(row, written, limits):
            kinds = (written,)
            break
    usable = [kind for kind in kinds if can_compose(row, kind, limits)]
    if not usable:
        return None
    return compose(row, usable[position % len(usable)], np.random.default_rng([seed, position]), limits)


def _outline(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Pixels of the mask within two pixels of its edge."""
    inner = np.pad(mask, 2)
    core = inner[2:-2, 2:-2].copy()
    for shift in (-2, -1, 1, 2):
        core &= np.roll(inner, shift, 0)[2:-2, 2:-2] & np.roll(inner, shift, 1)[2:-2, 2:-2]
    return mask & ~core


def _write_text(draw: ImageDraw.ImageDraw, row: Row, dialogue: Dialogue | None) -> None:
    font, title = _font(_FONT_PX), _font(_TITLE_PX)
    top = _PICTURE_HEIGHT + 4
    draw.text((0, top), sample_title(row, dialogue), _GREY, font=title)
    top += _TITLE_PX + 6
    for question, answer in coloured_turns(row, dialogue):
        top = _flow(draw, [(word, _GREY) for word in f"Q: {question}".split()], top, font)
        inked = [(word, color or _INK) for word, color in answer]
        top = _flow(draw, [("A:", _INK), *inked], top + 2, font) + 4


def _coloured_words(
    answer: str, names: Sequence[Collection[str]], colors: Sequence[Color]
) -> list[tuple[str, Color | None]]:
    """The answer's words; a target's name and its marker take the colour of its mask.

    The longest of a target's names is looked for before its marker; where the answer words it differently, only the
    marker is coloured.
    """
    words: list[tuple[str, Color | None]] = []
    *named_pieces, rest = answer.split(SEG_MARKER)
    for piece, of_target, color in zip(named_pieces, names, colors, strict=True):
        start, end = _place_of_name(piece, of_target)
        words += [(word, None) for word in piece[:start].split()]
        words += [(word, color) for word in piece[start:end].split()]
        words += [(word, None) for word in piece[end:].split()]
        words.append((MARKER_WORD, color))
    return words + [(word, None) for word in rest.split()]


def _place_of_name(text: str, names: Collection[str]) -> tuple[int, int]:
    """Where the longest of the names that stand there as whole words last stands in a text; (0, 0) if none does."""
    for name in sorted(filter(None, names), key=lambda name: (-len(name), name)):
        found = list(re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE))
        if found:
            return found[-1].span()
    return (0, 0)


def _flow(draw: ImageDraw.ImageDraw, words: list[tuple[str, Color]], top: int, font: _Font) -> int:
    """Writes words with line breaks from `top` down, ending with "…" where the cell ends; returns the next line."""
    line_height = _FONT_PX + 4
    left = 0.0
    space = draw.textlength(" ", font=font)
    for word, color in words:
        width = 0.8 * _FONT_PX if word == MARKER_WORD else draw.textlength(word, font=font)
        if word[0] in ".,;:!?" and left:
            left -= space
        elif left and left + width > _CELL_WIDTH:
            left, top = 0.0, top + line_height
        if top + line_height > _PICTURE_HEIGHT + _TEXT_HEIGHT:
            draw.text((_CELL_WIDTH - 14, top - line_height), "…", _INK, font=font)
            return top
        if word == MARKER_WORD:
            draw.rectangle((left, top + 4, left + width - 1, top + 3 + width), fill=color)
        else:
            draw.text((left, top), word, color, font=font)
        left += width + space
    return top + line_height


def _font(size_px: int) -> _Font:
    """DejaVu, which has every letter of a caption, where matplotlib (which MLflow brings) is installed."""
    matplotlib = importlib.util.find_spec("matplotlib")
    if matplotlib is not None and matplotlib.origin is not None:
        path = Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if path.exists():
            return ImageFont.truetype(path, size_px)
    return ImageFont.load_default(size_px)
