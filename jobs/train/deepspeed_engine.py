"""DeepSpeed around a model: gradients add up on each rank in fp32 and are averaged over the ranks once per step.

One code path serves ZeRO 0 to 3. Reducing once per step instead of in backward hooks has two reasons. Ranks may see
different kinds of samples (a micro-batch of VQA turns gives the pixel decoder no gradient): here a missing gradient is
a zero, where hook-ordered buckets would be added up against the wrong parameters. And with gradient accumulation the
ranks talk once per step instead of once per micro-batch.

The random state of a micro-batch is a function of (seed, step, its place in the global batch): a resumed run draws the
same numbers as one that was never stopped, also on another number of ranks.
"""

import logging
import math
import os
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pixellm.errors import ConfigError
from pixellm.jobs.train import ranks
from pixellm.jobs.train.build_lock import alone_in, build_root
from pixellm.platform.settings import TrainSettings

_MAX_BUCKET_ELEMENTS = 100_000_000
Batch = Mapping[str, Any]


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step did on this rank.

    Attributes:
        loss: weighted sum of the parts, mean over the step's micro-batches.
        losses: the parts (`text`, `ref`, `dice`), already weighted; a part absent from a micro-batch counts as 0.
        grad_norm: global gradient norm before clipping; infinite or NaN where a gradient was not finite.
        is_applied: false if the step was left out because a loss or gradient was not finite.
    """

    loss: float
    losses: dict[str, float]
    grad_norm: float
    is_applied: bool


class TrainEngine:
    """One model under DeepSpeed. Build it with `TrainEngine.build` inside a process group."""

    def __init__(
        self, engine: Any, optimizer: torch.optim.Optimizer, names: dict[str, nn.Parameter], seed: int
    ) -> None:
        """Wraps an initialised DeepSpeed engine; use `build`."""
        self.engine = engine
        self.optimizer = optimizer
        self.trainable = names
        self.num_updates = 0
        self.average: Any = None  # a `WeightAverage`, where the recipe wants one
        self._seed = seed
        self._sums: dict[str, Tensor] = {}

    @classmethod
    def build(cls, model: nn.Module, train: TrainSettings, *, seed: int = 0) -> "TrainEngine":
        """Initialises DeepSpeed with torch's AdamW over the parameters that require a gradient.

        Args:
            model: on the CPU or its GPU, in fp32; `train.precision` "bf16" casts it (masters stay fp32).
            train: stage, precision, optimiser and clipping.
            seed: of the run; random states derive from it.

        Raises:
            ConfigError: nothing is trainable.
        """
        deepspeed = import_deepspeed(use_gpu=train.use_gpu)
        trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        if not trainable:
            raise ConfigError("the recipe trains no parameter; set train.train_language, train.train_vision or LoRA")
        # Each step sets its rate. Until then it is 0: one of DeepSpeed's wrappers takes an empty step as it starts.
        optimizer = torch.optim.AdamW(
            groups_by_rate(model, trainable, train.lr_scale), lr=0.0, betas=train.betas, weight_decay=train.weight_decay
        )
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(train, sum(p.numel() for p in trainable.values())),
            dist_init_required=False,
        )
        if train.is_elastic and train.zero_stage in (1, 2) and not train.offload_optimizer:
            engine.optimizer.get_grad_norm_direct = exact_gradient_norm
        for state in optimizer.state.values():  # so the bias correction starts at the first real step
            state["step"].zero_()
        return cls(engine, optimizer, trainable, seed)

    @property
    def module(self) -> nn.Module:
        """The model."""
        return self.engine.module

    @property
    def device(self) -> torch.device:
        """Where batches must lie."""
        return torch.device(self.engine.device)

    @property
    def zero_stage(self) -> int:
        """ZeRO stage, 0 to 3."""
        return int(self.engine.zero_optimization_stage())

    def train_step(self, micro_batches: Sequence[Batch], *, step: int, lr: float) -> StepResult:
        """Forward and backward over the micro-batches, one reduction, one clipped AdamW update.

        Args:
            micro_batches: keyword arguments of the model's forward, whose output has `loss` and `losses`.
            step: 0-based index, for the random state.
            lr: learning rate of this step.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("scale", 1.0)
        self.module.train()
        runner = self._run_coalesced if self.zero_stage else self._run_replicated
        outputs = list(runner(micro_batches, step))
        norm, is_applied = self._update()
        self.num_updates += is_applied
        if is_applied and self.average is not None:
            self.average.update(self)
        names = sorted({name for output in outputs for name in output})
        losses = {name: sum(output.get(name, 0.0) for output in outputs) / len(outputs) for name in names}
        return StepResult(losses.pop("loss"), losses, norm, is_applied)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Any:
        """The model's output for a batch, without gradients and dropout. At ZeRO 3 all ranks must call it together."""
        self.module.eval()
        return self.module(**self._prepare(batch))

    def _update(self) -> tuple[float, bool]:
        """Clips and updates; returns the gradient norm and whether the update happened (ZeRO checks by itself)."""
        gradients = [parameter.grad for parameter in self.trainable.values() if parameter.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients)) if self.zero_stage == 0 and gradients else None
        if norm is not None and not math.isfinite(norm):
            self.engine.zero_grad()
            return norm, False
        self.engine.step()
        reported = self.engine.get_global_grad_norm()
        if norm is None:
            norm = float("nan") if reported is None else float(reported)
        return norm, bool(self.engine.was_step_applied())

    def _run_coalesced(self, micro_batches: Sequence[Batch], step: int) -> Iterator[dict[str, float]]:
        """ZeRO 1 to 3: gradients stay local (in fp32) until the block ends, then one reduction runs in fixed order."""
        with self.engine.coalesce_grad_reduction():
            for index, batch in enumerate(micro_batches):
                yield self._forward_backward(batch, step, index, len(micro_batches))
                if len(micro_batches) > 1:
                    self._collect()
            self._complete()

    def _run_replicated(self, micro_batches: Sequence[Batch], step: int) -> Iterator[dict[str, float]]:
        """ZeRO 0: only the last backward reduces."""
        for index, batch in enumerate(micro_batches[:-1]):
            with self.engine.no_sync():
                yield self._forward_backward(batch, step, index, len(micro_batches))
        yield self._forward_backward(micro_batches[-1], step, len(micro_batches) - 1, len(micro_batches))

    def _forward_backward(self, batch: Batch, step: int, index: int, count: int) -> dict[str, float]:
        seed_micro_batch(self._seed, step, ranks.rank() * count + index)
        output = self.engine(**self._prepare(batch))
        # A loss that is not finite makes its gradients so too: then every rank leaves the step out.
        spoilt = torch.where(torch.isfinite(output.loss.detach()), 1.0, math.nan)
        self.engine.backward(output.loss * spoilt / count)
        return {"loss": float(output.loss.detach()), **{name: float(value) for name, value in output.losses.items()}}

    def _prepare(self, batch: Batch) -> dict[str, Any]:
        """Moves a batch to the device, and the picture to the model's precision."""
        dtype = next(iter(self.trainable.values())).dtype
        moved = {key: _to_device(value, self.device) for key, value in batch.items()}
        if "pixel_values" in moved:
            moved["pixel_values"] = moved["pixel_values"].to(dtype)
        return moved

    def _collect(self) -> None:
        """Adds this micro-batch's gradients to fp32 sums: bf16 sums over many micro-batches lose their small terms."""
        for name, parameter in self.trainable.items():
            if parameter.grad is None:
                continue
            if name in self._sums:
                self._sums[name].add_(parameter.grad)
            else:
                self._sums[name] = parameter.grad.to(torch.float32, copy=True)
            parameter.grad.zero_()

    def _complete(self) -> None:
        """Puts the sums back, and a zero where no micro-batch of this rank reached a parameter.

        ZeRO 3 empties a parameter between uses, so that no gradient can be given to it; there all ranks run the same
        modules anyway, and no gradient is missing on one rank only.
        """
        for name, parameter in self.trainable.items():
            if name in self._sums and parameter.grad is not None:
                parameter.grad.copy_(self._sums[name])
            elif parameter.grad is None and self.zero_stage < 3:
                parameter.grad = torch.zeros_like(parameter)
        self._sums.clear()


