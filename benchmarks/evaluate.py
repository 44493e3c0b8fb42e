"""Evaluation against asking one question at a time, the metric against whole masks, and a killed actor.

    python -m benchmarks.evaluate [--preset small] [--quick]

Three measurements, each with both sides in this run: (a) questions per second answered in batches, and one at a time,
with the engine; (b) pairs of masks per second of the metric on run-length codes, against a NumPy loop over whole masks
at 640×480; (c) an evaluation on 1 and on 2 actors, and on 2 of which one is killed half-way: same figures, each sample
once. The last line is one JSON object; a ratio above 1 means that ours is better.
"""

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.dying import die_once
from benchmarks.harness import alternate, describe, report, seconds_of
from benchmarks.untrained import write_untrained
from pixellm.jobs.evaluate.answers import GeneratedAnswers
from pixellm.jobs.evaluate.blocks import AnswerPlan, open_model, question_about
from pixellm.jobs.evaluate.job import Evaluation, EvaluationOptions, evaluate_suite
from pixellm.jobs.evaluate.metrics import score_rles
from pixellm.jobs.evaluate.suites import find_suite, question_places, questions_of
from pixellm.jobs.evaluate.types import Answerer
from pixellm.jobs.prepare import prepare
from pixellm.platform import cluster
from pixellm.platform.data.shards import open_shards
from pixellm.platform.masks import rle_encode

SUITE = "shapes"
BATCH = 8


@dataclass(frozen=True)
class DyingModel:
    """Opens the plan's model; the first process that has answered a batch, while `marker` exists, ends at once."""

    marker: Path

    def __call__(self, plan: AnswerPlan) -> Answerer:
        """The model, or one that dies."""
        return _Dying(open_model(plan), self.marker)


class _Dying:
    def __init__(self, answerer: Answerer, marker: Path) -> None:
        self._answerer, self._marker, self._batches = answerer, marker, 0

    def answer(self, questions: Sequence[Any]) -> list[Any]:
        """The model's answers, if it lives."""
        self._batches += 1
        if self._batches == 2:
            die_once(self._marker)
        return self._answerer.answer(questions)

    def close(self) -> None:
        """Lets go of the model."""
        self._answerer.close()


def compare_batching(model: Path, shards: str, count: int, repeats: int) -> dict[str, float]:
    """(a): the same questions in batches and one at a time; answers are cut at 24 tokens."""
    dataset, suite = open_shards(shards), find_suite(SUITE)
    questions = []
    for row, order in question_places(dataset, suite, count):
        content = dataset.read_row(row)
        questions += [question_about(a, content.image, "generated") for a in questions_of(content, row, suite, [order])]
    together = GeneratedAnswers(model, max_new_tokens=24, batch_size=BATCH)
    alone = GeneratedAnswers(model, max_new_tokens=24, batch_size=1)
    batches = [questions[start : start + BATCH] for start in range(0, len(questions), BATCH)]
    try:
        seconds = alternate(
            {
                "batched": lambda: seconds_of(lambda: [together.answer(batch) for batch in batches]),
                "alone": lambda: seconds_of(lambda: [alone.answer([question]) for question in questions]),
            },
            repeats,
        )
    finally:
        together.close()
        alone.close()
    ours, theirs = statistics.median(seconds["batched"]), statistics.median(seconds["alone"])
    print(f"(a) {len(questions)} questions: {BATCH} at a time {ours:.2f} s, one at a time {theirs:.2f} s")
    return {"batch_speedup": theirs / ours}


