"""`pixellm evaluate`: a suite's questions through a model, samples and figures kept, a report, a run in MLflow.

The same command goes on where an interrupted one stopped: answered blocks are on disk, judged answers in the cache.
"""

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pixellm.errors import ConfigError
from pixellm.jobs.block_folder import model_digest, take_folder
from pixellm.jobs.block_pool import Pool, run_blocks
from pixellm.jobs.evaluate.blocks import (
    AnswerPlan,
    AnswerWorker,
    Block,
    Mode,
    OpenAnswerer,
    block_uri,
    cut_blocks,
    open_model,
    read_block,
)
from pixellm.jobs.evaluate.judge import Judge, JudgeSettings
from pixellm.jobs.evaluate.paper_numbers import PAPER_TABLES
from pixellm.jobs.evaluate.samples import SAMPLE_SCHEMA
from pixellm.jobs.evaluate.suites import find_suite, question_places
from pixellm.jobs.evaluate.summary import Figure, Summary
from pixellm.platform import registry, storage
from pixellm.platform.data.shards import open_shards
from pixellm.platform.gate import suite_metric
from pixellm.platform.settings import Settings, TrackingSettings
from pixellm.platform.tracking import from_any_folder, start_run
from pixellm.platform.version import code_version

METRICS_FILE, SAMPLES_FILE, REPORT_FILE = "metrics.json", "samples.parquet", "report.html"
_JUDGED_AT_A_TIME = 64

