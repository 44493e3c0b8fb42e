"""The driver of a training run: data, cluster, MLflow run, worker group, and what becomes of the finished model.

`train` is one call from settings to a registered version. Called again with the same settings it goes on where the run
stands: from its last checkpoint, from the finished model to the registry, or not at all.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pixellm.errors import ConfigError
from pixellm.jobs.train.build import build_processor, trained_parts
from pixellm.jobs.train.checkpoints import CheckpointFolder
from pixellm.jobs.train.entry import WorkerSpec
from pixellm.jobs.train.events import WorkerResult
from pixellm.jobs.train.group import run_group
from pixellm.jobs.train.interrupt import stop_on_signals
from pixellm.jobs.train.progress import TrainingView
from pixellm.jobs.train.run_folder import RunFolder, RunState, check_same_run, identity_of
from pixellm.platform import cluster, storage
from pixellm.platform.data import mixture
from pixellm.platform.data.compose import QuestionSource
from pixellm.platform.observability import ProgressLine
from pixellm.platform.settings import ClusterSettings, Settings
from pixellm.platform.tracking import Tracker, from_any_folder, start_run
from pixellm.platform.version import code_version

_DEMO_SCHEME = "demo:"


@dataclass(frozen=True)
class TrainResult:
    """What a training run came to.

    Attributes:
        run_id: of MLflow.
        steps: optimiser steps done in all.
        samples_per_s: over all workers, start-up left out; NaN where too few steps ran to tell.
        model_dir: the finished model folder; None after an interruption.
        registered_version: of the model registry; None where nothing was registered.
        resumed_from: the step that this call went on from; None for a run from the start.
        interrupted: whether Ctrl-C, SIGTERM or a node's pre-emption stopped it.
        ended_early: whether validation found that nothing more is gained.
        already_finished: the run was finished before; this call changed nothing.
        checkpoint: folder of the newest checkpoint that this call wrote or started from.
        metrics: of the evaluation after training.
        promotion: what the gate said, in one sentence.
        recover_s: for each fault, seconds from the last step before it to the first one after it.
        steps_repeated: steps done again after faults.
    """

    run_id: str
    steps: int
    samples_per_s: float
    model_dir: str | None
    registered_version: int | None
    resumed_from: int | None
    interrupted: bool
    already_finished: bool = False
    checkpoint: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    promotion: str = ""
    ended_early: bool = False
    recover_s: list[float] = field(default_factory=list)
    steps_repeated: int = 0

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values for JSON; an unknown rate is null."""
        rate = None if math.isnan(self.samples_per_s) else self.samples_per_s
        return asdict(self) | {"samples_per_s": rate}

    def to_text(self) -> str:
        """What a person wants to know now."""
        if self.interrupted:
            where = self.checkpoint or "no checkpoint (nothing was trained yet)"
            return f"stopped after step {self.steps}; checkpoint: {where}\nthe same command goes on from there"
        lines = []
        if self.already_finished:
            lines.append(
                f"already finished at step {self.steps}; nothing was done. To train further raise train.steps; to "
                "train again use --fresh or another --name"
            )
        else:
            rate = "" if math.isnan(self.samples_per_s) else f", {self.samples_per_s:.2f} samples/s"
            early = ", ended early: validation has reached its plateau" if self.ended_early else ""
            lines.append(f"trained {self.steps} steps{rate}{early}")
        if self.recover_s:
            seconds = ", ".join(f"{value:.1f} s" for value in self.recover_s)
            lines.append(f"faults: {len(self.recover_s)}, recovered in {seconds}; {self.steps_repeated} steps repeated")
        lines.append(f"model: {self.model_dir}")
        if self.metrics:
            lines.append("evaluation: " + ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items()))
        if self.registered_version is not None:
            lines.append(f"registered as version {self.registered_version}; {self.promotion}")
        return "\n".join(lines)


