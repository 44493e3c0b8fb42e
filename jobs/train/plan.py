"""`pixellm train --dry-run`: what a recipe would train, hold and take, reckoned before anything starts.

Parameters are counted on the real network without its weights; operations by torch on meta tensors. Memory follows
from what `TrainEngine` keeps: local gradients until the one reduction of a step, then DeepSpeed's partitions.
Activations are an estimate with the coefficients written below.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from pixellm.errors import ConfigError
from pixellm.jobs.train.build import trained_parts
from pixellm.platform.settings import PARTS, Settings, TrainSettings

if TYPE_CHECKING:
    from pixellm.model.config import PixelLMConfig

GB = 1e9
#: Of a device's memory that a plan may fill: the rest is CUDA's context, fragments and communication buffers.
USABLE_SHARE = 0.92
MAX_TEXT_TOKENS = 512
_A100_GB, _A100_TFLOPS = 80.0, 312.0
#: Dense bf16 peaks by Ray's names of accelerators, in TFLOP/s (makers' data sheets).
_PEAK_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "A10G": 70.0, "L4": 121.0, "L40S": 362.0, "V100": 125.0}
#: Values that autograd keeps per position of one Llama layer: norms with their fp32 copies, q, k, v, attention, and
#: gate, up, activation and product of the MLP.
_LANGUAGE_WIDTHS, _LANGUAGE_MLPS = 12, 4
#: Likewise of a CLIP layer (with its own norms, one activation), and of one position of a decoder scale per target.
_VISION_WIDTHS, _VISION_MLPS, _DECODER_WIDTHS = 12, 2, 40


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device.

    Attributes:
        zero_stage: 0 to 3.
        weights: of the network in the recipe's precision.
        gradients: local ones in that precision, their fp32 sums over micro-batches, the reduced partition.
        optimizer: fp32 masters, two moments, and the moving average where there is one.
        buckets: of the reduction and of the all-gather.
        activations: of one micro-batch.
        offloaded: bytes that lie in the host's memory instead, not counted in `total`.
    """

    zero_stage: int
    weights: float
    gradients: float
    optimizer: float
    buckets: float
    activations: float
    offloaded: float = 0.0

    @property
    def total(self) -> float:
        """Bytes on the device."""
        return self.weights + self.gradients + self.optimizer + self.buckets + self.activations


@dataclass(frozen=True)
class TrainPlan:
    """What a run would come to.

    Attributes:
        name: of the recipe.
        preset: sizes of the network.
        parts: part → (parameters trained, parameters frozen).
        num_workers: devices.
        device: what one device is, in words.
        device_gb: its memory in 10⁹ bytes.
        stages: memory at each ZeRO stage.
        chosen: the recipe's stage.
        lines: the arithmetic, in words and numbers.
        steps: optimiser steps.
        global_batch_size: samples of one step.
        tokens: text and picture positions over the run.
        train_tflops: operations of one sample, forward and backward, in 10¹² (recomputation not counted).
        hours: expected time at the given share of the peak; None where the peak is not known.
    """

    name: str
    preset: str
    parts: dict[str, tuple[int, int]]
    num_workers: int
    device: str
    device_gb: float
    stages: tuple[MemoryPlan, ...]
    chosen: int
    lines: tuple[str, ...]
    steps: int
    global_batch_size: int
    tokens: int
    train_tflops: float
    hours: float | None

    @property
    def memory(self) -> MemoryPlan:
        """At the recipe's ZeRO stage."""
        return self.stages[self.chosen]

    @property
    def fits(self) -> bool:
        """Whether the recipe's stage fits the device."""
        return self.memory.total <= USABLE_SHARE * self.device_gb * GB

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        stages = [asdict(stage) | {"total": stage.total} for stage in self.stages]
        return asdict(self) | {"stages": stages, "fits": self.fits}

    def to_text(self) -> str:
        """The plan for a terminal."""
        trained, frozen = (sum(pair[side] for pair in self.parts.values()) for side in (0, 1))
        rows = [f"{'parameters':<14}{'trained':>18}{'frozen':>18}"]
        rows += [f"  {part:<12}{one:>18,}{other:>18,}" for part, (one, other) in self.parts.items()]
        rows += [f"  {'together':<12}{trained:>18,}{frozen:>18,}", ""]
        names = ("weights", "gradients", "optimizer", "buckets", "activations", "total")
        rows.append(f"GB per device {'':<6}" + "".join(f"{name:>13}" for name in names) + "   on the host")
        for stage in self.stages:
            mark = "→" if stage.zero_stage == self.chosen else " "
            figures = "".join(f"{getattr(stage, name) / GB:>13.2f}" for name in names)
            rows.append(f"{mark} ZeRO {stage.zero_stage:<12}{figures}{stage.offloaded / GB:>14.2f}")
        hours = "unknown (set plan.peak_tflops)" if self.hours is None else f"{self.hours:.3g} h"
        title = f"plan of {self.name} ({self.preset}) on {self.num_workers} × {self.device}"
        return "\n".join([title, "", *rows, "", *self.lines, f"expected time     {hours}"])


