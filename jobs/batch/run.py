"""`pixellm predict --in URI --out URI QUESTION`: the driver of a batch prediction.

OUT gets `answers/part-*.parquet` and, where an input could not be answered, `quarantine/part-*.parquet`: each input is
in exactly one of them, once. `summary.json` comes last. The same command goes on where one stopped (kill -9 included):
the driver holds the numbers of blocks, never pictures, answers or masks.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pixellm.errors import ConfigError, DataError
from pixellm.jobs.batch.inputs import open_inputs, pin_inputs
from pixellm.jobs.batch.worker import (
    ANSWERS,
    BEGUN,
    QUARANTINE,
    BatchBlock,
    BatchPlan,
    OpenEngine,
    PredictWorker,
    open_engine,
    part_uri,
)
from pixellm.jobs.block_folder import model_digest, take_folder
from pixellm.jobs.block_pool import Pool, run_blocks
from pixellm.platform import registry, storage
from pixellm.platform.observability import format_duration
from pixellm.platform.tracking import from_any_folder

SUMMARY_FILE = "summary.json"
_FOOTERS_AT_A_TIME = 16
_REASONS_SHOWN = 5


@dataclass(frozen=True)
class BatchProgress:
    """How far a batch prediction is.

    Attributes:
        done: pictures answered or quarantined, by earlier attempts too.
        total: all pictures.
        quarantined: of those that this attempt did.
        elapsed_s: of this attempt.
        done_here: by this attempt.
    """

    done: int
    total: int
    quarantined: int
    elapsed_s: float
    done_here: int

    def cost(self, per_hour: float) -> tuple[float, float]:
        """So far, and expected until the end of this attempt, for what costs so much an hour."""
        so_far = per_hour * self.elapsed_s / 3600
        left = self.total - self.done
        return so_far, so_far * (1 + left / self.done_here) if self.done_here else float("nan")


OnBatchProgress = Callable[[BatchProgress], None]


@dataclass(frozen=True)
class BatchResult:
    """What a batch prediction came to; also in `OUT/summary.json`.

    Attributes:
        inputs: pictures.
        answered: rows of the answers' parts.
        quarantined: rows of the quarantine's parts.
        kinds: why, kind → count.
        examples: some of the quarantined with their reasons.
        found_done: pictures that an earlier attempt had done.
        seconds: of this attempt.
        actors: most actors of this attempt.
        model: the reference, an alias resolved to its version.
        question: asked about each.
        out_uri: the folder.
    """

    inputs: int
    answered: int
    quarantined: int
    kinds: dict[str, int]
    examples: tuple[str, ...]
    found_done: int
    seconds: float
    actors: int
    model: str
    question: str
    out_uri: str

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"examples": list(self.examples)}

    def to_text(self) -> str:
        """Counts, reasons, and where everything is."""
        before = f", {self.found_done} of them by an earlier attempt" if self.found_done else ""
        took = format_duration(self.seconds)
        lines = [f"{self.inputs} pictures: {self.answered} answered, {self.quarantined} quarantined{before}; {took}"]
        lines += [f"  {kind}: {count}" for kind, count in sorted(self.kinds.items())]
        lines += [f"    {example}" for example in self.examples]
        return "\n".join([*lines, f"answers: {storage.join(self.out_uri, ANSWERS)}"])


def predict_batch(
    plan: BatchPlan,
    pool: Pool | None = None,
    *,
    retry_quarantined: bool = False,
    open_engine: OpenEngine = open_engine,
    on_progress: OnBatchProgress | None = None,
) -> BatchResult:
    """Asks one question about every picture.

    Args:
        plan: what to do. An alias is resolved now, so that all actors load the same version.
        pool: where; None: in this process.
        retry_quarantined: does the blocks that hold quarantined pictures again, e.g. after a store was down.
        open_engine: opens what answers.
        on_progress: told at the start and after each block.

    Raises:
        ConfigError: no question, or the folder holds another prediction.
        DataError: there is no such input, or the question is too long for the model.
        ModelLoadError: the reference does not resolve to a whole model.
    """
    if not plan.question.strip():
        raise ConfigError('got an empty question; wanted pixellm predict --in URI --out URI "QUESTION" --model REF')
    started = time.monotonic()
    plan, digest = _fixed(plan)
    is_begun = bool(storage.list_names(storage.join(plan.out_uri, ANSWERS)))
    inputs = pin_inputs(plan.input_uri, plan.out_uri, plan.block_size, is_begun=is_begun)
    take_folder(plan.out_uri, _identity(plan, inputs, digest), "a prediction", blocks=ANSWERS)
    total = len(open_inputs(plan.input_uri, plan.out_uri, plan.block_size))
    there = _finished(plan.out_uri, retry_quarantined)
    sizes = {
        number: min(plan.block_size, total - number * plan.block_size) for number in range(_num_blocks(plan, total))
    }
    missing = [BatchBlock(number, size) for number, size in sizes.items() if number not in there]
    found_done = done = total - sum(block.size for block in missing)
    quarantined = 0
    tell = on_progress or _say_nothing
    tell(BatchProgress(done, total, 0, 0.0, 0))
    for number, content in run_blocks(missing, partial(PredictWorker, plan, open_engine), pool):
        done += sizes[number]
        quarantined += json.loads(content)["quarantined"]
        tell(BatchProgress(done, total, quarantined, time.monotonic() - started, done - found_done))
    _forget_attempts(plan.out_uri)
    answered, kinds, examples = _count(plan.out_uri, list(sizes))
    if answered + sum(kinds.values()) != total:
        raise DataError(
            f"{plan.out_uri} holds {answered} answers and {sum(kinds.values())} quarantined pictures of {total}; "
            "another process wrote into it: run the same command again"
        )
    result = BatchResult(
        inputs=total,
        answered=answered,
        quarantined=sum(kinds.values()),
        kinds=kinds,
        examples=examples,
        found_done=found_done,
        seconds=time.monotonic() - started,
        actors=pool.actors if pool else 0,
        model=plan.model_ref,
        question=plan.question,
        out_uri=plan.out_uri,
    )
    content = (json.dumps(result.to_json_dict(), indent=1) + "\n").encode()
    storage.write_bytes(storage.join(plan.out_uri, SUMMARY_FILE), content)
    return result


def _fixed(plan: BatchPlan) -> tuple[BatchPlan, str]:
    """The plan with places and model that mean the same to every process and for the whole job; the model's digest."""
    tracking = from_any_folder(plan.tracking)
    folder = registry.resolve(plan.model_ref, tracking)
    is_version = plan.model_ref.startswith("models:")
    fixed = replace(
        plan,
        input_uri=storage.absolute(plan.input_uri),
        out_uri=storage.absolute(plan.out_uri),
        model_ref=registry.look_up(plan.model_ref, tracking).reference if is_version else str(folder),
        tracking=tracking,
    )
    return fixed, model_digest(folder)


