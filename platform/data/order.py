"""The order of samples as a pure function of (seed, sizes, weights, position).

The mix holds exactly: weights become whole slots of a block, and every block is that pattern in another seeded
arrangement. Each source's samples come exactly once per its epoch, in a seeded permutation that is computed point by
point (a Feistel network with cycle walking), so position 1,000,000 costs what position 0 costs and nothing is stored.
Drawn with replacement instead, a sample comes whenever chance has it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from pixellm.errors import ConfigError

_MASK64 = (1 << 64) - 1
_FEISTEL_ROUNDS = 6
_MAX_PERIOD = 4096


@dataclass(frozen=True, slots=True)
class Draw:
    """What comes at a position.

    Attributes:
        position: in the global order.
        source: index of the source in the mixture.
        index: of the sample within the source, 0 ≤ index < its size.
        epoch: how many times the source has been gone through before.
        seed: for everything random about this sample, 0 ≤ seed < 2**64.
    """

    position: int
    source: int
    index: int
    epoch: int
    seed: int

    def rng(self) -> np.random.Generator:
        """A fresh generator that depends on nothing but (seed of the order, position)."""
        return np.random.default_rng(self.seed)


class Order(Protocol):
    """Anything that says what comes at a place of an endless global order; picklable, a pure function."""

    def sample_at(self, position: int) -> Draw:
        """What comes at a place ≥ 0."""
        ...


class MixtureOrder:
    """An endless global order over several sources. Picklable; `sample_at` is a pure function.

    Args:
        sizes: samples of each source, each ≥ 1.
        weights: relative share of each source, each > 0.
        seed: another seed gives another order.
        caps: of each source, how many of its samples are used at all: a seeded choice, the same in every epoch and
            part of every larger one; None: all.
        replacement: draw every sample of a source anew instead of going through all of them once per epoch.

    Raises:
        ConfigError: no source, an empty source, a cap below 1, or a weight that is not a positive number.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        seed: int,
        *,
        caps: Sequence[int | None] | None = None,
        replacement: bool = False,
    ) -> None:
        if not sizes or len(sizes) != len(weights):
            raise ConfigError(f"a mixture needs sources with one weight each; got {len(sizes)} and {len(weights)}")
        if min(sizes) < 1:
            raise ConfigError(f"source {sizes.index(min(sizes))} of the mixture has no usable sample; leave it out")
        limits = [None] * len(sizes) if caps is None else list(caps)
        if len(limits) != len(sizes) or any(cap is not None and cap < 1 for cap in limits):
            raise ConfigError(f"a mixture of {len(sizes)} sources wants one cap ≥ 1 or None for each, got {limits}")
        self.full_sizes = tuple(int(size) for size in sizes)
        self.sizes = tuple(
            size if cap is None else min(size, cap) for size, cap in zip(self.full_sizes, limits, strict=True)
        )
        self.slots = quantise(weights)
        self.seed = seed
        self.replacement = replacement

    @property
    def period(self) -> int:
        """Positions after which the mix has held exactly."""
        return sum(self.slots)

    def sample_at(self, position: int) -> Draw:
        """What comes at a position ≥ 0 of the global order."""
        block, offset = divmod(position, self.period)
        source, before = _arranged_block(self.slots, self.seed, block)[offset]
        drawn = block * self.slots[source] + before
        size, full_size = self.sizes[source], self.full_sizes[source]
        epoch, place = divmod(drawn, size)
        if self.replacement:
            index = mix_bits(self.seed, 4, source, drawn) % size
        else:
            index = permute(place, size, mix_bits(self.seed, 1, source, epoch))
        if size < full_size:
            index = permute(index, full_size, mix_bits(self.seed, 5, source))
        return Draw(position, source, index, epoch, mix_bits(self.seed, 2, position))

    def positions_for(self, epochs: float) -> int:
        """The first number of positions, in whole blocks, after which every source was gone through that often."""
        blocks = (math.ceil(epochs * size / slots) for size, slots in zip(self.sizes, self.slots, strict=True))
        return max(1, *blocks) * self.period

    def draws(self, start: int, stop: int) -> Iterator[Draw]:
        """The draws of positions start ≤ p < stop."""
        return (self.sample_at(position) for position in range(start, stop))


def quantise(weights: Sequence[float]) -> tuple[int, ...]:
    """Whole slots in the ratio of the weights, in the smallest block that holds the ratio (to 1 part in 4096).

    Raises:
        ConfigError: a weight is not a positive finite number, or so small that it would get no slot.
    """
    shares = np.asarray(weights, dtype=np.float64)
    if not np.isfinite(shares).all() or shares.min() <= 0:
        raise ConfigError(f"weights of a mixture must be positive numbers, got {list(weights)}")
    shares = shares / shares.sum()
    periods = np.arange(1, _MAX_PERIOD + 1)
    wanted = shares[:, None] * periods
    exact = np.flatnonzero(np.abs(wanted - np.rint(wanted)).max(axis=0) < 1e-6)
    period = int(periods[exact[0]]) if len(exact) else _MAX_PERIOD
    slots = np.floor(shares * period + 1e-6).astype(int)
    largest_remainders = np.argsort(slots - shares * period, kind="stable")[: period - int(slots.sum())]
    slots[largest_remainders] += 1
    if slots.min() < 1:
        raise ConfigError(f"weights {list(weights)} are too far apart: the smallest is below 1/{_MAX_PERIOD} of all")
    return tuple(int(slot) for slot in slots)


def permute(place: int, size: int, key: int) -> int:
    """The image of `place` under the permutation of 0 … size−1 that `key` names, without building it."""
    if size == 1:
        return 0
    half_bits = ((size - 1).bit_length() + 1) // 2
    half_mask = (1 << half_bits) - 1
    while True:
        left, right = place >> half_bits, place & half_mask
        for round_number in range(_FEISTEL_ROUNDS):
            left, right = right, left ^ (mix_bits(key, round_number, right) & half_mask)
        place = (left << half_bits) | right
        if place < size:
            return place


@lru_cache(maxsize=64)
def _arranged_block(slots: tuple[int, ...], seed: int, block: int) -> tuple[tuple[int, int], ...]:
    """For each offset of a block: its source, and how many of that source come before it in the block.

    Cached because neighbouring positions share their block.
    """
    pattern = [source for source, count in enumerate(slots) for _ in range(count)]
    for last in range(len(pattern) - 1, 0, -1):
        other = mix_bits(seed, 3, block, last) % (last + 1)
        pattern[last], pattern[other] = pattern[other], pattern[last]
    before = [0] * len(slots)
    arranged = []
    for source in pattern:
        arranged.append((source, before[source]))
        before[source] += 1
    return tuple(arranged)


def mix_bits(*parts: int) -> int:
    """Hashes integers to 64 bits (splitmix64's finaliser over a running sum); the same on every platform."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state + (part & _MASK64) + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state
