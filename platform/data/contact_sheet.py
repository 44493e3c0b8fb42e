"""A contact sheet: samples side by side, their masks in colour, the question and the answer written underneath.

The words in an answer that belong to a mask carry its colour, so that a wrong pairing is seen at a glance.
"""

import colorsys
import io
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, ImageOps

from pixellm.platform.data.compose import ComposeLimits, Dialogue, Turn, can_compose, compose
from pixellm.platform.data.schema import SEG_MARKER, Row
from pixellm.platform.data.shards import ShardedDataset
from pixellm.platform.masks import rle_decode

_CELL_WIDTH = 420
_PICTURE_HEIGHT = 300
_TEXT_HEIGHT = 150
_MARGIN = 14
_COLUMNS = 4
_FONT_PX = 15
_TITLE_PX = 12
_INK = (30, 30, 34)
_GREY = (120, 120, 128)

Color = tuple[int, int, int]


def draw_contact_sheet(dataset: ShardedDataset, out_png: Path, count: int = 12, *, seed: int = 0) -> Path:
    """Draws samples spread evenly over the dataset.

    Args:
        dataset: shards of any kind; each sample shows the richest question its row can give.
        out_png: the file to write; its folder is made.
        count: samples, at most.
        seed: of the composed questions.
    """
    numbers = np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int))
    cells = [draw_sample(*_row_and_dialogue(dataset, int(number), seed)) for number in numbers]
    columns = min(_COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    step_x, step_y = _CELL_WIDTH + _MARGIN, _PICTURE_HEIGHT + _TEXT_HEIGHT + _MARGIN
    sheet = Image.new("RGB", (columns * step_x + _MARGIN, rows * step_y + _MARGIN), "white")
    for position, cell in enumerate(cells):
        sheet.paste(cell, (_MARGIN + position % columns * step_x, _MARGIN + position // columns * step_y))
    out_png.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out_png)
    return out_png


def draw_sample(row: Row, dialogue: Dialogue | None) -> Image.Image:
    """One cell: the picture with the masks that the dialogue asks for (all of them without one), and its text."""
    cell = Image.new("RGB", (_CELL_WIDTH, _PICTURE_HEIGHT + _TEXT_HEIGHT), "white")
    indices = dialogue.target_indices if dialogue else tuple(range(len(row.targets)))
    colors = palette(len(indices))
    photo = ImageOps.exif_transpose(Image.open(io.BytesIO(row.image))).convert("RGB")
    painted = paint_masks(np.asarray(photo), [rle_decode(row.targets[index].mask) for index in indices], colors)
    picture = ImageOps.contain(Image.fromarray(painted), (_CELL_WIDTH, _PICTURE_HEIGHT))
    cell.paste(picture, ((_CELL_WIDTH - picture.width) // 2, 0))
    _write_text(ImageDraw.Draw(cell), row, dialogue, colors)
    return cell


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
    hues = [(0.98 + index * 0.618034) % 1.0 for index in range(count)]
    return [
        tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.9, 0.72 if 0.1 < hue < 0.55 else 0.9))  # type: ignore[misc]
        for hue in hues
    ]


def _row_and_dialogue(dataset: ShardedDataset, number: int, seed: int) -> tuple[Row, Dialogue | None]:
    row = dataset.read_row(number)
    limits = ComposeLimits(max_targets=6, min_target_share=0.002)
    for group in ("muse", "segmentation", "vqa"):
        if can_compose(row, group, limits):  # type: ignore[arg-type]
            return row, compose(row, group, np.random.default_rng([seed, number]), limits)  # type: ignore[arg-type]
    return row, None


def _outline(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Pixels of the mask within two pixels of its edge."""
    inner = np.pad(mask, 2)
    core = inner[2:-2, 2:-2].copy()
    for shift in (-2, -1, 1, 2):
        core &= np.roll(inner, shift, 0)[2:-2, 2:-2] & np.roll(inner, shift, 1)[2:-2, 2:-2]
    return mask & ~core


def _write_text(draw: ImageDraw.ImageDraw, row: Row, dialogue: Dialogue | None, colors: list[Color]) -> None:
    title = ImageFont.load_default(_TITLE_PX)
    font = ImageFont.load_default(_FONT_PX)
    top = _PICTURE_HEIGHT + 4
    kind = dialogue.kind if dialogue else "no question"
    draw.text((0, top), f"{row.source} {row.image_id} · {kind} · {row.width}×{row.height}", _GREY, font=title)
    top += _TITLE_PX + 6
    used = 0
    for turn in dialogue.turns if dialogue else ():
        top = _flow(draw, [(word, _GREY) for word in f"Q: {turn.question}".split()], top, font)
        turn_colors = colors[used : used + len(turn.target_indices)]
        used += len(turn.target_indices)
        top = _flow(draw, _coloured_words(turn, turn_colors), top + 2, font) + 4


def _coloured_words(turn: Turn, colors: list[Color]) -> list[tuple[str, Color]]:
    """The answer's words; those before a marker, back to the last break, take the colour of its mask."""
    words: list[tuple[str, Color]] = [("A:", _INK)]
    pieces = turn.answer.split(SEG_MARKER)
    for position, piece in enumerate(pieces):
        plain, name = piece, ""
        if position < len(colors):
            cut = max(
                (match.end() for match in re.finditer(r"(?:^|[,.;:]|\band\b|\bis\b|\bare\b)\s", piece)), default=0
            )
            plain, name = piece[:cut], piece[cut:]
        words += [(word, _INK) for word in plain.split()]
        if position < len(colors):
            words += [(word, colors[position]) for word in f"{name} ■".split()]
    return words


def _flow(
    draw: ImageDraw.ImageDraw,
    words: list[tuple[str, Color]],
    top: int,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
) -> int:
    """Writes words with line breaks from `top` down, ending with "…" where the cell ends; returns the next line."""
    line_height = _FONT_PX + 4
    left = 0.0
    for word, color in words:
        width = draw.textlength(word + " ", font=font)
        if left and left + width > _CELL_WIDTH:
            left, top = 0.0, top + line_height
        if top + line_height > _PICTURE_HEIGHT + _TEXT_HEIGHT:
            draw.text((_CELL_WIDTH - 14, top - line_height), "…", _INK, font=font)
            return top
        draw.text((left, top), word, color, font=font)
        left += width
    return top + line_height