def _identity(plan: BatchPlan, inputs: str, digest: str) -> dict[str, Any]:
    """What decides the answers."""
    return {
        "inputs": inputs,
        "question": plan.question,
        "model_files": digest,
        "block_size": plan.block_size,
        "max_new_tokens": plan.max_new_tokens,
        "threshold": plan.threshold,
    }


def _num_blocks(plan: BatchPlan, total: int) -> int:
    return -(-total // plan.block_size)


def _finished(out_uri: str, retry_quarantined: bool) -> set[int]:
    done = _part_numbers(out_uri, ANSWERS)
    return done - _part_numbers(out_uri, QUARANTINE) if retry_quarantined else done


def _part_numbers(out_uri: str, kind: str) -> set[int]:
    names = storage.list_names(storage.join(out_uri, kind))
    return {int(name[5:-8]) for name in names if name.startswith("part-") and name.endswith(".parquet")}


def _count(out_uri: str, numbers: list[int]) -> tuple[int, dict[str, int], tuple[str, ...]]:
    """Answers, quarantined pictures by kind, and some of these in words: as they lie in the folder, not as was told."""
    with ThreadPoolExecutor(_FOOTERS_AT_A_TIME) as threads:
        answered = sum(threads.map(partial(_num_rows, out_uri), numbers))
    kinds: Counter[str] = Counter()
    examples: list[str] = []
    for row in _quarantined_rows(out_uri):
        kinds[row["kind"]] += 1
        if len(examples) < _REASONS_SHOWN:
            examples.append(f"{row['input']}: {row['reason']}")
    return answered, dict(kinds), tuple(examples)


def _num_rows(out_uri: str, number: int) -> int:
    return int(_open_part(part_uri(out_uri, ANSWERS, number)).metadata.num_rows)


def _quarantined_rows(out_uri: str) -> Iterator[dict[str, Any]]:
    for number in sorted(_part_numbers(out_uri, QUARANTINE)):
        yield from _open_part(part_uri(out_uri, QUARANTINE, number)).read().to_pylist()


def _open_part(uri: str) -> pq.ParquetFile:
    filesystem, path = storage.open_filesystem(uri)
    try:
        return pq.ParquetFile(filesystem.open_input_file(path))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {uri}: {error}; remove it and run the same command again") from None


def _forget_attempts(out_uri: str) -> None:
    filesystem, path = storage.open_filesystem(storage.join(out_uri, BEGUN))
    if filesystem.get_file_info(path).type == pafs.FileType.Directory:
        filesystem.delete_dir(path)


def _say_nothing(_progress: BatchProgress) -> None:
    """Nobody watches."""