def exact_gradient_norm(gradients: Sequence[Tensor], params: Any, norm_type: float = 2) -> Tensor:
    """The norm over all ranks' parts of the gradients, rounded once, at the end: the same on any number of ranks.

    DeepSpeed's ZeRO 1 and 2 round each rank's part to fp32 before they are added up; what that changes in the last bit
    of the clipping grows to 1e-3 of the loss within thirty steps. In a group of one both are equal bit for bit.

    Args:
        gradients: this rank's stretches.
        params: unused; DeepSpeed's signature.
        norm_type: 2.

    Returns:
        fp32 scalar, −1 where a gradient is not finite.
    """
    del params, norm_type
    norms = [torch.linalg.vector_norm(g.double()) for g in gradients if not getattr(g, "_zero_padding", False)]
    total = torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64)
    if ranks.world_size() > 1:
        total = total.to(gradients[0].device if len(gradients) else total.device)
        dist.all_reduce(total)
    norm = total.float().sqrt()
    return torch.where(torch.isfinite(norm), norm, torch.full_like(norm, -1.0))


def groups_by_rate(
    model: nn.Module, trainable: Mapping[str, nn.Parameter], lr_scale: Mapping[str, float]
) -> list[dict[str, Any]]:
    """The optimiser's groups: one per factor on the learning rate.

    Args:
        model: its `part_of` names the part of a parameter.
        trainable: trained parameters by name.
        lr_scale: part → factor; parts not named have 1.

    Raises:
        ConfigError: a named part trains nothing.
    """
    part_of = getattr(model, "part_of", lambda name: name)
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in trainable.items():
        groups.setdefault(lr_scale.get(part_of(name), 1.0), []).append(parameter)
    idle = sorted(set(lr_scale) - {part_of(name) for name in trainable})
    if idle:
        raise ConfigError(f"train.lr_scale names {idle[0]!r}, which this recipe does not train; remove it")
    return [{"params": parameters, "scale": scale} for scale, parameters in groups.items()]


