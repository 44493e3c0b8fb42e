"""What the ranks of a training group tell each other: sums, objects and barriers, trivial in a group of one.

Everything the loop decides together (stop now? did every file get written?) goes through here, so that all ranks
decide the same thing at the same step.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


def rank() -> int:
    """This process's rank, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Waits for all ranks."""
    if world_size() > 1:
        dist.barrier()


def sum_over_ranks(values: Sequence[float], device: torch.device | str = "cpu") -> list[float]:
    """Adds up equally long vectors of all ranks in float64; one collective.

    Args:
        values: this rank's numbers.
        device: where the group's backend wants its tensors ("cpu" for gloo, the GPU for NCCL).
    """
    if world_size() == 1:
        return [float(value) for value in values]
    vector = torch.tensor(list(values), dtype=torch.float64, device=device)
    dist.all_reduce(vector)
    return [float(value) for value in vector.tolist()]


def gather_objects(value: Any) -> list[Any]:
    """The picklable value of every rank, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: Any) -> Any:
    """Rank 0's picklable value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
