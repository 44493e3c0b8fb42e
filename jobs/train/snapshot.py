"""Saving and restoring a training engine: each rank writes its part, rank 0 commits when all of it is on disk."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pixellm.errors import CheckpointError
from pixellm.jobs.train import ranks
from pixellm.jobs.train.checkpoints import (
    WEIGHTS_FILE,
    Checkpoint,
    CheckpointFolder,
    CheckpointMeta,
    FileRecord,
    describe_file,
    optimizer_file,
    random_file,
)
from pixellm.jobs.train.deepspeed_engine import TrainEngine
from pixellm.jobs.train.optimizer_state import gather_weights, load_optimizer, save_optimizer


def save_snapshot(
    engine: TrainEngine,
    folder: CheckpointFolder,
    *,
    step: int,
    position: int,
    only_trainable: bool,
    config: dict[str, Any],
    code_version: str = "",
    metrics: dict[str, float] | None = None,
    plateau: dict[str, Any] | None = None,
) -> Path:
    """Writes a checkpoint; all ranks call it at the same step.

    Args:
        engine: the training engine.
        folder: the run's checkpoints, the same path on all ranks.
        step: optimiser steps done.
        position: samples of the global order consumed.
        only_trainable: leave frozen weights out (they come from `model.init_from`).
        config: the resolved settings.
        code_version: of the running code.
        metrics: of the validation after this step.
        plateau: state of the search for a plateau.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: a rank could not write; raised on all ranks alike, and nothing half-written counts.
    """
    writing, problem = _agree(lambda: folder.start(step) if ranks.rank() == 0 else None)
    if problem is None:
        records, problem = _agree(lambda: _write_part(engine, Path(writing[0]), only_trainable))
    if problem is None:
        meta = CheckpointMeta(
            step=step,
            position=position,
            world_size=ranks.world_size(),
            files=tuple(record for part in records for record in part),
            config=config,
            code_version=code_version,
            metrics=metrics or {},
            plateau=plateau or {},
        )
        _, problem = _agree(lambda: folder.commit(Path(writing[0]), meta) if ranks.rank() == 0 else None)
    if problem is not None:
        if ranks.rank() == 0:
            folder.remove_unfinished()
        raise CheckpointError(f"the checkpoint of step {step} was not written: {problem}; free space in {folder.root}")
    return folder.path_of(step)


def load_weights(model: nn.Module, checkpoint: Checkpoint, *, only_trainable: bool) -> None:
    """Fills a model with a checkpoint's weights, before DeepSpeed takes it over.

    Raises:
        CheckpointError: the weights do not fit the model.
    """
    from safetensors.torch import load_file

    weights = load_file(checkpoint.weights_path)
    wanted = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad or not only_trainable
    }
    wrong = sorted(wanted.keys() ^ weights.keys())
    wrong += sorted(name for name in wanted.keys() & weights.keys() if wanted[name].shape != weights[name].shape)
    if wrong:
        raise CheckpointError(
            f"{checkpoint.path} belongs to another model or another choice of trained parts ({len(wrong)} parameters "
            f"differ, e.g. {wrong[0]}); use the recipe that wrote it, --fresh, or another name"
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(weights[name])


def load_optimizer_state(engine: TrainEngine, checkpoint: Checkpoint) -> None:
    """Fills a fresh engine's masters and moments; its model holds the checkpoint's weights already.

    A group of another size leaves the random states aside: what a step draws does not depend on them.

    Raises:
        CheckpointError: see `load_optimizer`.
    """
    load_optimizer(engine, checkpoint.optimizer_paths)
    path = checkpoint.path / random_file(ranks.rank(), ranks.world_size())
    if path.is_file():
        _set_random_state(path)


def _write_part(engine: TrainEngine, folder: Path, only_trainable: bool) -> list[FileRecord]:
    from safetensors.torch import save_file

    weights = gather_weights(engine, only_trainable=only_trainable)
    paths = []
    if ranks.rank() == 0:
        save_file(weights, folder / WEIGHTS_FILE)
        paths.append(folder / WEIGHTS_FILE)
    if ranks.rank() == 0 or engine.zero_stage:  # at stage 0 all ranks hold the same
        path = folder / optimizer_file(ranks.rank(), ranks.world_size())
        save_optimizer(engine, path)
        paths.append(path)
    save_file(_random_state(), folder / random_file(ranks.rank(), ranks.world_size()))
    paths.append(folder / random_file(ranks.rank(), ranks.world_size()))
    return [describe_file(path) for path in paths]


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(path: Path) -> None:
    from safetensors.torch import load_file

    state = load_file(path)
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _agree(action: Any) -> tuple[list[Any], str | None]:
    """Runs `action` on every rank; returns all results, and what went wrong on the first rank that failed."""
    result, problem = None, None
    try:
        result = action()
    except (OSError, CheckpointError) as error:
        problem = f"rank {ranks.rank()}: {error}"
    except Exception as error:  # safetensors reports a full disk as its own error type; the other ranks must hear of it
        problem = f"rank {ranks.rank()}: {type(error).__name__}: {error}"
    gathered = ranks.gather_objects((result, problem))
    problems = [text for _, text in gathered if text is not None]
    return [value for value, _ in gathered], problems[0] if problems else None
