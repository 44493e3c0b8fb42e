"""Many short trainings in one benchmark: the training job's own worker in this process, without Ray Train's start."""

import time
from pathlib import Path
from typing import Any

from pixellm.platform.settings import Settings


def prepare_shapes(folder: Path, **options: Any) -> None:
    """Generates shards of `shapes`; those that are there stay."""
    from pixellm.jobs.prepare import prepare

    if not (folder / "dataset.json").is_file():
        prepare("shapes", None, folder, options=options)


def shortened(settings: Settings, steps: int, out: Path) -> Settings:
    """A recipe cut to so many steps, on one worker with one thread, its checkpoint at the end."""
    changes = {"steps": steps, "checkpoint_every": steps, "num_workers": 1, "threads_per_worker": 1}
    changes |= {"warmup_steps": min(settings.train.warmup_steps, steps // 4)}
    train = settings.train.model_copy(update={**changes, "output_dir": str(out)})
    return settings.model_copy(update={"train": train})


def train_here(settings: Settings, folder: Path) -> float:
    """Trains in this process, which is a training group of one already; returns seconds of CPU."""
    from pixellm.jobs.train.channel import WorkerLine
    from pixellm.jobs.train.entry import WorkerSpec
    from pixellm.jobs.train.run import open_sources
    from pixellm.jobs.train.worker import run_worker

    resolved, sources = open_sources(settings, folder / "data")
    started = time.process_time()
    run_worker(WorkerSpec(resolved, str(folder), sources), WorkerLine(None, is_active=False))
    return time.process_time() - started