#: Called with the number of finished questions and of all.
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class EvaluationOptions:
    """How an evaluation runs; none of it but `mode`, `limit` and `batch_size` can change an answer.

    Attributes:
        mode: "generated", or "forced" (true answers given, only masks scored).
        limit: questions at most.
        batch_size: questions answered together.
        device: where the model runs.
        actors: most actors of the pool; 0: in this process, without Ray.
        actor_cpus: logical CPUs of an actor.
        actor_gpus: GPUs of an actor.
        judge: who judges; None: mask-only figures.
        seed: of intervals and of the random gallery.
        with_report: writes `report.html`.
    """

    mode: Mode = "generated"
    limit: int | None = None
    batch_size: int = 8
    device: str = "cpu"
    actors: int = 0
    actor_cpus: float = 1.0
    actor_gpus: float = 0.0
    judge: JudgeSettings | None = None
    seed: int = 0
    with_report: bool = True


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation came to; also in `out_dir/metrics.json`.

    Attributes:
        suite: its name.
        scoring: "matched" or "merged": which gIoU and cIoU are the suite's own.
        mode: "generated" or "forced".
        model: the reference that was evaluated.
        data: shards and their digest.
        questions: how many.
        metrics: figure → value, 0 to 1 (`judge_score` 1 to 10, `mean_targets_…` targets per question).
        intervals: figure → 95 % interval.
        breakdowns: by number of targets, question type and target area.
        judge: model, counts, cost and agreement; None where nobody judged.
        commit: of the code.
        out_dir: the folder.
        run_id: of MLflow; None where the run was not recorded.
        method: what the model is called in a table; empty where what answers is no model folder.
        tflops: of one answer with the suite's mean number of targets, in 10¹²; None where it is not counted.
    """

    suite: str
    scoring: str
    mode: Mode
    model: str
    data: dict[str, str]
    questions: int
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    breakdowns: dict[str, Any]
    judge: dict[str, Any] | None
    commit: str | None
    out_dir: str
    run_id: str | None = field(default=None)
    method: str = ""
    tflops: float | None = None

    @property
    def judge_note(self) -> str:
        """How much the judge has to do with the figures, in words."""
        if self.judge is None:
            return "mask-only: no judge was asked, so these are not the paper's MUSE figures"
        samples = self.judge["samples"]
        failed = sum(samples.get(name, 0) for name in ("refused", "malformed", "no answer", "out of budget"))
        left_out = f"; {failed} of {self.questions} questions without a verdict are left out of them" if failed else ""
        agreement = self.judge["agreement"]
        repeated = ""
        if agreement is not None and agreement["share_equal"] is not None:
            share = 100 * agreement["share_equal"]
            repeated = f"; the median of {agreement['repeats']} verdicts, which are equal on {share:.0f} % of the masks"
        return f"judged figures by {self.judge['model']}{repeated}{left_out}"

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"judge_note": self.judge_note}

    def to_text(self) -> str:
        """The figures in percent with their intervals, and where the rest is."""
        how = "answers generated" if self.mode == "generated" else "true answers given (teacher-forced)"
        cost = "" if self.tflops is None else f" ({self.tflops:.3g} TFLOPs an answer)"
        lines = [f"{self.method}{cost}"] if self.method else []
        lines += [f"{self.suite}: {self.questions} questions, {how}, {self.judge_note}"]
        for name, value in self.metrics.items():
            low, high = self.intervals[name]
            factor = 1 if name.startswith(("mean_", "judge_score")) else 100
            lines.append(f"  {name:22} {factor * value:7.2f}  [{factor * low:.2f}, {factor * high:.2f}]")
        return "\n".join([*lines, f"samples, figures and report: {self.out_dir}"])


def evaluate_suite(
    model_ref: str | Path,
    data_uri: str,
    out_dir: str | Path,
    suite_name: str,
    options: EvaluationOptions | None = None,
    *,
    tracking: TrackingSettings | None = None,
    settings: Settings | None = None,
    open_answerer: OpenAnswerer = open_model,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Evaluates a model on a suite.

    Args:
        model_ref: a model folder, `models:/NAME@alias` or `models:/NAME/VERSION`.
        data_uri: prepared shards.
        out_dir: local folder; gets `metrics.json`, `samples.parquet`, `report.html` and the blocks.
        suite_name: one of `suites.SUITES`.
        options: how.
        tracking: which registry the reference is looked up in.
        settings: recorded as a run in MLflow with the results; None records nothing. A registered version that
            answered all questions by itself gets them as its metrics SUITE.METRIC, which gates read.
        open_answerer: opens what answers.
        on_progress: told after each block.

    Raises:
        ConfigError: no such suite, or the folder holds another evaluation.
        DataError: no shards, or no such question in them.
        ModelLoadError: the reference does not resolve to a whole model.
        JudgeError: `--judge-offline`, and a verdict is not in the cache.
        LanguageModelError: the judge's endpoint cannot be used.
    """
    options, tracking = options or EvaluationOptions(), from_any_folder(tracking or TrackingSettings())
    suite, dataset = find_suite(suite_name), open_shards(storage.absolute(data_uri))
    version = registry.look_up(str(model_ref), tracking) if str(model_ref).startswith("models:") else None
    reference = str(model_ref) if version is None else version.reference  # an alias may move meanwhile
    model_dir = registry.resolve(reference, tracking) if open_answerer is open_model else None
    if version is None and model_dir is not None:
        reference = str(model_dir)
    plan = AnswerPlan(dataset, suite, reference, options.mode, options.batch_size, options.device, tracking)
    folder = Path(out_dir)
    identity = _identity(plan, options, model_dir)
    blocks = cut_blocks(question_places(dataset, suite, options.limit), options.batch_size)
    # After what may be refused: a refused evaluation leaves nothing behind.
    take_folder(folder, identity, "an evaluation", blocks="blocks")
    _answer_missing(plan, blocks, folder, options, open_answerer, on_progress)
    digests = {suite.name: dataset.digest}
    run: Any = nullcontext() if settings is None else start_run(settings, kind="evaluate", data_digests=digests)
    with run as tracker:
        summary, judged = asyncio.run(_gather(blocks, folder, suite.scoring, options))
        figures = summary.figures()
        result = Evaluation(
            suite=suite.name,
            scoring=suite.scoring,
            mode=options.mode,
            model=str(model_ref),
            data={"uri": str(data_uri), "digest": dataset.digest},
            questions=len(summary),
            metrics={name: figure.value for name, figure in figures.items()},
            intervals={name: (figure.low, figure.high) for name, figure in figures.items()},
            breakdowns=_plain(summary.breakdowns()),
            judge=judged,
            commit=code_version().commit,
            out_dir=str(folder),
            run_id=None if tracker is None else tracker.run_id,
            **_method(model_dir, figures),
        )
        storage.write_bytes(folder / METRICS_FILE, (json.dumps(result.to_json_dict(), indent=1) + "\n").encode())
        if options.with_report:
            from pixellm.jobs.evaluate.report import write_report  # imports matplotlib

            write_report(result, dataset, folder, seed=options.seed, paper=PAPER_TABLES.get(suite.name))
        if tracker is not None:
            about = {"suite": suite.name, "mode": options.mode, "model": str(model_ref), "judge": result.judge_note}
            about["method"] = result.method
            tracker.set_tags({f"pixellm.evaluate.{name}": value for name, value in about.items()})
            tracker.log_metrics({k: v for k, v in result.metrics.items() if math.isfinite(v)})
            for name in (METRICS_FILE, SAMPLES_FILE, *([REPORT_FILE] if options.with_report else [])):
                tracker.log_artifact(folder / name, "evaluation")
            if version is not None and options.mode == "generated" and options.limit is None:
                finite = {suite_metric(suite.name, k): v for k, v in result.metrics.items() if math.isfinite(v)}
                registry.add_metrics(version, finite, tracking)
    return result


