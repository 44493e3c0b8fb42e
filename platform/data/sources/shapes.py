"""`shapes`: questions for one to six targets about generated pictures, answered only by looking and comparing.

Unlimited and seeded: picture `index` of a split is a pure function of (seed, split, index). `train` and `val` hold
different pictures of one kind; `val_unseen` asks only about combinations of colour and shape that neither has.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pixellm.errors import ConfigError
from pixellm.platform.data.phrases import plural
from pixellm.platform.data.schema import SEG_MARKER, Row, RowDialogue, Target
from pixellm.platform.data.shape_scenes import (
    CANVAS_PX,
    COLORS,
    KINDS,
    SPLITS,
    Shape,
    Split,
    draw_scene,
    paint,
    scene_rng,
    shape_mask,
)
from pixellm.platform.data.sources.base import Entry, Ledger, PictureSource
from pixellm.platform.masks import mask_area, mask_box, rle_encode

#: Questions about one picture, at most; they differ in what they ask.
QUESTIONS_PER_PICTURE = 6

_MIN_SIDE_GAP_PX = 12
_MIN_EXTENT_RATIO = 1.2
_MAX_NAMED = 6

#: How often each kind of question is asked, relative to the others.
_KIND_WEIGHTS = {
    "named": 2.0,
    "color": 1.5,
    "shape": 1.5,
    "side": 2.0,
    "same color": 1.0,
    "same shape": 1.0,
    "extreme": 1.0,
}
_QUESTIONS = ("Segment {}.", "Please segment {}.", "Can you segment {}?", "Mark {}.", "Show me {} in this picture.")

#: Within a kind, how much more often a question with several targets is asked than one with a single target.
_MULTI_WEIGHT = 2.5
_SIDES: dict[str, Callable[[Shape, Shape], int]] = {
    "left of": lambda shape, anchor: anchor.x - shape.x,
    "right of": lambda shape, anchor: shape.x - anchor.x,
    "above": lambda shape, anchor: anchor.y - shape.y,
    "below": lambda shape, anchor: shape.y - anchor.y,
}


class Ask(NamedTuple):
    """Something that can be asked about a picture.

    Attributes:
        kind: key of the kinds of question.
        objects: what is asked for, in words.
        targets: indices of the shapes meant, in the order of the answer.
        anchors: indices of the shapes that the words point to but do not mean.
    """

    kind: str
    objects: str
    targets: tuple[int, ...]
    anchors: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ShapesSource(PictureSource):
    """Generated, so nothing is read.

    Args:
        samples: pictures.
        seed: another seed gives other pictures.
        split: "train", "val" or "val_unseen".
        shuffle_questions: put under every answer the question of another picture: a control from which nothing can be
            learned but what the picture and the habits of the answers give away.

    Raises:
        ConfigError: no such split, or no sample.
    """

    samples: int = 1000
    seed: int = 0
    split: Split = "train"
    shuffle_questions: bool = False
    name: str = "shapes"
    layout: str = "nothing: the pictures are generated"

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ConfigError(f"shapes has no split {self.split!r}; wanted one of {', '.join(SPLITS)}")
        if self.samples < 1 or self.seed < 0:
            raise ConfigError(f"shapes wants samples ≥ 1 and a seed ≥ 0, got {self.samples} and {self.seed}")

    def entries(self, input_uri: str, ledger: Ledger) -> Iterator[Entry]:
        """Yields entries 0 … samples − 1; see `PictureSource.entries`."""
        del input_uri
        ledger.total = self.samples
        for index in range(self.samples):
            yield Entry(f"{self.split}-{self.seed}-{index}", (), {"index": index})

    def row(self, entry: Entry, ledger: Ledger) -> Row:
        """The row of an entry; see `PictureSource.row`."""
        del ledger
        return self.row_at(entry.facts["index"])

    def row_at(self, index: int) -> Row:
        """The row of any index ≥ 0, also beyond `samples`."""
        rng = scene_rng(self.seed, self.split, index)
        shapes = draw_scene(rng, self.split)
        dialogues = _dialogues(shapes, rng, self.split)
        masks = [shape_mask(shape) for shape in shapes]
        if self.shuffle_questions:
            dialogues = self._under_other_questions(dialogues, index)
        return Row(
            image_id=f"{self.split}-{self.seed}-{index}",
            source=self.name,
            image=paint(shapes, masks, rng),
            height=CANVAS_PX,
            width=CANVAS_PX,
            license="CC0-1.0",
            targets=tuple(map(_target, range(len(shapes)), shapes, masks)),
            dialogues=dialogues,
        )

    def _under_other_questions(self, dialogues: tuple[RowDialogue, ...], index: int) -> tuple[RowDialogue, ...]:
        rng = scene_rng(self.seed, self.split, index + 1)
        others = _dialogues(draw_scene(rng, self.split), rng, self.split)
        return tuple(
            RowDialogue(own.kind, others[number % len(others)].question, own.answer, own.target_ids, own.phrases)
            for number, own in enumerate(dialogues)
        )


def possible_asks(shapes: Sequence[Shape]) -> list[Ask]:
    """Everything that can be asked about a picture without doubt, by one wording each."""
    asks = [*_named(shapes), *_by_attribute(shapes), *_by_side(shapes), *_by_likeness(shapes), *_by_size(shapes)]
    return [ask for ask in asks if ask.targets]


def _dialogues(shapes: Sequence[Shape], rng: np.random.Generator, split: Split) -> tuple[RowDialogue, ...]:
    """Draws kinds of question by weight, then one question of the kind, until there are enough or none is left."""
    waiting: dict[str, list[Ask]] = {kind: [] for kind in _KIND_WEIGHTS}
    for ask in possible_asks(shapes):
        if split != "val_unseen" or any(shapes[index].is_unseen for index in (*ask.targets, *ask.anchors)):
            waiting[ask.kind].append(ask)
    dialogues: list[RowDialogue] = []
    while len(dialogues) < QUESTIONS_PER_PICTURE and any(waiting.values()):
        kinds = [kind for kind, asks in waiting.items() if asks]
        kind = kinds[_draw(rng, [_KIND_WEIGHTS[kind] for kind in kinds])]
        ask = waiting[kind].pop(_draw(rng, [_MULTI_WEIGHT if len(ask.targets) > 1 else 1.0 for ask in waiting[kind]]))
        names = tuple(shapes[index].name for index in ask.targets)
        question = _QUESTIONS[int(rng.integers(len(_QUESTIONS)))].format(ask.objects)
        answer = ", ".join(f"{name} {SEG_MARKER}" for name in names) + "."
        dialogues.append(RowDialogue("muse", question, answer, ask.targets, names))
    return tuple(dialogues)


def _named(shapes: Sequence[Shape]) -> Iterator[Ask]:
    """By name: of each number of targets as many questions as there are shapes, answered in the question's order."""
    for count in range(1, min(_MAX_NAMED, len(shapes)) + 1):
        chosen = list(combinations(range(len(shapes)), count))
        for targets in chosen[:: max(1, len(chosen) // len(shapes))]:
            names = [f"the {shapes[index].name}" for index in targets]
            objects = names[0] if count == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
            yield Ask("named", objects, targets)


def _by_attribute(shapes: Sequence[Shape]) -> Iterator[Ask]:
    for color in COLORS:
        yield Ask("color", f"the {color} objects", _colored(shapes, color))
    for kind in KINDS:
        yield Ask("shape", f"the {plural(kind)}", _formed(shapes, kind))


def _by_side(shapes: Sequence[Shape]) -> Iterator[Ask]:
    """Everything on one side of a named shape, where no centre is nearly level with its own."""
    for index, anchor in enumerate(shapes):
        for side, beyond in _SIDES.items():
            distances = [beyond(shape, anchor) for shape in shapes]
            others = [distance for number, distance in enumerate(distances) if number != index]
            if min(abs(distance) for distance in others) >= _MIN_SIDE_GAP_PX:
                targets = tuple(number for number, distance in enumerate(distances) if distance > 0)
                yield Ask("side", f"the objects {side} the {anchor.name}", targets, (index,))


def _by_likeness(shapes: Sequence[Shape]) -> Iterator[Ask]:
    """Everything of a shape's colour (or form), which the words do not say: it must be looked up in the picture."""
    for index, anchor in enumerate(shapes):
        same_color, same_kind = _colored(shapes, anchor.color), _formed(shapes, anchor.kind)
        if len(same_kind) == 1:
            alike = tuple(other for other in same_color if other != index)
            yield Ask("same color", f"the objects with the same color as the {anchor.kind}", alike, (index,))
        if len(same_color) == 1:
            alike = tuple(other for other in same_kind if other != index)
            yield Ask("same shape", f"the objects with the same shape as the {anchor.color} one", alike, (index,))


def _by_size(shapes: Sequence[Shape]) -> Iterator[Ask]:
    """The largest and the smallest, of all or of one colour or shape, where one is clearly so."""
    groups = {"object": tuple(range(len(shapes)))}
    groups |= {f"{color} object": _colored(shapes, color) for color in COLORS}
    groups |= {kind: _formed(shapes, kind) for kind in KINDS}
    for words, members in groups.items():
        if len(members) < 2:
            continue
        ordered = sorted(members, key=lambda index: shapes[index].extent)
        if shapes[ordered[-1]].extent >= _MIN_EXTENT_RATIO * shapes[ordered[-2]].extent:
            yield Ask("extreme", f"the largest {words}", (ordered[-1],), members)
        if shapes[ordered[1]].extent >= _MIN_EXTENT_RATIO * shapes[ordered[0]].extent:
            yield Ask("extreme", f"the smallest {words}", (ordered[0],), members)


def _draw(rng: np.random.Generator, weights: Sequence[float]) -> int:
    shares = np.asarray(weights) / np.sum(weights)
    return int(rng.choice(len(shares), p=shares))


def _colored(shapes: Sequence[Shape], color: str) -> tuple[int, ...]:
    return tuple(index for index, shape in enumerate(shapes) if shape.color == color)


def _formed(shapes: Sequence[Shape], kind: str) -> tuple[int, ...]:
    return tuple(index for index, shape in enumerate(shapes) if shape.kind == kind)


def _target(number: int, shape: Shape, mask: npt.NDArray[np.bool_]) -> Target:
    rle = rle_encode(mask)
    box = mask_box(rle) or (0.0, 0.0, 0.0, 0.0)
    return Target(str(number), shape.kind, shape.name, box, rle, mask_area(rle))
