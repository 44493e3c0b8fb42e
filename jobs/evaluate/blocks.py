"""Blocks of questions through a model.

A block is a fixed run of consecutive questions, answered in one batch and kept in one file (`jobs/block_pool.py` says
where they are answered).
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pixellm.errors import DataError
from pixellm.jobs.evaluate.questions import Question
from pixellm.jobs.evaluate.samples import SAMPLE_SCHEMA, sample_row
from pixellm.jobs.evaluate.suites import Asked, Suite, questions_of
from pixellm.jobs.evaluate.types import Answerer
from pixellm.platform import registry, storage
from pixellm.platform.data.shards import ShardedDataset
from pixellm.platform.masks import rle_decode
from pixellm.platform.settings import TrackingSettings

Mode = Literal["generated", "forced"]


@dataclass(frozen=True)
class AnswerPlan:
    """All that an actor needs; picklable.

    Attributes:
        dataset: the shards.
        suite: which questions.
        model_ref: resolved where the model is loaded.
        mode: "generated" answers, or "forced" (true answers given, only masks scored).
        batch_size: questions of a block.
        device: where the model runs.
        tracking: which registry the reference is looked up in.
    """

    dataset: ShardedDataset
    suite: Suite
    model_ref: str
    mode: Mode = "generated"
    batch_size: int = 8
    device: str = "cpu"
    tracking: TrackingSettings = field(default_factory=TrackingSettings)


#: Opens the model of a plan; picklable.
OpenAnswerer = Callable[[AnswerPlan], Answerer]


def open_model(plan: AnswerPlan) -> Answerer:
    """The plan's model, answering in its mode.

    Raises:
        ModelLoadError: the reference does not resolve to a whole model.
    """
    from pixellm.jobs.evaluate.run import open_answerer  # imports torch and transformers

    folder = registry.resolve(plan.model_ref, plan.tracking)
    return open_answerer(folder, plan.mode, batch_size=plan.batch_size, device=plan.device)


@dataclass(frozen=True)
class Block:
    """A numbered run of questions, each by (row, order within the row)."""

    number: int
    places: tuple[tuple[int, int], ...]


def cut_blocks(places: Sequence[tuple[int, int]], batch_size: int) -> list[Block]:
    """Blocks of `batch_size` questions, in order."""
    return [
        Block(number, tuple(places[start : start + batch_size]))
        for number, start in enumerate(range(0, len(places), batch_size))
    ]


def block_uri(out_dir: str, number: int) -> str:
    """Where a block's samples are kept."""
    return storage.join(out_dir, "blocks", f"block-{number:06d}.parquet")


def read_block(out_dir: str, number: int) -> list[dict[str, Any]]:
    """The samples of a finished block.

    Raises:
        DataError: the file is absent or damaged.
    """
    uri = block_uri(out_dir, number)
    try:
        rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(storage.read_bytes(uri))).to_pylist()
    except pa.ArrowException as error:
        raise DataError(f"cannot read {uri}: {error}; remove it and run the same command again") from None
    return rows


def question_about(asked: Asked, image: bytes, mode: Mode) -> Question:
    """What an answerer is given: with the true masks only where they are forced."""
    masks = tuple(rle_decode(mask) for mask in asked.masks) if mode == "forced" else ()
    return Question(asked.sample_id, "muse", image, asked.prompt, asked.answer, asked.phrases, masks, None)


def answer_block(plan: AnswerPlan, answerer: Answerer, block: Block) -> bytes:
    """Asks, scores and packs one block: a Parquet file of `SAMPLE_SCHEMA`."""
    asked: list[Asked] = []
    images: list[bytes] = []
    for number, group in groupby(block.places, key=lambda place: place[0]):
        row = plan.dataset.read_row(number)
        of_row = list(questions_of(row, number, plan.suite, [order for _, order in group]))
        asked += of_row
        images += [row.image] * len(of_row)
    answers = answerer.answer([question_about(a, image, plan.mode) for a, image in zip(asked, images, strict=True)])
    rows = [sample_row(a, answer, plan.suite) for a, answer in zip(asked, answers, strict=True)]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SAMPLE_SCHEMA), sink, compression="zstd")
    return sink.getvalue()


class AnswerWorker:
    """Answers blocks with one model (a worker of `block_pool`)."""

    def __init__(self, plan: AnswerPlan, open_answerer: OpenAnswerer) -> None:
        self._plan, self._answerer = plan, open_answerer(plan)

    def work(self, block: Block) -> bytes:
        """The block's file."""
        return answer_block(self._plan, self._answerer, block)

    def close(self) -> None:
        """Lets go of the model."""
        self._answerer.close()