def compare_metric(pairs: int, repeats: int) -> dict[str, float]:
    """(b): blobs at 640×480, four true and four predicted to a question; each pair's intersection and union."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:480, :640]

    def blob() -> Any:
        top, left, high, wide = rng.uniform(80, 400), rng.uniform(80, 560), rng.uniform(20, 120), rng.uniform(20, 160)
        ripple = 1 + 0.1 * np.sin(rows / 7) + 0.1 * np.cos(columns / 5)
        return ((rows - top) / high) ** 2 + ((columns - left) / wide) ** 2 < ripple

    masks = [blob() for _ in range(8)]
    codes = [rle_encode(mask) for mask in masks]
    questions = max(1, pairs // 16)

    def on_codes() -> None:
        for _ in range(questions):
            score_rles(codes[:4], codes[4:])

    def packed_first() -> None:
        for _ in range(questions):
            score_rles(codes[:4], [rle_encode(mask) for mask in masks[4:]])

    def on_pixels() -> None:
        for _ in range(questions):
            for truth in masks[:4]:
                for mask in masks[4:]:
                    np.count_nonzero(truth & mask), np.count_nonzero(truth | mask)

    sides = {"codes": on_codes, "packed": packed_first, "pixels": on_pixels}
    timed = {name: functools.partial(seconds_of, run) for name, run in sides.items()}
    ours, packed, theirs = (statistics.median(seconds) for seconds in alternate(timed, repeats).values())
    done = 16 * questions
    print(
        f"(b) {done} pairs at 640×480: run-length codes {done / ours:.0f} pairs/s, packing the predictions included "
        f"{done / packed:.0f}, whole masks {done / theirs:.0f}"
    )
    return {
        "metric_speedup": theirs / ours,
        "metric_speedup_with_packing": theirs / packed,
        "pairs_per_core_s": done / ours,
    }


def compare_actors(model: Path, shards: str, folder: Path, count: int) -> dict[str, Any]:
    """(c): 1 actor, 2 actors, and 2 of which one is killed."""
    marker = folder / "die"
    runs: dict[str, Evaluation] = {}
    rates: dict[str, float] = {}
    for name, actors, opener in (("1", 1, open_model), ("2", 2, open_model), ("killed", 2, DyingModel(marker))):
        if name == "killed":
            marker.touch()
        options = EvaluationOptions(limit=count, batch_size=BATCH, actors=actors, with_report=False)
        started = time.perf_counter()
        runs[name] = evaluate_suite(model, shards, folder / name, SUITE, options, open_answerer=opener)
        rates[name] = count / (time.perf_counter() - started)
    tables = [pq.read_table(folder / name / "samples.parquet") for name in runs]
    ids = tables[2]["sample_id"].to_pylist()
    is_equal = all(run.metrics == runs["1"].metrics for run in runs.values()) and all(
        t.equals(tables[0]) for t in tables
    )
    was_killed, once = not marker.exists(), len(set(ids)) == len(ids) == count
    print(
        f"(c) {count} questions, start-up included: {rates['1']:.2f}/s on 1 actor, {rates['2']:.2f}/s on 2; an actor "
        f"was {'' if was_killed else 'NOT '}killed, figures {'equal' if is_equal else 'DIFFER'}, "
        f"each sample once: {'yes' if once else 'NO'}"
    )
    return {
        "faults_equal": is_equal and once and was_killed,
        "samples_per_s": rates["2"],
        "samples_per_s_1_actor": rates["1"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small", help="sizes of the network (default: small)")
    parser.add_argument("--quick", action="store_true", help="fewer questions; below 5 minutes on 2 cores")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    result = describe("evaluate", preset=options.preset, quick=options.quick)
    count = 24 if options.quick else 96
    with tempfile.TemporaryDirectory(prefix="pixellm-evaluate-") as scratch:
        folder = Path(scratch)
        shards = str(folder / "shards")
        prepare("shapes", None, shards, options={"samples": count, "split": "val"})
        model = write_untrained(options.preset, folder / "model")
        result |= compare_metric(2_000 if options.quick else 10_000, 5)
        result |= compare_batching(model, shards, 16 if options.quick else 48, 5)
        cluster.connect()
        try:
            result |= compare_actors(model, shards, folder, count)
        finally:
            cluster.disconnect()
    result["seconds"] = round(time.perf_counter() - started, 1)
    report(result)


if __name__ == "__main__":
    main()
