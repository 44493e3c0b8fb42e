"""The questions of an evaluation, composed from shards: the same ones for the same shards, limits and suite."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pixellm.errors import ConfigError, DataError
from pixellm.platform.data.compose import ComposeLimits, Dialogue, Turn, can_compose, compose
from pixellm.platform.data.schema import Row
from pixellm.platform.data.shards import ShardedDataset, open_shards
from pixellm.platform.masks import rle_decode

Suite = Literal["segmentation", "muse"]
SUITES: tuple[Suite, ...] = ("segmentation", "muse")
_TRIES = 8


@dataclass(frozen=True)
class Question:
    """One question about one picture, with its true answer.

    Attributes:
        sample_id: `source/image`, and the number of the question where a picture has several.
        suite: the kind of question.
        image: the encoded picture.
        prompt: the question.
        answer: the written answer, `{seg}` at each target.
        phrases: names of the targets, in the order of the markers.
        masks: bool H×W of each, at the picture's own size.
        ignore: bool H×W, crowd regions; None without any.
    """

    sample_id: str
    suite: Suite
    image: bytes
    prompt: str
    answer: str
    phrases: tuple[str, ...]
    masks: tuple[npt.NDArray[np.bool_], ...]
    ignore: npt.NDArray[np.bool_] | None


def check_suite(suite: str) -> Suite:
    """The suite of this name.

    Raises:
        ConfigError: there is none.
    """
    for known in SUITES:
        if suite == known:
            return known
    raise ConfigError(f"there is no suite {suite!r}; wanted one of {', '.join(SUITES)}")


def iterate_questions(uri: str, suite: Suite, limits: ComposeLimits, limit: int | None = None) -> Iterator[Question]:
    """Questions about the pictures of some shards, in their order; one picture in memory at a time.

    "segmentation" asks one composed question about each picture, about several targets where it has them. "muse" asks
    every written reasoning question.

    Args:
        uri: of the shards.
        suite: kind of question.
        limits: how many targets, and how small they may be.
        limit: questions at most.

    Raises:
        DataError: no row can give such a question.
    """
    dataset, count = open_shards(uri), 0
    for number, row in enumerate(dataset.scan()):
        if not can_compose(row, suite, limits):
            continue
        for order, turn in enumerate(_turns(row, number, suite, limits)):
            if limit is not None and count >= limit:
                return
            count += 1
            yield _question(dataset, number, row, turn, order, suite)
    if not count:
        raise DataError(f"no row of {uri} can give a {suite} question within {limits}; choose another suite")


def _turns(row: Row, number: int, suite: Suite, limits: ComposeLimits) -> list[Turn]:
    if suite == "muse":
        every = ComposeLimits(limits.max_targets, max(1, len(row.dialogues)), limits.min_target_share)
        written = {
            turn: None for seed in range(_TRIES) for turn in compose(row, suite, _rng(number, seed), every).turns
        }
        order = {(dialogue.question, dialogue.answer): place for place, dialogue in enumerate(row.dialogues)}
        return sorted(written, key=lambda turn: order[turn.question, turn.answer])
    return [composed_turn(row, number, limits)]


def composed_turn(row: Row, number: int, limits: ComposeLimits) -> Turn:
    """The composed question about row `number`: of some tries, the first that asks for several targets."""
    tries: list[Dialogue] = [compose(row, "segmentation", _rng(number, seed), limits) for seed in range(_TRIES)]
    return max(tries, key=lambda dialogue: min(2, len(dialogue.turns[0].target_indices))).turns[0]


def _rng(number: int, seed: int) -> np.random.Generator:
    return np.random.default_rng([number, seed])


def _question(dataset: ShardedDataset, number: int, row: Row, turn: Turn, order: int, suite: Suite) -> Question:
    ignored = [rle_decode(target.mask) for target in row.targets if target.is_ignore]
    return Question(
        sample_id=f"{row.source}/{row.image_id}" + (f"#{order}" if order else ""),
        suite=suite,
        image=dataset.read_row(number).image,
        prompt=turn.question,
        answer=turn.answer,
        phrases=tuple(row.targets[index].phrase for index in turn.target_indices),
        masks=tuple(rle_decode(row.targets[index].mask) for index in turn.target_indices),
        ignore=np.logical_or.reduce(ignored) if ignored else None,
    )
