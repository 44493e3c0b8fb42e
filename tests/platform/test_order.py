"""The order: a permutation per epoch, an exact mix, and no state."""

import pickle
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from pixellm.errors import ConfigError
from pixellm.platform.data.order import MixtureOrder, permute, quantise

SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=4)


@given(st.integers(1, 400), st.integers(0, 2**64 - 1))
@settings(max_examples=120, deadline=None)
def test_permute_reaches_every_place_exactly_once(size: int, key: int) -> None:
    assert sorted(permute(place, size, key) for place in range(size)) == list(range(size))


def test_permute_sends_a_place_everywhere_equally_often() -> None:
    images = Counter(permute(3, 12, key) for key in range(6000))

    assert chisquare([images[index] for index in range(12)]).pvalue > 1e-4


@given(SIZES, st.data(), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_each_sample_of_each_source_comes_exactly_once_per_epoch(
    sizes: list[int], data: st.DataObject, seed: int
) -> None:
    weights = data.draw(st.lists(st.integers(1, 6), min_size=len(sizes), max_size=len(sizes)))
    order = MixtureOrder(sizes, weights, seed)

    drawn: dict[int, list[int]] = {source: [] for source in range(len(sizes))}
    for draw in order.draws(0, 800):
        assert draw.epoch == len(drawn[draw.source]) // sizes[draw.source]
        drawn[draw.source].append(draw.index)

    for source, size in enumerate(sizes):
        whole = len(drawn[source]) // size
        for epoch in range(whole):
            assert sorted(drawn[source][epoch * size : (epoch + 1) * size]) == list(range(size))


@given(st.integers(0, 10**7), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_any_whole_block_holds_the_mix_exactly(block: int, seed: int) -> None:
    order = MixtureOrder([18, 32, 1000], [2, 2, 4], seed)

    assert order.period == 4
    start = block * order.period
    assert Counter(draw.source for draw in order.draws(start, start + 4)) == {0: 1, 1: 1, 2: 2}


def test_a_draw_depends_on_nothing_but_seed_and_position() -> None:
    order = MixtureOrder([7, 90], [1, 3], seed=5)
    forwards = [order.sample_at(position) for position in range(1_000_000, 1_000_050)]
    elsewhere = pickle.loads(pickle.dumps(MixtureOrder([7, 90], [1, 3], seed=5)))

    assert [elsewhere.sample_at(position) for position in reversed(range(1_000_000, 1_000_050))] == forwards[::-1]
    assert [draw.position for draw in forwards] == list(range(1_000_000, 1_000_050))
    assert forwards[0].rng().integers(1 << 40) == elsewhere.sample_at(1_000_000).rng().integers(1 << 40)


def test_another_seed_or_epoch_gives_another_arrangement() -> None:
    def indices(seed: int, epoch: int) -> list[int]:
        return [draw.index for draw in MixtureOrder([50], [1], seed).draws(50 * epoch, 50 * epoch + 50)]

    assert indices(0, 0) != indices(1, 0)
    assert indices(0, 0) != indices(0, 1)
    assert indices(0, 0) != sorted(indices(0, 0))


def test_seeds_of_samples_do_not_repeat() -> None:
    seeds = {draw.seed for seed in range(4) for draw in MixtureOrder([10], [1], seed).draws(0, 2000)}

    assert len(seeds) == 8000


@pytest.mark.parametrize(
    ("weights", "slots"),
    [([2, 2, 4], (1, 1, 2)), ([2, 9, 2, 4], (2, 9, 2, 4)), ([0.1, 0.3], (1, 3)), ([5], (1,)), ([1 / 3, 2 / 3], (1, 2))],
)
def test_rational_weights_become_the_smallest_exact_block(weights: list[float], slots: tuple[int, ...]) -> None:
    assert quantise(weights) == slots


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_any_weights_are_kept_to_a_tenth_of_a_percent_point(weights: list[float]) -> None:
    slots = quantise(weights)

    for slot, weight in zip(slots, weights, strict=True):
        assert slot / sum(slots) == pytest.approx(weight / sum(weights), abs=1e-3)


@pytest.mark.parametrize(
    ("sizes", "weights", "message"),
    [
        ([], [], "needs sources"),
        ([3, 0], [1, 1], "source 1 of the mixture has no usable sample"),
        ([3, 3], [1], "one weight each"),
        ([3, 3], [1, 0], "positive numbers"),
        ([3, 3], [1, float("nan")], "positive numbers"),
        ([3, 3], [1, 1e-9], "too far apart"),
    ],
)
def test_an_impossible_mixture_says_what_is_wrong(sizes: list[int], weights: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MixtureOrder(sizes, weights, 0)
