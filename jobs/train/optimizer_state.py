"""The optimiser's state as named pieces of parameters, independent of ZeRO stage and number of ranks.

Each rank owns some stretch of each flattened parameter: its fp32 master values and AdamW's two moments. A shard file
stores these stretches under `kind|parameter|start`; reading asks for the stretches that a rank owns now, from whichever
shards hold them. A run can so go on with another number of workers, or another ZeRO stage, than wrote the checkpoint.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pixellm.errors import CheckpointError
from pixellm.jobs.train import ranks
from pixellm.jobs.train.deepspeed_engine import TrainEngine

MASTER = "master"
AVERAGE = "average"
MOMENTS = ("exp_avg", "exp_avg_sq")
_UPDATES_KEY = "updates"


class Stretch(NamedTuple):
    """One stretch of a flattened parameter that this rank owns; `values` are views that can be written to."""

    kind: str
    parameter: str
    start: int
    values: Tensor


class _Stored(NamedTuple):
    start: int
    stop: int
    path: Path
    key: str


def save_optimizer(engine: TrainEngine, path: Path) -> None:
    """Writes this rank's stretches into one safetensors file."""
    from safetensors.torch import save_file

    tensors = {
        f"{stretch.kind}|{stretch.parameter}|{stretch.start}": stretch.values.detach().cpu().contiguous().clone()
        for stretch in owned_stretches(engine)
    }
    save_file(tensors, path, metadata={_UPDATES_KEY: str(engine.num_updates)})


@torch.no_grad()
def load_optimizer(engine: TrainEngine, paths: Sequence[Path]) -> None:
    """Fills this rank's masters and moments from the shards of a checkpoint.

    Args:
        engine: freshly built; its model already holds the checkpoint's weights.
        paths: all shards of the checkpoint.

    Raises:
        CheckpointError: the shards do not cover a parameter that this run trains.
    """
    from safetensors import safe_open

    index, num_updates = _index_shards(paths)
    engine.num_updates = num_updates
    if num_updates:
        _create_moments(engine, num_updates)
    files: dict[Path, Any] = {path: safe_open(path, framework="pt") for path in paths}
    for stretch in owned_stretches(engine):
        needed, stop = stretch.start, stretch.start + stretch.values.numel()
        for stored in index.get((stretch.kind, stretch.parameter), []):
            first, last = max(needed, stored.start), min(stop, stored.stop)
            if first != needed or first >= last:
                continue
            piece = files[stored.path].get_slice(stored.key)[first - stored.start : last - stored.start]
            stretch.values[first - stretch.start : last - stretch.start].copy_(piece)
            needed = last
        if needed < stop:
            raise CheckpointError(
                f"the checkpoint in {paths[0].parent} holds no {stretch.kind} of {stretch.parameter} from element "
                f"{needed} on; it belongs to a run that trains other parts: use --fresh or another name"
            )


def owned_stretches(engine: TrainEngine) -> Iterator[Stretch]:
    """This rank's stretches, masters first; moments only once there has been an update."""
    kinds = (MASTER, *MOMENTS) if engine.num_updates else (MASTER,)
    for kind in kinds:
        yield from stretches_of_kind(engine, kind)
    if engine.average is not None:
        yield from engine.average.stretches()


def stretches_of_kind(engine: TrainEngine, kind: str) -> Iterator[Stretch]:
    """This rank's stretches of masters or of one moment."""
    for name, parameter in engine.trainable.items():
        yield from _stretches_of(engine, name, parameter, kind)


def _stretches_of(engine: TrainEngine, name: str, parameter: nn.Parameter, kind: str) -> Iterator[Stretch]:
    if engine.zero_stage == 3:
        yield from _partitioned(name, parameter, kind)
    elif engine.zero_stage:
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:
            values = mapping.get_hp_fragment(None if kind == MASTER else kind)
            yield Stretch(kind, name, mapping.lp_fragment_address.start, values)
    else:
        master = _replicated_masters(engine).get(parameter, parameter)
        values = master.data if kind == MASTER else engine.optimizer.state[master][kind]
        yield Stretch(kind, name, 0, values.view(-1))