def plan_training(settings: Settings) -> TrainPlan:
    """Reckons a recipe through.

    Returns:
        A plan that fits.

    Raises:
        ConfigError: settings contradict each other, or the plan does not fit the device; the knob is named.
    """
    counted = _Counted.of(settings)
    plan = _reckon(settings, counted)
    if plan.fits:
        return plan
    knobs = _knobs(settings.train)
    alone = [knobs[number : number + 1] for number in range(len(knobs))]
    together = [knobs[: number + 1] for number in range(1, len(knobs))]
    mend = "no knob of the recipe is enough: more workers (train.num_workers at ZeRO 3), a larger device, or a smaller "
    mend += "model.preset"
    for chosen in [*alone, *together]:
        changes = {key: value for _, change in chosen for key, value in change.items()}
        other = _reckon(settings.model_copy(update={"train": settings.train.model_copy(update=changes)}), counted)
        if other.fits:
            mend = f"{' '.join(knob for knob, _ in chosen)} brings it to {other.memory.total / GB:.1f} GB"
            break
    memory = plan.memory
    raise ConfigError(
        f"the plan does not fit: {memory.total / GB:.1f} GB (weights {memory.weights / GB:.1f}, gradients "
        f"{memory.gradients / GB:.1f}, optimiser {memory.optimizer / GB:.1f}, activations "
        f"{memory.activations / GB:.1f}) of {USABLE_SHARE:.0%} of {plan.device_gb:g} GB per device at ZeRO "
        f"{plan.chosen}; {mend}"
    )


def count_parameters(settings: Settings, config: "PixelLMConfig") -> dict[str, tuple[int, int]]:
    """Part → (trained, frozen) parameters, on the network itself without its weights."""
    from pixellm.model.lora import attach_lora
    from pixellm.model.networks import build_network

    lora = settings.train.lora
    with torch.device("meta"):
        model = build_network(config)
        if lora.enabled:
            attach_lora(model, lora.r, lora.alpha, lora.dropout, lora.target_modules)
    model.set_trainable_parts(trained_parts(settings.train))
    counts = {part: [0, 0] for part in PARTS}
    for name, parameter in model.named_parameters():
        counts[model.part_of(name)][not parameter.requires_grad] += parameter.numel()
    return {part: (trained, frozen) for part, (trained, frozen) in counts.items() if trained or frozen}


def memory_at(stage: int, train: TrainSettings, num_trained: int, num_all: int, activations: float) -> MemoryPlan:
    """Bytes per device at one ZeRO stage, as `TrainEngine` and DeepSpeed keep them.

    Args:
        stage: 0 to 3.
        train: workers, precision, accumulation, offload, moving average.
        num_trained: elements of trained parameters.
        num_all: elements of all parameters.
        activations: bytes of one micro-batch.
    """
    width = 2 if train.precision == "bf16" else 4
    shards = train.max_workers if stage else 1
    masters = 4 if train.precision == "bf16" or stage else 0  # ZeRO 0 in fp32: a parameter is its own master
    optimizer = (masters + 8 + (4 if train.ema_decay else 0)) * num_trained / shards
    sums = 4 * num_trained if stage and train.grad_accumulation > 1 else 0
    gradients = width * num_trained + sums + (4 * num_trained / shards if stage else 0)
    is_offloaded = train.offload_optimizer and stage > 0
    return MemoryPlan(
        zero_stage=stage,
        weights=width * num_all / (shards if stage == 3 else 1),
        gradients=gradients,
        optimizer=0.0 if is_offloaded else optimizer,
        buckets=2 * width * min(num_trained, 100_000_000) if train.max_workers > 1 else 0.0,
        activations=activations,
        offloaded=optimizer if is_offloaded else 0.0,
    )


