"""Pictures of coloured shapes, drawn from a seed: what `sources/shapes.py` asks questions about.

Everything is a pure function of (seed, split, index). The objects are large for their picture (at least 30 of 192
pixels), never touch, and no two of a picture share both colour and shape, so that "the red star" means one thing.
"""

import io
import math
import zlib
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Split = Literal["train", "val", "val_unseen"]
SPLITS: tuple[Split, ...] = get_args(Split)

CANVAS_PX = 192

#: Names that the shipped tokenizer knows as one or two pieces, and far apart from each other and from the grey ground.
COLORS = {
    "red": (214, 32, 32),
    "green": (24, 150, 48),
    "blue": (36, 64, 220),
    "orange": (250, 150, 20),
    "white": (248, 248, 248),
    "black": (12, 12, 12),
}
KINDS = ("ball", "box", "kite", "star")

#: Combinations that no picture of `train` or `val` holds and every picture of `val_unseen` does: each shape once.
UNSEEN = frozenset((("red", "star"), ("green", "ball"), ("blue", "kite"), ("white", "box")))

_NUM_OBJECTS = (3, 6)
_EXTENTS_PX = (33, 46, 62)
_EXTENT_JITTER_PX = 3
_GAP_PX = 4
_PLACING_TRIES = 200
_STAR_INNER = 0.5
_NOISE = 5.0
_JPEG_QUALITY = 92


@dataclass(frozen=True, slots=True)
class Shape:
    """One object: `extent` is its width and height in pixels, (`x`, `y`) its centre."""

    color: str
    kind: str
    x: int
    y: int
    extent: int

    @property
    def name(self) -> str:
        """What it is called in questions and answers: "red star"."""
        return f"{self.color} {self.kind}"

    @property
    def is_unseen(self) -> bool:
        """Whether its combination of colour and shape is held out."""
        return (self.color, self.kind) in UNSEEN


def scene_rng(seed: int, split: Split, index: int) -> np.random.Generator:
    """The generator that decides everything about one picture and its questions."""
    return np.random.default_rng([zlib.crc32(b"shapes"), seed, SPLITS.index(split), index])


def draw_scene(rng: np.random.Generator, split: Split) -> tuple[Shape, ...]:
    """Invents a picture's objects, from left to right."""
    while True:
        names = _choose_names(rng, split)
        places = _place(rng, len(names))
        if places:
            shapes = [Shape(*name, *place) for name, place in zip(names, places, strict=True)]
            return tuple(sorted(shapes, key=lambda shape: (shape.x, shape.y)))


def shape_mask(shape: Shape) -> npt.NDArray[np.bool_]:
    """The pixels of an object, bool H×W with H = W = `CANVAS_PX`."""
    canvas = Image.new("L", (CANVAS_PX, CANVAS_PX))
    brush = ImageDraw.Draw(canvas)
    half = shape.extent / 2
    if shape.kind == "ball":
        brush.ellipse((shape.x - half, shape.y - half, shape.x + half, shape.y + half), fill=1)
    else:
        brush.polygon([(shape.x + half * across, shape.y + half * down) for across, down in _OUTLINES[shape.kind]], 1)
    return np.asarray(canvas).astype(bool)


def paint(shapes: tuple[Shape, ...], masks: list[npt.NDArray[np.bool_]], rng: np.random.Generator) -> bytes:
    """The picture as a JPEG file: the objects on a grey ground that brightens to one side, with noise over all."""
    ramp = np.linspace(-0.5, 0.5, CANVAS_PX)
    tilt = rng.uniform(-40, 40, size=2)
    ground = rng.uniform(110, 150) + tilt[0] * ramp[:, None] + tilt[1] * ramp[None, :]
    pixels = np.repeat(ground[:, :, None], 3, axis=2)
    for shape, mask in zip(shapes, masks, strict=True):
        pixels[mask] = COLORS[shape.color]
    pixels += rng.normal(0.0, _NOISE, pixels.shape)
    encoded = io.BytesIO()
    picture = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    picture.save(encoded, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return encoded.getvalue()


def _choose_names(rng: np.random.Generator, split: Split) -> list[tuple[str, str]]:
    """Different combinations; colours and shapes repeat often enough that "all the red objects" means several."""
    every = [(color, kind) for color in COLORS for kind in KINDS]
    seen = [name for name in every if name not in UNSEEN]
    count = int(rng.integers(_NUM_OBJECTS[0], _NUM_OBJECTS[1] + 1))
    colors = {str(color) for color in rng.permutation(list(COLORS))[: max(2, count - 1)]}
    pool = [name for name in seen if name[0] in colors]
    if split != "val_unseen":
        return [pool[place] for place in rng.permutation(len(pool))[:count]]
    unseen = [name for name in every if name in UNSEEN]
    new = unseen[int(rng.integers(len(unseen)))]
    return [new, *(pool[place] for place in rng.permutation(len(pool))[: count - 1])]


def _place(rng: np.random.Generator, count: int) -> list[tuple[int, int, int]]:
    """(x, y, extent) of objects that keep apart and inside, in random order; empty where these sizes do not fit."""
    levels = rng.integers(0, len(_EXTENTS_PX), size=count)
    jitter = rng.integers(-_EXTENT_JITTER_PX, _EXTENT_JITTER_PX + 1, size=count)
    extents = sorted((_EXTENTS_PX[level] + int(more) for level, more in zip(levels, jitter, strict=True)), reverse=True)
    places: list[tuple[int, int, int]] = []
    for extent in extents:
        margin = math.ceil(extent / 2) + 2
        for _ in range(_PLACING_TRIES):
            x, y = (int(value) for value in rng.integers(margin, CANVAS_PX - margin, size=2))
            apart = [(extent + other[2]) / 2 + _GAP_PX for other in places]
            if all(max(abs(x - other[0]), abs(y - other[1])) >= gap for other, gap in zip(places, apart, strict=True)):
                places.append((x, y, extent))
                break
        else:
            return []
    return [places[place] for place in rng.permutation(count)]


def _star_outline() -> list[tuple[float, float]]:
    angles = [math.pi * (point / 5 - 0.5) for point in range(10)]
    reaches = [1.0, _STAR_INNER] * 5
    return [(reach * math.cos(angle), reach * math.sin(angle)) for reach, angle in zip(reaches, angles, strict=True)]


#: Corners in half extents around the centre, x to the right and y down.
_OUTLINES = {
    "box": [(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)],
    "kite": [(0.0, -1.0), (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0)],
    "star": _star_outline(),
}
