"""What each worker of a training group does, from an empty process to the finished model folder."""

import time
from collections.abc import Iterator
from typing import Any

import torch

from pixellm.errors import CheckpointError
from pixellm.jobs.train import ranks
from pixellm.jobs.train.build import build_model, build_processor, save_model_folder, saves_only_trainable
from pixellm.jobs.train.build_lock import needs_compilation
from pixellm.jobs.train.channel import WorkerLine
from pixellm.jobs.train.checkpoints import Checkpoint, CheckpointFolder
from pixellm.jobs.train.deepspeed_engine import TrainEngine
from pixellm.jobs.train.encode import SampleEncoder
from pixellm.jobs.train.entry import WorkerSpec
from pixellm.jobs.train.events import CheckpointEvent, StartEvent, StatusEvent, WorkerResult
from pixellm.jobs.train.loop import Prefetcher, PreparedBatch, prepare_batch, run_steps
from pixellm.jobs.train.optimizer_state import gather_weights
from pixellm.jobs.train.snapshot import load_optimizer_state, load_weights, save_snapshot
from pixellm.platform.data.stream import iterate_batches, stream_batches


def run_worker(spec: WorkerSpec, line: WorkerLine) -> WorkerResult:
    """Trains to the end or to a stop; in a process group, with or without Ray.

    Raises:
        CheckpointError: there are checkpoints but none can be used, or the last one could not be written.
        DataError: a sample cannot be read or encoded.
    """
    settings = spec.settings
    torch.set_num_threads(settings.train.threads_per_worker)
    checkpoint, problems = _choose_checkpoint(spec.checkpoints)
    start_step = checkpoint.meta.step if checkpoint else 0
    processor = build_processor(settings)
    batches = Prefetcher(lambda: _batches(spec, SampleEncoder(processor, settings.data.mask_size), start_step))
    try:
        line.send(StatusEvent("building the model"))
        engine = _build_engine(spec, checkpoint, line)
        line.send(StartEvent(start_step, str(checkpoint.path) if checkpoint else None, tuple(problems)))
        result = run_steps(
            engine,
            batches,
            settings.train,
            start_step=start_step,
            on_step=line.send,
            wants_stop=line.is_stop_wanted,
            save=lambda step: _save(spec, engine, line, step),
        )
    finally:
        batches.close()
    if not result.interrupted:
        _write_model(spec, engine, processor, line)
    return WorkerResult(result.step, result.interrupted, result.samples_per_s, start_step if checkpoint else None)


def _choose_checkpoint(folder: CheckpointFolder) -> tuple[Checkpoint | None, list[str]]:
    """Rank 0 verifies and chooses; all ranks read the same one."""
    chosen: Any = None
    if ranks.rank() == 0:
        try:
            folder.remove_unfinished()
            chosen = folder.latest_valid()
        except CheckpointError as error:
            chosen = error
    chosen = ranks.broadcast_object(chosen)
    if isinstance(chosen, CheckpointError):
        raise chosen
    return chosen  # type: ignore[no-any-return]


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
    engine = TrainEngine.build(model, spec.settings.train, seed=spec.settings.seed)
    if checkpoint is not None:
        load_optimizer_state(engine, checkpoint)
    line.send(StatusEvent("waiting for the first batch"))
    return engine


def _save(spec: WorkerSpec, engine: TrainEngine, line: WorkerLine, step: int) -> None:
    """Writes a checkpoint. One that fails on the way is reported and training goes on; the last one must not fail."""
    settings = spec.settings
    started = time.perf_counter()
    problem = None
    try:
        save_snapshot(
            engine,
            spec.checkpoints,
            step=step,
            position=step * settings.train.global_batch_size,
            only_trainable=saves_only_trainable(settings),
            config=settings.model_dump(mode="json"),
            code_version=spec.code_version,
        )
    except CheckpointError as error:
        if step == settings.train.steps:
            raise
        problem = str(error)
    if ranks.rank() == 0:
        spec.checkpoints.prune(settings.train.keep_last)
    path = str(spec.checkpoints.path_of(step))
    line.send(CheckpointEvent(step, path, time.perf_counter() - started, problem))


def _write_model(spec: WorkerSpec, engine: TrainEngine, processor: Any, line: WorkerLine) -> None:
    line.send(StatusEvent("writing the model"))
    weights = gather_weights(engine, only_trainable=False)
    if ranks.rank() == 0:
        save_model_folder(engine.module, weights, processor, spec.model_dir)  # type: ignore[arg-type]
    ranks.barrier()