def activation_bytes(train: TrainSettings, config: "PixelLMConfig", num_targets: int) -> dict[str, float]:
    """Bytes that autograd keeps of one micro-batch with conversations of the greatest length, by part: an estimate."""
    width = 2 if train.precision == "bf16" else 4
    text, vision, rows = config.text_config, config.vision_config, train.micro_batch_size
    positions = rows * (config.num_image_tokens + MAX_TEXT_TOKENS)
    layer = (_LANGUAGE_WIDTHS * text.hidden_size + _LANGUAGE_MLPS * text.intermediate_size) * positions * width
    language = text.num_hidden_layers * layer
    if train.gradient_checkpointing:
        language = text.num_hidden_layers * positions * text.hidden_size * width + layer
    patches = rows * config.patch_grid**2
    tower = (_VISION_WIDTHS * vision.hidden_size + _VISION_MLPS * vision.intermediate_size) * patches * width
    if not train.train_vision:
        tower = 0.0  # frozen, and nothing before it trains: nothing is kept
    elif train.gradient_checkpointing:
        tower += vision.num_hidden_layers * patches * vision.hidden_size * width
    else:
        tower *= vision.num_hidden_layers
    maps = config.num_scales * patches
    projectors = (2 * config.projector_hidden_size + text.hidden_size + 4 * config.decoder_hidden_size) * maps * width
    decoder = rows * num_targets * config.decoder_positions * _DECODER_WIDTHS * config.decoder_hidden_size * width
    logits = positions * text.vocab_size * (width + 8)  # the head's output, its fp32 copy and that one's gradient
    return {
        "language": float(language),
        "vision": float(tower),
        "projectors": float(projectors),
        "decoder": float(decoder),
        "logits": float(logits),
    }


def train_tflops(settings: Settings, config: "PixelLMConfig") -> dict[str, float]:
    """Operations of one sample's forward and backward by part, in 10¹².

    A trained part costs three forwards; a frozen one two where gradients pass through it, and one where they do not.
    Recomputation is not counted: it is time, not progress.
    """
    from pixellm.model.flops import forward_tflops

    train, plan = settings.train, settings.plan
    forward = forward_tflops(config, text_tokens=plan.text_tokens, num_targets=plan.targets)
    factors = {
        "vision": 3.0 if train.train_vision else 1.0,
        "sam_encoder": 3.0 if train.train_vision else 1.0,
        "projectors": 3.0,
        "language": 3.0 if train.train_language else 2.0,
        "decoder": 3.0,
    }
    return {part: factors[part] * value for part, value in forward.items()}


def speed_of_light(settings: Settings, resources: Mapping[str, float]) -> tuple[float, float]:
    """What MFU is measured against: operations of one token's training, and one device's peak per second.

    Args:
        settings: `plan.peak_tflops` goes before what the cluster says of its devices.
        resources: of the Ray cluster; a GPU's type is the resource `accelerator_type:NAME`.

    Returns:
        (0, 0) where the peak is not known.
    """
    names = (name.removeprefix("accelerator_type:").partition("-")[0] for name in resources)
    known = next((_PEAK_TFLOPS[name] for name in names if name in _PEAK_TFLOPS), None)
    peak = settings.plan.peak_tflops or (known if settings.train.use_gpu else None)
    if peak is None:
        return 0.0, 0.0
    config = _config(settings)
    positions = config.num_image_tokens + settings.plan.text_tokens
    return 1e12 * sum(train_tflops(settings, config).values()) / positions, 1e12 * peak


class _Counted(NamedTuple):
    """What no knob of the memory changes: sizes, parameters and operations by part."""

    config: "PixelLMConfig"
    parts: dict[str, tuple[int, int]]
    flops: dict[str, float]

    @classmethod
    def of(cls, settings: Settings) -> "_Counted":
        config = _config(settings)
        return cls(config, count_parameters(settings, config), train_tflops(settings, config))