def read_samples(folder: str | Path) -> Iterator[dict[str, Any]]:
    """The samples of a finished evaluation, in order, one row group in memory.

    Raises:
        ConfigError: the folder holds none.
    """
    path = Path(folder) / SAMPLES_FILE
    if not path.is_file():
        raise ConfigError(f"{folder} holds no {SAMPLES_FILE}; make it with `pixellm evaluate … --out {folder}`")
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            yield from file.read_row_group(group).to_pylist()


def _answer_missing(
    plan: AnswerPlan,
    blocks: list[Block],
    folder: Path,
    options: EvaluationOptions,
    open_answerer: OpenAnswerer,
    on_progress: OnProgress | None,
) -> None:
    there = set(storage.list_names(folder / "blocks"))
    missing = [block for block in blocks if block_uri("", block.number).rpartition("/")[2] not in there]
    total = sum(len(block.places) for block in blocks)
    done = total - sum(len(block.places) for block in missing)
    tell = on_progress or _say_nothing
    tell(done, total)
    if not missing:
        return
    pool = Pool(options.actors, options.actor_cpus, options.actor_gpus)
    sizes = {block.number: len(block.places) for block in missing}
    for number, content in run_blocks(missing, partial(AnswerWorker, plan, open_answerer), pool):
        storage.write_bytes(block_uri(str(folder), number), content)
        done += sizes[number]
        tell(done, total)


def _say_nothing(_done: int, _total: int) -> None:
    """Nobody watches."""


async def _gather(
    blocks: list[Block], folder: Path, scoring: Any, options: EvaluationOptions
) -> tuple[Summary, dict[str, Any] | None]:
    """Blocks in order → judged → `samples.parquet`, summed up on the way."""
    summary = Summary(scoring, seed=options.seed)
    judge = None if options.judge is None else Judge(options.judge)
    schema = SAMPLE_SCHEMA.with_metadata({"judge": options.judge.model if options.judge else "none: mask-only"})
    with storage.atomic_write_file(folder / SAMPLES_FILE) as path, pq.ParquetWriter(path, schema) as writer:
        async with judge or nullcontext():
            async for samples in _batches(blocks, folder):
                if judge is not None:
                    verdicts = await judge.judge_all(samples)
                    samples = [s | verdict.columns() for s, verdict in zip(samples, verdicts, strict=True)]
                for sample in samples:
                    summary.add(sample)
                writer.write_table(pa.Table.from_pylist(samples, schema=SAMPLE_SCHEMA))
    return summary, None if judge is None else judge.report()


async def _batches(blocks: list[Block], folder: Path) -> AsyncIterator[list[dict[str, Any]]]:
    waiting: list[dict[str, Any]] = []
    for block in blocks:
        waiting += read_block(str(folder), block.number)
        if len(waiting) >= _JUDGED_AT_A_TIME:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _method(model_dir: Path | None, figures: dict[str, Figure]) -> dict[str, Any]:
    if model_dir is None:
        return {}
    from pixellm.jobs.evaluate.method import method_of  # imports torch and transformers

    method = method_of(model_dir, max(1, round(figures["mean_targets_asked"].value)))
    return {"method": method.name, "tflops": method.tflops}


def _identity(plan: AnswerPlan, options: EvaluationOptions, model_dir: Path | None) -> dict[str, Any]:
    """What decides the answers."""
    return {
        "suite": plan.suite.name,
        "data": plan.dataset.digest,
        "model": plan.model_ref,
        "model_files": model_digest(model_dir),
        "mode": plan.mode,
        "limit": options.limit,
        "batch_size": plan.batch_size,
    }


def _plain(tree: Any) -> Any:
    if isinstance(tree, Figure):
        return [tree.value, tree.low, tree.high]
    return {key: _plain(value) for key, value in tree.items()} if isinstance(tree, dict) else tree