def train(settings: Settings, *, progress: bool = True, fresh: bool = False) -> TrainResult:
    """Trains as the settings say, evaluates, registers, and asks the gate about `champion`.

    Args:
        settings: the resolved tree.
        progress: show a progress line on standard error.
        fresh: set a former run of this name aside and start anew.

    Returns:
        The result; `interrupted` after Ctrl-C, with everything in place to go on.

    Raises:
        ConfigError: the settings do not fit together, or belong to another run of this name.
        DataError: shards are absent or damaged.
        CheckpointError: the run's checkpoints cannot be used.
        ClusterError: Ray is not reachable or too small.
    """
    trained_parts(settings.train)  # contradictions in the recipe show before anything is started
    folder = RunFolder(settings)
    with folder.locked(), ExitStack() as stack:
        if fresh:
            folder.set_aside()
        state = folder.read()
        settings, sources = open_sources(settings, folder.data_dir)
        digests = _digests(settings, sources)
        if state.state != "new":
            check_same_run(state, settings, digests)
        is_over = bool(state.result.get("ended_early")) and settings.train.validation.patience is not None
        is_at_end = state.step >= settings.train.steps or is_over
        if state.state == "finished" and is_at_end:
            return TrainResult(**(state.result | {"already_finished": True, "samples_per_s": math.nan}))
        build_processor(settings)  # a preset or tokenizer that does not fit shows now
        line = stack.enter_context(ProgressLine(settings.train.steps)) if progress else None
        tracker = start_run(settings, run_id=state.run_id, data_digests=digests)
        view = TrainingView(settings.train.steps, line, tracker, step=state.step)
        stack.enter_context(_recording(tracker, folder, view))
        is_trained = state.state == "trained" and is_at_end
        folder.write(
            RunState("trained" if is_trained else "running", tracker.run_id, identity_of(settings), digests, state.step)
        )
        outcome = state.worker_result() if is_trained else _run_workers(settings, folder, sources, view)
        return _finish(settings, folder, outcome, view, tracker)


def resolve_source_uris(settings: Settings, data_dir: Path) -> Settings:
    """Replaces `demo:GROUP` by the shards of the packaged demo data, made below `data_dir` on first use.

    Paths of training, validation and evaluation shards, of the store for checkpoints and of the model folder to start
    from become absolute: workers have another working directory.

    Raises:
        ConfigError: there is no source, or no such demo group.
    """
    if not settings.data.sources:
        raise ConfigError("the recipe names no data; set data.sources, a list of {uri, group, weight}")
    sources = tuple(
        source.model_copy(update={"uri": _resolved(source.uri, data_dir)}) for source in settings.data.sources
    )
    train, evaluate, model = settings.train, settings.evaluate, settings.model
    if model.init_from is not None and not model.init_from.startswith("models:"):
        model = model.model_copy(update={"init_from": storage.absolute(model.init_from)})
    if train.validation.uri is not None:
        validation = train.validation.model_copy(update={"uri": _resolved(train.validation.uri, data_dir)})
        train = train.model_copy(update={"validation": validation})
    if train.checkpoint_uri is not None:
        train = train.model_copy(update={"checkpoint_uri": _resolved(train.checkpoint_uri, data_dir)})
    if evaluate.uri is not None:
        evaluate = evaluate.model_copy(update={"uri": _resolved(evaluate.uri, data_dir)})
    data = settings.data.model_copy(update={"sources": sources})
    return settings.model_copy(update={"model": model, "data": data, "train": train, "evaluate": evaluate})


def _resolved(uri: str, data_dir: Path) -> str:
    """What it means, wherever it is read."""
    if uri.startswith(_DEMO_SCHEME):
        return _demo_uri(uri.removeprefix(_DEMO_SCHEME), data_dir)
    return storage.absolute(uri)


def _demo_uri(group: str, data_dir: Path) -> str:
    from pixellm.jobs.prepare import prepare_demo  # only where the demo's data is asked for

    folder = data_dir / "demo"
    made = {"segmentation": "coco", "vqa": "coco", "muse": "muse"}
    if group not in made:
        raise ConfigError(f"there is no demo data {group!r}; wanted demo:segmentation, demo:vqa or demo:muse")
    if not storage.exists(folder / made[group] / "dataset.json"):
        return prepare_demo(folder)[group]
    return str(folder / made[group])


def open_sources(settings: Settings, data_dir: Path) -> tuple[Settings, tuple[QuestionSource, ...]]:
    """The settings with every source's URI resolved and epochs as steps, and the opened sources."""
    settings = resolve_source_uris(settings, data_dir)
    opened = mixture.open_sources(settings.data)
    steps = mixture.steps_for_epochs(
        settings.data, opened, settings.seed, global_batch_size=settings.train.global_batch_size
    )
    if steps is not None:
        settings = settings.model_copy(update={"train": settings.train.model_copy(update={"steps": steps})})
    return settings, opened


def _digests(settings: Settings, sources: Sequence[QuestionSource]) -> dict[str, str]:
    names = [f"{number}.{source.group}" for number, source in enumerate(settings.data.sources)]
    return {name: opened.dataset.digest for name, opened in zip(names, sources, strict=True)}