def seed_micro_batch(seed: int, step: int, place: int) -> None:
    """Sets torch's random state to a function of these numbers (dropout draws from it).

    Args:
        seed: of the run.
        step: 0-based.
        place: of the micro-batch in the global batch, over all ranks.
    """
    state = np.random.SeedSequence([seed, step, place]).generate_state(1, dtype=np.uint64)[0]
    torch.manual_seed(int(state) & 0x7FFF_FFFF_FFFF_FFFF)


def deepspeed_config(train: TrainSettings, num_trainable: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a recipe.

    Args:
        train: the recipe.
        num_trainable: elements of all trained parameters; buckets are not made larger than that.
    """
    bucket = 2 * ((min(num_trainable, _MAX_BUCKET_ELEMENTS) + 1) // 2 + 1)
    zero: dict[str, Any] = {
        "stage": train.zero_stage,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if train.zero_stage == 3:
        zero |= {"stage3_prefetch_bucket_size": bucket, "stage3_param_persistence_threshold": 0}
    if train.offload_optimizer and train.zero_stage:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": train.use_gpu}
    return {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.clip_norm,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": train.precision == "bf16"} | ({"check_grad_overflow": True} if train.zero_stage else {}),
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def import_deepspeed(*, use_gpu: bool) -> Any:
    """Imports DeepSpeed (2 to 4 s, so only where it is used) for the right device, quietens it, and loads its operator.

    `deepspeed.initialize` then finds the operator loaded; it would load it outside of our lock.
    """
    if not use_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(build_root()))
    scripts = sysconfig.get_path("scripts")  # ninja lies here, also where the environment is not activated
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", "")])
    import deepspeed  # slow
    from deepspeed.comm.torch import build_shm_op

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    logging.getLogger("deepspeed").setLevel(logging.ERROR)
    with alone_in(build_root()):
        build_shm_op()
    return deepspeed


@contextmanager
def single_process_group() -> Iterator[None]:
    """A gloo group of one for as long as the block runs; for training without Ray (tests, warming up)."""
    with tempfile.TemporaryDirectory(prefix="pixellm-group-") as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, list):
        return [_to_device(item, device) for item in value]
    return value
