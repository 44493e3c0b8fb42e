"""One actor of a batch prediction: a block's pictures in, a Parquet part of answers and one of quarantined inputs out.

A picture that cannot be read, decoded or asked about is quarantined with the reason; the others of its block are
answered. So is a picture that has ended its process twice: a block that was begun twice and not finished is done one
picture at a time, each noted before it is answered. The answers' part is written last, in one step, under its block's
number: a block done twice leaves one part.
"""

import io
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pixellm.errors import BadRequestError, DataError
from pixellm.jobs.batch.inputs import Picture, open_inputs
from pixellm.platform import registry, storage
from pixellm.platform.data.schema import MASK_TYPE
from pixellm.platform.settings import TrackingSettings

ANSWERS, QUARANTINE, BEGUN = "answers", "quarantine", "begun"
_PLAIN_STARTS = 2
_DEATHS = 2

_TARGET_TYPE = pa.struct(
    [
        ("index", pa.int32()),
        ("phrase", pa.string()),
        ("score", pa.float32()),
        ("box", pa.list_(pa.float32())),
        ("area", pa.int64()),
        ("mask", MASK_TYPE),
    ]
)
#: One row per answered picture; boxes (x0, y0, x1, y1; null where a mask is empty) and masks (COCO RLE) are in its own
#: pixels, upright.
ANSWER_SCHEMA = pa.schema(
    [
        ("number", pa.int64()),
        ("input", pa.string()),
        ("text", pa.string()),
        ("targets", pa.list_(_TARGET_TYPE)),
    ]
)
#: One row per picture that was not answered. `kind`: unreadable, damaged (no picture that can be used), or
#: fatal (it ended its process).
QUARANTINE_SCHEMA = pa.schema(
    [("number", pa.int64()), ("input", pa.string()), ("kind", pa.string()), ("reason", pa.string())]
)


@dataclass(frozen=True)
class BatchPlan:
    """All that an actor needs; picklable.

    Attributes:
        input_uri: shards, or a folder of pictures.
        question: asked about every picture.
        model_ref: resolved where the model is loaded.
        out_uri: the job's folder.
        block_size: pictures of a block.
        batch_size: pictures answered together.
        max_new_tokens: longest answer.
        threshold: probability above which a pixel belongs to a target.
        device: where the model runs.
        tracking: which registry the reference is looked up in.
    """

    input_uri: str
    question: str
    model_ref: str
    out_uri: str
    block_size: int = 64
    batch_size: int = 8
    max_new_tokens: int = 256
    threshold: float = 0.5
    device: str = "cpu"
    tracking: TrackingSettings = field(default_factory=TrackingSettings)


@dataclass(frozen=True)
class BatchBlock:
    """Pictures `number · block_size` and following."""

    number: int
    size: int


#: Opens the engine of a plan; picklable.
OpenEngine = Callable[[BatchPlan], Any]


def open_engine(plan: BatchPlan) -> Any:
    """The plan's model as a `PixelLMEngine`.

    Raises:
        ModelLoadError: the reference does not resolve to a whole model.
    """
    from pixellm.model.engine import PixelLMEngine  # slow (transformers)

    folder = registry.resolve(plan.model_ref, plan.tracking)
    return PixelLMEngine.from_pretrained(folder, device=plan.device, max_batch_size=plan.batch_size)


def part_uri(out_uri: str, kind: str, number: int) -> str:
    """Where a block's answers (or quarantined inputs) are kept."""
    return storage.join(out_uri, kind, f"part-{number:07d}.parquet")