def _replicated_masters(engine: TrainEngine) -> dict[Tensor, Tensor]:
    """ZeRO 0 in bf16: the fp32 copy of each parameter; empty in fp32, where parameters are their own masters."""
    wrapper = engine.engine.optimizer
    if not hasattr(wrapper, "fp32_groups"):
        return {}
    pairs = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
    return {low: high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}


def _partitioned(name: str, parameter: nn.Parameter, kind: str) -> Iterator[Stretch]:
    """ZeRO 3: each parameter is cut into equal parts, the last one padded."""
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    local = safe_get_local_fp32_param(parameter) if kind == MASTER else safe_get_local_optimizer_state(parameter, kind)
    start = ranks.rank() * parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
    count = min(local.numel(), parameter.ds_numel - start)  # type: ignore[attr-defined]
    if count > 0:
        yield Stretch(kind, name, start, local.view(-1)[:count])


def _create_moments(engine: TrainEngine, num_updates: int) -> None:
    """Gives AdamW the state that it otherwise makes at its first update."""
    zero = engine.engine.optimizer
    if engine.zero_stage == 3:  # its param_groups are filled in only while it steps
        owners = zero.fp32_partitioned_groups_flat
    elif engine.zero_stage == 0:
        masters = _replicated_masters(engine)
        owners = [masters.get(parameter, parameter) for parameter in engine.trainable.values()]
    else:
        owners = [parameter for group in engine.optimizer.param_groups for parameter in group["params"]]
    for parameter in owners:
        engine.optimizer.state[parameter] = {
            "step": torch.tensor(float(num_updates)),
            **{kind: torch.zeros_like(parameter) for kind in MOMENTS},
        }
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._lazy_init_hp_params_optimizer_state()


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a whole parameter, also where ZeRO 3 has emptied it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def read_average(paths: Sequence[Path], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The moving average of whole parameters, put together from the shards of a checkpoint.

    Args:
        paths: all shards.
        shapes: parameter → its shape.

    Raises:
        CheckpointError: the shards do not hold the average of a parameter.
    """
    from safetensors import safe_open

    index, _ = _index_shards(paths)
    whole = {}
    for name, shape in shapes.items():
        flat, filled = torch.empty(shape.numel()), 0
        for stored in index.get((AVERAGE, name), []):
            with safe_open(stored.path, framework="pt") as file:
                flat[stored.start : stored.stop] = file.get_tensor(stored.key)
            filled += stored.stop - stored.start
        if filled != shape.numel():
            raise CheckpointError(f"{paths[0].parent} holds no moving average of {name}; set train.ema_decay as before")
        whole[name] = flat.view(shape)
    return whole


def _index_shards(paths: Sequence[Path]) -> tuple[dict[tuple[str, str], list[_Stored]], int]:
    from safetensors import SafetensorError, safe_open

    index: dict[tuple[str, str], list[_Stored]] = defaultdict(list)
    updates = 0
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                updates = int((file.metadata() or {})[_UPDATES_KEY])
                for key in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                    kind, parameter, start = key.split("|")
                    first = int(start)
                    numel = file.get_slice(key).get_shape()[0]
                    index[kind, parameter].append(_Stored(first, first + numel, path, key))
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise CheckpointError(f"cannot read the optimiser shard {path}: {error}; remove this checkpoint") from error
    for pieces in index.values():
        pieces.sort()
    return index, updates


@torch.no_grad()
def gather_weights(engine: TrainEngine, *, only_trainable: bool) -> dict[str, Tensor]:
    """The model's parameters on the CPU, whole, on rank 0; an empty dict on the other ranks. All ranks must call it.

    Args:
        engine: at any ZeRO stage; partitioned parameters are gathered one by one.
        only_trainable: leave out frozen ones.
    """
    weights: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        if only_trainable and name not in engine.trainable:
            continue
        if engine.zero_stage == 3:
            from deepspeed.runtime.zero import GatheredParameters

            with GatheredParameters(parameter):
                if ranks.rank() == 0:
                    weights[name] = parameter.detach().cpu().clone()
        elif ranks.rank() == 0:
            weights[name] = parameter.detach().cpu().contiguous().clone()
    return weights