def _reckon(settings: Settings, counted: _Counted) -> TrainPlan:
    train, plan = settings.train, settings.plan
    config, parts, flops = counted
    num_trained = sum(trained for trained, _ in parts.values())
    num_all = num_trained + sum(frozen for _, frozen in parts.values())
    kept = activation_bytes(train, config, plan.targets)
    stages = tuple(memory_at(stage, train, num_trained, num_all, sum(kept.values())) for stage in range(4))
    device, device_gb, peak = _device(settings)
    samples = train.steps * train.global_batch_size
    positions = config.num_image_tokens + plan.text_tokens
    recomputed = 1 + (flops["language"] / (3 if train.train_language else 2)) / sum(flops.values())
    slower = recomputed if train.gradient_checkpointing else 1.0
    seconds = samples * sum(flops.values()) * slower / (peak * plan.mfu * train.max_workers) if peak else None
    lines = (
        *_memory_lines(stages[train.zero_stage], train, num_trained, num_all),
        f"global batch      {train.max_workers} workers × {train.micro_batch_size} × {train.grad_accumulation} "
        f"accumulated = {train.global_batch_size}",
        f"samples           {train.steps} steps × {train.global_batch_size} = {samples:,}",
        f"tokens            {samples:,} × ({config.num_image_tokens} picture + {plan.text_tokens} text) = "
        f"{samples * positions:,}",
        f"activations       longest conversation ({config.num_image_tokens} + {MAX_TEXT_TOKENS} positions), "
        f"{train.micro_batch_size} rows: " + ", ".join(f"{part} {value / GB:.2f} GB" for part, value in kept.items()),
        "TFLOPs a sample   " + " + ".join(f"{part} {value:.2f}" for part, value in flops.items())
        + f" = {sum(flops.values()):.2f}" + (f", × {slower:.2f} recomputed" if slower > 1 else ""),
        f"speed             {train.max_workers} × {peak or 0:g} TFLOP/s × MFU {plan.mfu:g}",
    )  # fmt: skip
    return TrainPlan(
        settings.name, settings.model.preset, parts, train.max_workers, device, device_gb, stages, train.zero_stage,
        lines, train.steps, train.global_batch_size, samples * positions, sum(flops.values()),
        None if seconds is None else seconds / 3600,
    )  # fmt: skip


def _memory_lines(memory: MemoryPlan, train: TrainSettings, num_trained: int, num_all: int) -> list[str]:
    """How the chosen stage's bytes come about."""
    width, shards = 2 if train.precision == "bf16" else 4, train.max_workers
    divided = f" / {shards} workers" if memory.zero_stage else ""
    all_divided = f" / {shards} workers" if memory.zero_stage == 3 else ""
    sums = " + 4 B fp32 sums" if memory.zero_stage and train.grad_accumulation > 1 else ""
    reduced = f" + 4 B{divided}" if memory.zero_stage else ""
    per_parameter = (memory.optimizer + memory.offloaded) * (shards if memory.zero_stage else 1) / num_trained
    where = ", on the host" if memory.offloaded else ""
    return [
        f"weights           {num_all:,} × {width} B{all_divided} = {memory.weights / GB:.2f} GB",
        f"gradients         {num_trained:,} × ({width} B{sums}{reduced}) = {memory.gradients / GB:.2f} GB",
        f"optimiser         {num_trained:,} × {per_parameter:.0f} B (fp32 masters, two moments"
        f"{', moving average' if train.ema_decay else ''}){divided} = "
        f"{(memory.optimizer + memory.offloaded) / GB:.2f} GB{where}",
    ]


def _config(settings: Settings) -> "PixelLMConfig":
    from pixellm.model.config import PixelLMConfig
    from pixellm.model.networks import load_config

    start = settings.model.init_from
    if start is not None and (Path(start) / "config.json").is_file():
        return load_config(start)
    return PixelLMConfig.from_preset(settings.model.preset, **settings.model.overrides)


def _device(settings: Settings) -> tuple[str, float, float | None]:
    """What one device is called, its memory in 10⁹ bytes, its peak in TFLOP/s."""
    train, plan = settings.train, settings.plan
    if train.use_gpu:
        memory = plan.device_gb or _A100_GB
        return f"GPU of {memory:g} GB", memory, plan.peak_tflops or _A100_TFLOPS
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB / train.max_workers
    memory = plan.device_gb or round(host, 1)
    return f"CPU worker with {memory:g} GB", memory, plan.peak_tflops


def _knobs(train: TrainSettings) -> list[tuple[str, dict[str, Any]]]:
    """What makes a run smaller without changing what it learns, the cheapest first."""
    knobs: list[tuple[str, dict[str, Any]]] = []
    if not train.gradient_checkpointing:
        knobs.append(("--train.gradient_checkpointing=true", {"gradient_checkpointing": True}))
    if train.micro_batch_size > 1:
        accumulated = train.grad_accumulation * train.micro_batch_size
        change = {"micro_batch_size": 1, "grad_accumulation": accumulated}
        knobs.append((f"--train.micro_batch_size=1 --train.grad_accumulation={accumulated}", change))
    if train.precision == "fp32":
        knobs.append(("--train.precision=bf16", {"precision": "bf16"}))
    knobs += [
        (f"--train.zero_stage={stage}", {"zero_stage": stage}) for stage in range(max(2, train.zero_stage + 1), 4)
    ]
    if not train.offload_optimizer:
        knobs.append(("--train.offload_optimizer=true", {"offload_optimizer": True}))
    return knobs
