"""The published benchmarks as suites: which written questions of the shards are asked, and how answers are counted.

A suite's questions are numbered by (row, order within the row), so that any process can make any of them by itself:
the same shards give the same questions in the same order everywhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pixellm.errors import ConfigError, DataError
from pixellm.jobs.evaluate.questions import composed_turn
from pixellm.platform.data.compose import ComposeLimits, Turn, can_compose
from pixellm.platform.data.phrases import definite
from pixellm.platform.data.schema import SEG_MARKER, Row, RowDialogue
from pixellm.platform.data.shards import ShardedDataset
from pixellm.platform.masks import Rle

Scoring = Literal["matched", "merged"]
_COMPOSED = ComposeLimits(max_targets=6)


@dataclass(frozen=True, slots=True)
class Suite:
    """A benchmark.

    Attributes:
        name: as the command line takes it.
        kinds: dialogues of the shards that it asks; none: a question is composed about each picture.
        scoring: "matched" pairs masks one to one (paper Sec. 4.3), "merged" compares their unions, as referring
            benchmarks do.
        made_by: the command that makes such shards.
    """

    name: str
    kinds: tuple[str, ...]
    scoring: Scoring
    made_by: str


_MULTI = "pixellm data multi-referring"
SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite("segmentation", (), "matched", "pixellm data prepare coco"),
        Suite("muse", ("muse",), "matched", "pixellm data prepare muse"),
        Suite("shapes", ("muse",), "matched", "pixellm data prepare shapes"),
        Suite("mrefcoco", ("muse",), "matched", _MULTI),
        Suite("mrefcoco+", ("muse",), "matched", _MULTI),
        Suite("mrefcocog", ("muse",), "matched", _MULTI),
        Suite("refcoco", ("referring",), "merged", "pixellm data prepare refcoco"),
        Suite("refcoco+", ("referring",), "merged", "pixellm data prepare refcoco+"),
        Suite("refcocog", ("referring",), "merged", "pixellm data prepare refcocog"),
        Suite("grefcoco", ("referring",), "merged", "pixellm data prepare grefcoco"),
        Suite("reasonseg", ("muse", "referring"), "merged", "pixellm data prepare reasonseg"),
    )
}


def find_suite(name: str) -> Suite:
    """The suite of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in SUITES:
        raise ConfigError(f"there is no suite {name!r}; wanted one of {', '.join(SUITES)}")
    return SUITES[name]


@dataclass(frozen=True, slots=True)
class Asked:
    """A question of a suite, without its picture.

    Attributes:
        sample_id: `source/image#order`, the same in every run.
        row: number of the row.
        image_id: `source/image`: questions about one picture are not independent.
        kind: question type: "reasoning: how", "reasoning: what", …, "list", "referring", "none" (nothing is there).
        prompt: the question.
        answer: the true answer, `{seg}` at each target.
        phrases: of the targets, in the order of the markers.
        masks: of the targets.
        ignore: crowd regions.
        size: height and width in pixels.
    """

    sample_id: str
    row: int
    image_id: str
    kind: str
    prompt: str
    answer: str
    phrases: tuple[str, ...]
    masks: tuple[Rle, ...]
    ignore: tuple[Rle, ...]
    size: tuple[int, int]


def question_places(dataset: ShardedDataset, suite: Suite, limit: int | None = None) -> list[tuple[int, int]]:
    """(row, order) of every question, in order; masks and pictures are not kept.

    Raises:
        DataError: the shards hold no such question.
    """
    places: list[tuple[int, int]] = []
    for number, row in enumerate(dataset.scan()):
        count = len(_written(row, suite)) if suite.kinds else int(can_compose(row, "segmentation", _COMPOSED))
        places += [(number, order) for order in range(count)]
        if limit is not None and len(places) >= limit:
            return places[:limit]
    if not places:
        raise DataError(
            f"no row of {dataset.uri} holds a question for the suite {suite.name}; make its shards with "
            f"`{suite.made_by}`, or choose another --suite"
        )
    return places


def questions_of(row: Row, number: int, suite: Suite, orders: list[int]) -> Iterator[Asked]:
    """Some of the questions about a row.

    Args:
        row: as the shards hold it.
        number: of the row.
        suite: which questions.
        orders: their places within the row.
    """
    if not suite.kinds:
        turn = composed_turn(row, number, _COMPOSED)
        phrases = tuple(row.targets[index].phrase for index in turn.target_indices)
        yield _asked(row, number, 0, "list" if len(phrases) > 1 else "single", turn, phrases)
        return
    written = _written(row, suite)
    for order in orders:
        dialogue = written[order]
        turn = _turn(dialogue)
        phrases = dialogue.phrases or tuple(row.targets[index].phrase for index in dialogue.target_ids)
        yield _asked(row, number, order, question_type(dialogue), turn, phrases)


def question_type(dialogue: RowDialogue) -> str:
    """What kind of question it is, by its form; see `Asked.kind`."""
    if not dialogue.target_ids:
        return "none"
    if dialogue.kind == "referring":
        return "referring"
    first = dialogue.question.casefold().partition(" ")[0].strip(",'")
    if first in ("please", "segment"):
        return "list"
    words = dialogue.question.casefold().replace(",", " ").split()
    asking = next((word for word in words if word in _ASKING), "other")
    return f"reasoning: {asking}"


_ASKING = ("how", "what", "where", "which", "who", "why", "can", "could")


def _written(row: Row, suite: Suite) -> list[RowDialogue]:
    return [dialogue for dialogue in row.dialogues if dialogue.kind in suite.kinds and not dialogue.turn]


def _turn(dialogue: RowDialogue) -> Turn:
    if dialogue.kind != "referring":
        return Turn(dialogue.question, dialogue.answer, dialogue.target_ids)
    name = definite(" ".join(dialogue.question.split()).rstrip(".?!"))
    masks = f" {SEG_MARKER}" * len(dialogue.target_ids)
    return Turn(
        f"Please segment {name}.",
        f"Sure, {name}{masks}." if masks else f"I see nothing that is {name}.",
        dialogue.target_ids,
    )


def _asked(row: Row, number: int, order: int, kind: str, turn: Turn, phrases: tuple[str, ...]) -> Asked:
    image = f"{row.source}/{row.image_id}"
    return Asked(
        sample_id=f"{image}#{order}",
        row=number,
        image_id=image,
        kind=kind,
        prompt=turn.question,
        answer=turn.answer,
        phrases=phrases,
        masks=tuple(row.targets[index].mask for index in turn.target_indices),
        ignore=tuple(target.mask for target in row.targets if target.is_ignore),
        size=(row.height, row.width),
    )
