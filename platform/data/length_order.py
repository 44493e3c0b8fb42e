"""Texts of like length beside each other, so that little of a micro-batch is padding; still a pure function.

Whole windows of another order are rearranged: their samples are sorted by the length that `QuestionSource.text_length`
foretells without reading them, cut into groups, and the groups come in a seeded order. Every window holds exactly the
samples that it held before; a window of one global batch leaves every optimiser step its samples.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pixellm.errors import ConfigError
from pixellm.platform.data.compose import QuestionSource
from pixellm.platform.data.order import Draw, Order, mix_bits

_KEPT_WINDOWS = 2


class LengthGroupedOrder:
    """Another order with texts of like length in groups.

    Args:
        order: what comes at each position.
        sources: of the mixture, in the order's numbering.
        group_size: samples that are padded to one length: the micro-batch. It divides `window`.
        window: positions within which samples change places.
        seed: of the groups' arrangement.

    Raises:
        ConfigError: `window` is no multiple of `group_size`.
    """

    def __init__(
        self, order: Order, sources: Sequence[QuestionSource], *, group_size: int, window: int, seed: int
    ) -> None:
        if group_size < 1 or window < 1 or window % group_size:
            raise ConfigError(f"a window of {window} samples is no whole number of groups of {group_size}")
        self.order, self.sources = order, sources
        self.group_size, self.window, self.seed = group_size, window, seed
        self._recent: OrderedDict[int, npt.NDArray[np.int64]] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (self.order, self.sources, self.group_size, self.window, self.seed))

    def sample_at(self, position: int) -> Draw:
        """What comes at a place ≥ 0; the draw's own `position` is its place in the order underneath."""
        number, place = divmod(position, self.window)
        return self.order.sample_at(number * self.window + int(self._arrangement(number)[place]))

    def _arrangement(self, number: int) -> npt.NDArray[np.int64]:
        kept = self._recent.get(number)
        if kept is None:
            kept = self._recent[number] = self._arrange(number)
            if len(self._recent) > _KEPT_WINDOWS:
                self._recent.popitem(last=False)
        return kept

    def _arrange(self, number: int) -> npt.NDArray[np.int64]:
        draws = (self.order.sample_at(number * self.window + place) for place in range(self.window))
        lengths = np.fromiter((self.sources[draw.source].text_length(draw) for draw in draws), float, self.window)
        groups = np.argsort(lengths, kind="stable").reshape(-1, self.group_size)
        keys = [mix_bits(self.seed, 6, number, group) for group in range(len(groups))]
        return groups[sorted(range(len(groups)), key=keys.__getitem__)].ravel()


def _rebuild(
    order: Order, sources: Sequence[QuestionSource], group_size: int, window: int, seed: int
) -> LengthGroupedOrder:
    return LengthGroupedOrder(order, sources, group_size=group_size, window=window, seed=seed)