class PredictWorker:
    """Answers blocks with one engine (a worker of `block_pool`)."""

    def __init__(self, plan: BatchPlan, open_engine: OpenEngine) -> None:
        self._plan = plan
        self._inputs = open_inputs(plan.input_uri, plan.out_uri, plan.block_size)
        self._engine = open_engine(plan)
        self._ask(Image.new("RGB", (8, 8)))  # a question that is refused about any picture is the question's fault

    def work(self, block: BatchBlock) -> bytes:
        """Writes the block's parts; returns JSON: how many pictures were answered and quarantined."""
        begun = _Begun(self._plan.out_uri, block.number)
        pictures = self._inputs.block(block.number)
        if begun.starts <= _PLAIN_STARTS:
            # As many threads as keep the engine's batch full while others read and decode the next pictures.
            with ThreadPoolExecutor(2 * self._plan.batch_size) as threads:
                outcomes = list(threads.map(self._answer, pictures))
        else:
            outcomes = [self._answer_with_care(picture, begun) for picture in pictures]
        answers = [outcome for outcome in outcomes if "reason" not in outcome]
        quarantined = [outcome for outcome in outcomes if "reason" in outcome]
        self._write(QUARANTINE, block.number, quarantined, QUARANTINE_SCHEMA)
        self._write(ANSWERS, block.number, answers, ANSWER_SCHEMA)
        return json.dumps({"answered": len(answers), "quarantined": len(quarantined)}).encode()

    def close(self) -> None:
        """Stops the engine's threads."""
        self._engine.close()

    def _answer(self, picture: Picture) -> dict[str, Any]:
        """The picture's row of one of the two parts; what is not the picture's fault is raised."""
        try:
            content = picture.load()
        except DataError as error:
            return _quarantined(picture, "unreadable", str(error))
        try:
            return _answer_row(picture, self._ask(content))
        except (DataError, BadRequestError) as error:
            return _quarantined(picture, "damaged", str(error))

    def _ask(self, picture: Image.Image | bytes) -> Any:
        from pixellm.model.engine.types import GenerationOptions, SegmentRequest  # slow (torch)

        options = GenerationOptions(max_new_tokens=self._plan.max_new_tokens, threshold=self._plan.threshold)
        return self._engine.submit(SegmentRequest(picture, self._plan.question, options)).result()

    def _answer_with_care(self, picture: Picture, begun: "_Begun") -> dict[str, Any]:
        if begun.deaths(picture.name) >= _DEATHS:
            reason = f"its process ended {_DEATHS} times while it was answered (out of memory, or a crash)"
            return _quarantined(picture, "fatal", reason)
        begun.suspect(picture.name)
        outcome = self._answer(picture)
        begun.clear(picture.name)
        return outcome

    def _write(self, kind: str, number: int, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
        uri = part_uri(self._plan.out_uri, kind, number)
        if not rows and kind == QUARANTINE:
            filesystem, path = storage.open_filesystem(uri)
            with suppress(FileNotFoundError):  # of an attempt that saw other files
                filesystem.delete_file(path)
            return
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink, compression="zstd")
        storage.write_bytes(uri, sink.getvalue())


class _Begun:
    """How often a block was begun, and whom its workers died of; kept where the next worker looks."""

    def __init__(self, out_uri: str, number: int) -> None:
        self._uri = storage.join(out_uri, BEGUN, f"block-{number:07d}.json")
        before = storage.read_json(self._uri) if storage.exists(self._uri) else {}
        self.starts = int(before.get("starts", 0)) + 1
        self._suspects: dict[str, int] = dict(before.get("suspects", {}))
        self._write()

    def deaths(self, name: str) -> int:
        """How often a picture was being answered when its worker ended."""
        return self._suspects.get(name, 0)

    def suspect(self, name: str) -> None:
        """The picture is answered now."""
        self._suspects[name] = self.deaths(name) + 1
        self._write()

    def clear(self, name: str) -> None:
        """The picture was answered; the next `suspect` writes it down."""
        del self._suspects[name]

    def _write(self) -> None:
        storage.write_bytes(self._uri, json.dumps({"starts": self.starts, "suspects": self._suspects}).encode())


def _quarantined(picture: Picture, kind: str, reason: str) -> dict[str, Any]:
    return {"number": picture.number, "input": picture.name, "kind": kind, "reason": reason}


def _answer_row(picture: Picture, result: Any) -> dict[str, Any]:
    targets = [
        {
            "index": target.index,
            "phrase": target.phrase,
            "score": target.score,
            "box": target.box_xyxy,
            "area": target.area_px,
            "mask": {"size": target.rle["size"], "counts": target.rle["counts"].encode()},
        }
        for target in result.targets
    ]
    return {"number": picture.number, "input": picture.name, "text": result.text, "targets": targets}