def _run_workers(
    settings: Settings, folder: RunFolder, sources: tuple[QuestionSource, ...], view: TrainingView
) -> WorkerResult:
    version = code_version()
    settings = settings.model_copy(update={"tracking": from_any_folder(settings.tracking)})
    spec = WorkerSpec(settings, str(folder.path), sources, code_version=version.commit or version.version)
    with stop_on_signals() as stop:
        view.note("starting Ray and the workers …")
        info = cluster.connect(_with_room(settings))
        try:
            outcome = run_group(spec, view, stop)
        finally:
            if info.is_ours:
                cluster.disconnect()
    state = "interrupted" if outcome.interrupted else "trained"
    folder.update(state=state, step=outcome.step, result=asdict(outcome))
    return outcome


def _with_room(settings: Settings) -> ClusterSettings:
    """A local cluster gets at least the logical CPUs that workers and reading tasks ask for; cores are not counted."""
    chosen = settings.cluster
    if chosen.num_cpus is not None:
        return chosen
    wanted = settings.train.max_workers * (settings.train.worker_cpus + settings.data.task_cpus)
    return chosen.model_copy(update={"num_cpus": max(os.cpu_count() or 1, math.ceil(wanted))})


def _finish(
    settings: Settings, folder: RunFolder, outcome: WorkerResult, view: TrainingView, tracker: Tracker
) -> TrainResult:
    result = TrainResult(
        run_id=tracker.run_id,
        steps=outcome.step,
        samples_per_s=outcome.samples_per_s,
        model_dir=None if outcome.interrupted else str(folder.model_dir),
        registered_version=None,
        resumed_from=outcome.resumed_from,
        interrupted=outcome.interrupted,
        checkpoint=view.last_checkpoint or _newest_checkpoint(folder),
        ended_early=outcome.ended_early,
        recover_s=view.recover_s,
        steps_repeated=view.steps_repeated,
    )
    if outcome.interrupted:
        return result
    is_registered = settings.registry.register_final
    if is_registered or settings.evaluate.uri is not None:
        result = _evaluate(settings, folder, result, view, tracker)
    if is_registered:
        result = _register(settings, folder, result, view, tracker)
    folder.update(state="finished", step=outcome.step, result=result.to_json_dict())
    return result


def _newest_checkpoint(folder: RunFolder) -> str | None:
    checkpoints = CheckpointFolder(folder.checkpoints)
    steps = checkpoints.steps()
    return str(checkpoints.path_of(steps[-1])) if steps else None


def _evaluate(
    settings: Settings, folder: RunFolder, result: TrainResult, view: TrainingView, tracker: Tracker
) -> TrainResult:
    """Asks the finished model the questions of `evaluate`."""
    from pixellm.jobs.evaluate.run import evaluate_after_training  # imports the engine

    view.note("evaluating the model …")
    evaluation = evaluate_after_training(settings, folder.model_dir, folder.path / "evaluation")
    tracker.log_metrics({f"eval_{name}": value for name, value in evaluation.metrics.items()}, result.steps)
    tracker.log_artifact(folder.path / "evaluation", "evaluation")
    return replace(result, metrics=evaluation.metrics)


def _register(
    settings: Settings, folder: RunFolder, result: TrainResult, view: TrainingView, tracker: Tracker
) -> TrainResult:
    """Registers the evaluated model as candidate, and asks the gate."""
    from pixellm.jobs import models  # imports mlflow's entities

    view.note("registering the model …")
    tags = {"run": settings.name, "steps": str(result.steps)}
    registry = settings.registry
    version = models.register_model(folder.model_dir, tracker, result.metrics, name=registry.model_name, tags=tags)
    said = "not promoted (registry.promote is false)"
    if registry.promote:
        said = models.promote(
            version.reference,
            metric=registry.gate_metric,
            floor=registry.gate_floor,
            max_regression=registry.gate_max_regression,
            tracking=settings.tracking,
        ).to_text()
    return replace(result, registered_version=version.version, promotion=said)


@contextmanager
def _recording(tracker: Tracker, folder: RunFolder, view: TrainingView) -> Iterator[None]:
    """Ends the MLflow run as what it came to, and leaves the run folder in a state to go on from."""
    try:
        yield
    except BaseException as error:
        is_stop = isinstance(error, KeyboardInterrupt | SystemExit)
        state = folder.read()
        if state.state != "trained":
            folder.write(replace(state, state="interrupted" if is_stop else "failed", step=view.step))
        tracker.finish("KILLED" if is_stop else "FAILED")
        raise
    tracker.finish("KILLED" if folder.read().state == "interrupted" else "FINISHED")
