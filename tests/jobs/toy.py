"""A toy model with a part that only some samples use, its batches, and the plain loop to compare with."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class ToyOutput:
    """What the training engine wants of a model's output."""

    loss: Tensor
    losses: dict[str, Tensor]


class Toy(nn.Module):
    """Two layers that every sample uses, and a head that a batch with `use_head` false never reaches."""

    def __init__(self, *, always_runs_head: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(7, 13)
        self.neck = nn.Linear(13, 5)
        self.head = nn.Linear(5, 3)
        self.extra_head = nn.Linear(5, 3)
        self.always_runs_head = always_runs_head

    def forward(self, pixel_values: Tensor, use_head: bool) -> ToyOutput:
        hidden = torch.relu(self.neck(torch.relu(self.body(pixel_values))))
        text = self.head(hidden).pow(2).mean()
        losses = {"text": text}
        if use_head or self.always_runs_head:
            losses["ref"] = self.extra_head(hidden).abs().mean() * float(use_head)
        loss = torch.stack(list(losses.values())).sum()
        return ToyOutput(loss, {name: value.detach() for name, value in losses.items()})


def toy_batch(step: int, place: int) -> dict[str, Any]:
    """Micro-batch number `place` of the global batch of a step; every second one has no target."""
    generator = torch.Generator().manual_seed(1000 * step + place)
    return {"pixel_values": torch.randn(4, 7, generator=generator), "use_head": (step + place) % 2 == 0}


def plain_loop(model: Toy, steps: int, places: int, lr: float) -> list[float]:
    """AdamW in ten lines of torch; returns the loss of each step and leaves the model trained."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    curve = []
    for step in range(steps):
        outputs = [model(**toy_batch(step, place)) for place in range(places)]
        optimizer.zero_grad(set_to_none=False)
        for output in outputs:
            (output.loss / places).backward()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        curve.append(sum(float(output.loss.detach()) for output in outputs) / places)
    return curve
