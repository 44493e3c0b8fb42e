"""Where Ray Train enters: the function that it runs on each worker, and what the driver hands to it.

Ray's controller loads this module too, so nothing heavy is imported before a worker really works.
"""

import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pixellm.errors import PixelLMError
from pixellm.jobs.train.checkpoints import CheckpointFolder
from pixellm.platform import storage
from pixellm.platform.data.compose import QuestionSource
from pixellm.platform.data.mixture import build_order
from pixellm.platform.data.order import Order
from pixellm.platform.settings import Settings


@dataclass(frozen=True)
class WorkerSpec:
    """What the driver hands to every worker.

    Attributes:
        settings: the resolved tree.
        run_dir: absolute, the same folder on all workers.
        sources: the opened mixture, in the order's numbering.
        channel: handle of the `Channel` actor; None without Ray.
        code_version: of the driver's code, for checkpoints.
    """

    settings: Settings
    run_dir: str
    sources: tuple[QuestionSource, ...]
    channel: Any = None
    code_version: str = ""

    @property
    def checkpoints(self) -> CheckpointFolder:
        """Where checkpoints go."""
        return CheckpointFolder(Path(self.run_dir) / "checkpoints")

    @property
    def checkpoint_uri(self) -> str | None:
        """Where copies of the checkpoints go; None where the recipe names no store."""
        uri = self.settings.train.checkpoint_uri
        return None if uri is None else storage.join(uri, self.settings.name)

    @property
    def model_dir(self) -> Path:
        """Where the finished model goes."""
        return Path(self.run_dir) / "model"

    def order(self) -> Order:
        """The run's order of samples."""
        train = self.settings.train
        return build_order(
            self.settings.data,
            self.sources,
            self.settings.seed,
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
        )


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """The function that Ray Train runs on each worker: `config["spec"]` is a `WorkerSpec`."""
    spec: WorkerSpec = config["spec"]
    _quieten()
    import ray  # loaded already

    known = ray.get(spec.channel.fatal.remote())
    if known is not None:  # the group was restarted after an error that a restart cannot mend
        raise known
    from pixellm.jobs.train import ranks  # torch, transformers and DeepSpeed come with these
    from pixellm.jobs.train.channel import WorkerLine
    from pixellm.jobs.train.worker import run_worker

    try:
        return asdict(run_worker(spec, WorkerLine(spec.channel, is_active=ranks.rank() == 0)))
    except PixelLMError as error:
        ray.get(spec.channel.set_fatal.remote(error))
        raise


def _quieten() -> None:
    """Libraries' chatter goes to the worker's log file only where it matters."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("DeepSpeed", "deepspeed", "transformers", "torch.distributed", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
