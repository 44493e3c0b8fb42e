"""The moving average of the trained weights (EMA): each rank averages the fp32 masters that it owns.

At step n the average moves by 1 − min(decay, (1 + n) / (10 + n)), so that it forgets the random start soon. It travels
in the optimiser's shards, and is what the finished model is made of.
"""

from collections.abc import Iterator

import torch

from pixellm.jobs.train.deepspeed_engine import TrainEngine
from pixellm.jobs.train.optimizer_state import AVERAGE, MASTER, Stretch, stretches_of_kind


class WeightAverage:
    """The average over one rank's stretches; starts at the present weights."""

    def __init__(self, engine: TrainEngine, decay: float) -> None:
        self._decay = decay
        self._stretches = [
            Stretch(AVERAGE, stretch.parameter, stretch.start, stretch.values.detach().clone())
            for stretch in stretches_of_kind(engine, MASTER)
        ]

    def stretches(self) -> Iterator[Stretch]:
        """The averaged stretches, as `owned_stretches` gives them."""
        return iter(self._stretches)

    @torch.no_grad()
    def update(self, engine: TrainEngine) -> None:
        """Takes in the weights after update number `engine.num_updates`."""
        weight = 1 - min(self._decay, (1 + engine.num_updates) / (10 + engine.num_updates))
        for average, master in zip(self._stretches, stretches_of_kind(engine, MASTER), strict=True):
            average.values.lerp_(master.values, weight)
