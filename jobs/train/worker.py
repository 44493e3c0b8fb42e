"""What each worker of a training group does, from an empty process to the finished model folder."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixellm.errors import CheckpointError
from pixellm.jobs.train import ranks
from pixellm.jobs.train.average import WeightAverage
from pixellm.jobs.train.build import build_model, build_processor, save_model_folder, saves_only_trainable
from pixellm.jobs.train.build_lock import needs_compilation
from pixellm.jobs.train.channel import WorkerLine
from pixellm.jobs.train.checkpoints import Checkpoint, read_checkpoint
from pixellm.jobs.train.deepspeed_engine import TrainEngine
from pixellm.jobs.train.encode import SampleEncoder
from pixellm.jobs.train.entry import WorkerSpec
from pixellm.jobs.train.events import (
    CheckpointEvent,
    StartEvent,
    StatusEvent,
    ValidationEvent,
    WorkerPlace,
    WorkerResult,
)
from pixellm.jobs.train.loop import Prefetcher, PreparedBatch, Wishes, prepare_batch, run_steps
from pixellm.jobs.train.optimizer_state import full_shape, gather_weights, read_average
from pixellm.jobs.train.snapshot import load_optimizer_state, load_weights, save_snapshot
from pixellm.jobs.train.upload import Uploader, closing_uploads, fetch_newest
from pixellm.jobs.train.validation import Plateau, Validator
from pixellm.model.processing import PixelLMProcessor
from pixellm.platform.data.stream import iterate_batches, stream_batches


def run_worker(spec: WorkerSpec, line: WorkerLine) -> WorkerResult:
    """Trains to the end or to a stop; in a process group, with or without Ray.

    Raises:
        CheckpointError: there are checkpoints but none can be used, or the last one could not be written.
        DataError: a sample cannot be read or encoded.
    """
    settings = spec.settings
    torch.set_num_threads(settings.train.threads_per_worker)
    checkpoint, problems = _choose_checkpoint(spec)
    start_step = checkpoint.meta.step if checkpoint else 0
    processor = build_processor(settings)
    batches = Prefetcher(lambda: _batches(spec, SampleEncoder(processor, settings.data.mask_size), start_step))
    uri = spec.checkpoint_uri if ranks.rank() == 0 else None
    with closing(batches), closing_uploads(uri, spec.checkpoints, line.send) as uploads:
        line.send(StatusEvent("building the model"))
        engine = _build_engine(spec, checkpoint, line)
        course = _Course(spec, engine, processor, line, uploads, checkpoint)
        workers = tuple(ranks.gather_objects(_place()))
        line.send(StartEvent(start_step, str(checkpoint.path) if checkpoint else None, tuple(problems), workers))
        result = run_steps(
            engine,
            batches,
            settings.train,
            start_step=start_step,
            on_step=line.send,
            wishes=lambda: Wishes(line.is_stop_wanted(), line.is_checkpoint_wanted()),
            save=course.save,
            validate=course.validate if settings.train.validation.every is not None else None,
        )
    if ranks.rank() == 0:
        prune(spec)
    if not result.interrupted:
        _write_model(spec, engine, processor, line)
    resumed_from = start_step if checkpoint else None
    return WorkerResult(result.step, result.interrupted, result.samples_per_s, resumed_from, result.ended_early)


def _choose_checkpoint(spec: WorkerSpec) -> tuple[Checkpoint | None, list[str]]:
    """Rank 0 verifies and chooses; all ranks read the same one."""
    folder = spec.checkpoints
    chosen: Any = None
    if ranks.rank() == 0:
        try:
            folder.remove_unfinished()
            missed: list[str] = []
            if spec.checkpoint_uri is not None and not folder.steps():
                missed = fetch_newest(spec.checkpoint_uri, folder)
            checkpoint, problems = folder.latest_valid()
            chosen = checkpoint, missed + problems
        except CheckpointError as error:
            chosen = error
    chosen = ranks.broadcast_object(chosen)
    if isinstance(chosen, CheckpointError):
        raise chosen
    return chosen  # type: ignore[no-any-return]


def _place() -> WorkerPlace:
    """Where this rank runs."""
    import ray  # loaded already in a Ray worker

    node_id = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
    return WorkerPlace(node_id, socket.gethostname(), os.getpid())


def _batches(spec: WorkerSpec, encoder: SampleEncoder, start_step: int) -> Iterator[PreparedBatch]:
    train, data = spec.settings.train, spec.settings.data
    common: dict[str, Any] = {
        "global_batch_size": train.global_batch_size,
        "rank": ranks.rank(),
        "world_size": ranks.world_size(),
        "start_position": start_step * train.global_batch_size,
        "num_positions": (train.steps - start_step) * train.global_batch_size,
    }
    if spec.channel is None:
        lists = iterate_batches(spec.sources, spec.order(), encoder, **common)
    else:
        lists = stream_batches(
            spec.sources,
            spec.order(),
            encoder,
            **common,
            block_size=data.block_size,
            task_cpus=data.task_cpus,
            max_tasks=data.max_tasks,
        )
    for examples in lists:
        yield prepare_batch(examples, train.micro_batch_size, encoder.processor.collate)


def _build_engine(spec: WorkerSpec, checkpoint: Checkpoint | None, line: WorkerLine) -> TrainEngine:
    model = build_model(spec.settings)
    if checkpoint is not None:
        load_weights(model, checkpoint, only_trainable=saves_only_trainable(spec.settings))
    first = " (the first time on a machine it compiles for about a minute)" if needs_compilation() else ""
    line.send(StatusEvent(f"starting DeepSpeed{first}"))
    train = spec.settings.train
    engine = TrainEngine.build(model, train, seed=spec.settings.seed)
    if train.ema_decay is not None:
        engine.average = WeightAverage(engine, train.ema_decay)
    if checkpoint is not None:
        load_optimizer_state(engine, checkpoint)
    line.send(StatusEvent("waiting for the first batch"))
    return engine


class _Course:
    """What happens beside the steps: validations, checkpoints, and what they say of each other."""

    def __init__(
        self,
        spec: WorkerSpec,
        engine: TrainEngine,
        processor: PixelLMProcessor,
        line: WorkerLine,
        uploads: Uploader | None,
        checkpoint: Checkpoint | None,
    ) -> None:
        self._spec, self._engine, self._line, self._uploads = spec, engine, line, uploads
        self._plateau = Plateau(**checkpoint.meta.plateau) if checkpoint else Plateau()
        self._metrics: tuple[int, dict[str, float]] = (-1, {})
        self._validator: Validator | None = None
        if spec.settings.train.validation.every is not None:
            self._validator = Validator(spec.settings, processor, Path(spec.run_dir) / "validation")

    def validate(self, step: int) -> bool:
        """Asks the held-out questions; says whether the metric has reached its plateau."""
        chosen = self._spec.settings.train.validation
        if self._validator is None:
            return False
        started = time.perf_counter()
        metrics, folder = self._validator.run(self._engine, step)
        self._plateau = self._plateau.after(step, metrics, chosen)
        self._metrics = (step, metrics)
        is_best, seconds = self._plateau.best_step == step, time.perf_counter() - started
        self._line.send(ValidationEvent(step, metrics, is_best, folder, seconds))
        return self._plateau.is_over(chosen)

    def save(self, step: int) -> None:
        """Writes a checkpoint. One that fails on the way is reported and training goes on; the last must not fail."""
        spec, settings = self._spec, self._spec.settings
        started = time.perf_counter()
        problem = None
        try:
            save_snapshot(
                self._engine,
                spec.checkpoints,
                step=step,
                position=step * settings.train.global_batch_size,
                only_trainable=saves_only_trainable(settings),
                config=settings.model_dump(mode="json"),
                code_version=spec.code_version,
                metrics=self._metrics[1] if self._metrics[0] == step else {},
                plateau=self._plateau.to_json_dict(),
            )
        except CheckpointError as error:
            if step == settings.train.steps:
                raise
            problem = str(error)
        if ranks.rank() == 0:
            self._tidy(step, is_new=problem is None)
        path = str(spec.checkpoints.path_of(step))
        self._line.send(CheckpointEvent(step, path, time.perf_counter() - started, problem))

    def _tidy(self, step: int, *, is_new: bool) -> None:
        kept = prune(self._spec, frozenset() if self._uploads is None else self._uploads.busy)
        if self._uploads is not None and is_new:
            self._uploads.submit(step, kept)


def prune(spec: WorkerSpec, busy: frozenset[int] = frozenset()) -> frozenset[int]:
    """Removes the checkpoints that the recipe does not keep; see `CheckpointFolder.prune`."""
    train = spec.settings.train
    chosen = train.validation
    return spec.checkpoints.prune(train.keep_last, keep_best=chosen.keep_best, metric=chosen.metric, busy=busy)


def _write_model(spec: WorkerSpec, engine: TrainEngine, processor: PixelLMProcessor, line: WorkerLine) -> None:
    line.send(StatusEvent("writing the model"))
    weights = gather_weights(engine, only_trainable=False)
    if ranks.rank() == 0:
        weights |= _weights_to_finish_with(spec, engine)
        save_model_folder(engine.module, weights, processor, spec.model_dir)  # type: ignore[arg-type]
    ranks.barrier()


def _weights_to_finish_with(spec: WorkerSpec, engine: TrainEngine) -> dict[str, Tensor]:
    """What the finished model takes from a checkpoint rather than from the engine: the best step, the average."""
    from safetensors.torch import load_file

    train, folder = spec.settings.train, spec.checkpoints
    if not train.validation.finish_with_best and train.ema_decay is None:
        return {}
    best = folder.best_step(train.validation.metric) if train.validation.finish_with_best else None
    checkpoint = read_checkpoint(folder.path_of(folder.steps()[-1] if best is None else best))
    weights: dict[str, Tensor] = load_file(checkpoint.weights_path) if best is not None else {}
    if train.ema_decay is not None:
        shapes = {name: full_shape(parameter) for name, parameter in engine.trainable.items()}
        weights |= read_average(checkpoint.optimizer_paths, shapes)
    return weights
