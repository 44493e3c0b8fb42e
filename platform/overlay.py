"""A photograph with masks in colour and a legend that ties each colour to words; pure PIL and numpy.

Used for predictions, evaluation pictures and the service's `png` answers: whoever sees one picture reads them all.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]
_Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

#: Distinct for most kinds of colour vision, and strong on photographs; beyond these, hues are computed.
_COLORS: tuple[Color, ...] = (
    (230, 57, 70),
    (33, 130, 222),
    (244, 162, 30),
    (42, 157, 100),
    (155, 81, 224),
    (0, 170, 190),
    (233, 84, 160),
    (140, 110, 60),
)
_TINT = 0.45
_INK: Color = (28, 30, 36)
_GREY: Color = (110, 114, 122)
_PAPER: Color = (255, 255, 255)


@dataclass(frozen=True)
class _Style:
    """Sizes in pixels that follow the picture's width."""

    font_px: int
    line_px: int
    margin: int
    edge: int

    @staticmethod
    def of(width: int) -> "_Style":
        font_px = int(np.clip(width / 38, 13, 34))
        return _Style(font_px, round(font_px * 1.45), round(font_px * 0.8), max(1, round(width / 320)))


def overlay_colors(count: int) -> list[Color]:
    """The colours of `count` targets, in order; the first ones are always the same."""
    colors = list(_COLORS[:count])
    for index in range(len(colors), count):
        hue = int(180 * (0.618034 * index % 1.0))
        red, green, blue = cv2.cvtColor(np.array([[[hue, 190, 215]]], dtype=np.uint8), cv2.COLOR_HSV2RGB)[0, 0]
        colors.append((int(red), int(green), int(blue)))
    return colors


def paint_masks(
    picture_HW3: npt.NDArray[np.uint8], masks: Sequence[npt.NDArray[np.bool_]], colors: Sequence[Color] | None = None
) -> npt.NDArray[np.uint8]:
    """Tints each mask and draws its outline, white under the colour so that it shows on any ground.

    Args:
        picture_HW3: uint8 RGB.
        masks: bool H×W, any number; where they overlap, the smaller one lies on top.
        colors: one per mask; None takes `overlay_colors`.

    Returns:
        A new uint8 H×W×3.
    """
    colors = overlay_colors(len(masks)) if colors is None else colors
    edge = _Style.of(picture_HW3.shape[1]).edge
    largest_first = sorted(zip(masks, colors, strict=True), key=lambda pair: -np.count_nonzero(pair[0]))
    canvas = picture_HW3.copy()
    for mask, color in largest_first:
        tinted = (1 - _TINT) * picture_HW3[mask] + _TINT * np.asarray(color, dtype=np.float32)
        canvas[mask] = tinted.round().astype(np.uint8)
    for mask, color in largest_first:
        contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(canvas, contours, -1, _PAPER, edge + 2, cv2.LINE_AA)
        cv2.drawContours(canvas, contours, -1, color, edge, cv2.LINE_AA)
    return canvas


def draw_overlay(
    picture_HW3: npt.NDArray[np.uint8],
    masks: Sequence[npt.NDArray[np.bool_]],
    names: Sequence[str],
    *,
    question: str = "",
    note: str = "",
) -> Image.Image:
    """The painted picture, with the question above and a legend of coloured names below.

    Args:
        picture_HW3: uint8 RGB.
        masks: bool H×W at the picture's size.
        names: words for each mask.
        question: written above the picture; empty leaves the strip out.
        note: small print at the end of the legend.

    Returns:
        An RGB picture as wide as the input and as high as picture and text need.
    """
    colors = overlay_colors(len(masks))
    height, width = picture_HW3.shape[:2]
    style = _Style.of(width)
    font = _font(style.font_px)
    above = _wrap([(question, _INK)], width, style, font) if question else []
    entries = [(name, color) for name, color in zip(names, colors, strict=True)]
    if not masks:
        entries = [("no target", _GREY)]
    below = _wrap_legend(entries, note, width, style, font)
    top = len(above) * style.line_px + (style.margin if above else 0)
    bottom = len(below) * style.line_px + style.margin
    sheet = Image.new("RGB", (width, top + height + bottom), _PAPER)
    sheet.paste(Image.fromarray(paint_masks(picture_HW3, masks, colors)), (0, top))
    draw = ImageDraw.Draw(sheet)
    for number, words in enumerate(above):
        draw.text((style.margin, style.margin // 2 + number * style.line_px), words, _INK, font=font)
    for number, line in enumerate(below):
        _draw_legend_line(draw, line, top + height + style.margin // 2 + number * style.line_px, style, font)
    return sheet


@dataclass(frozen=True)
class _Entry:
    left: float
    text: str
    color: Color
    has_swatch: bool


def _wrap(pieces: Sequence[tuple[str, Color]], width: int, style: _Style, font: _Font) -> list[str]:
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    lines: list[str] = [""]
    for text, _ in pieces:
        for word in text.split():
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and measure.textlength(longer, font=font) > width - 2 * style.margin:
                lines.append(word)
            else:
                lines[-1] = longer
    return lines


def _wrap_legend(
    entries: Sequence[tuple[str, Color]], note: str, width: int, style: _Style, font: _Font
) -> list[list[_Entry]]:
    """Places the legend's entries on lines; one that is wider than the picture is cut with an ellipsis."""
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    swatch = style.font_px * 1.25
    lines: list[list[_Entry]] = [[]]
    left = float(style.margin)
    for text, color, has_swatch in [(text, color, color != _GREY) for text, color in entries] + [(note, _GREY, False)]:
        if not text:
            continue
        room = width - 2 * style.margin - (swatch if has_swatch else 0)
        shown = _shortened(text, room, measure, font)
        needed = measure.textlength(shown, font=font) + (swatch if has_swatch else 0)
        if lines[-1] and left + needed > width - style.margin:
            lines.append([])
            left = float(style.margin)
        lines[-1].append(_Entry(left, shown, color, has_swatch))
        left += needed + 1.5 * style.font_px
    return lines


def _shortened(text: str, room: float, measure: ImageDraw.ImageDraw, font: _Font) -> str:
    if measure.textlength(text, font=font) <= room:
        return text
    while text and measure.textlength(text + "…", font=font) > room:
        text = text[:-1]
    return text.rstrip() + "…"


def _draw_legend_line(
    draw: ImageDraw.ImageDraw, line: Sequence[_Entry], top: float, style: _Style, font: _Font
) -> None:
    for entry in line:
        left = entry.left
        if entry.has_swatch:
            side = style.font_px * 0.85
            offset = (style.line_px - side) / 2 - style.font_px * 0.1
            box = (left, top + offset, left + side, top + offset + side)
            draw.rounded_rectangle(box, radius=side / 4, fill=entry.color)
            left += style.font_px * 1.25
        draw.text((left, top), entry.text, _INK if entry.has_swatch else _GREY, font=font)


def _font(size_px: int) -> _Font:
    """DejaVu, which has the letters of most languages, where matplotlib (which MLflow brings) is installed."""
    matplotlib = importlib.util.find_spec("matplotlib")
    if matplotlib is not None and matplotlib.origin is not None:
        path = Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if path.exists():
            return ImageFont.truetype(path, size_px)
    return ImageFont.load_default(size_px)
