"""The mixture of a recipe: two levels of weights, caps, replacement, epochs, like lengths together, realised shares."""

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from pixellm.errors import ConfigError
from pixellm.platform.data.compose import ComposeLimits, QuestionSource
from pixellm.platform.data.length_order import LengthGroupedOrder
from pixellm.platform.data.mixture import build_order, open_sources, realised_mix, source_weights, steps_for_epochs
from pixellm.platform.data.order import MixtureOrder
from pixellm.platform.data.schema import RowDialogue
from pixellm.platform.data.shards import write_shards
from pixellm.platform.data.stream import iterate_batches
from pixellm.platform.settings import DataSettings, load_settings
from tests.platform.data_builders import row, target, vqa


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows whose written answers are of very different lengths."""
    folder = tmp_path_factory.mktemp("mixture") / "set"
    pets = [target("cat", (0, 0, 20, 20)), target("dog", (31, 0, 60, 30))]
    said = [RowDialogue("referring", "my cat", "", (0,)), RowDialogue("referring", "his dog over there", "", (1,))]
    muse = RowDialogue("muse", "Who?", "The cat {seg}.", (0,), ("the cat",))
    rows = [row(f"p{n}", pets, [*said, muse, vqa("word " * (1 + n * n % 61))]) for n in range(40)]
    write_shards(rows, folder, name="set")
    return folder


def data_settings(uri: Path, **values: object) -> DataSettings:
    groups = ["semantic", "semantic", "referring", "vqa", "muse"]
    sources = [
        {"uri": str(uri), "group": group, "weight": weight}
        for group, weight in zip(groups, [1, 3, 1, 1, 5], strict=True)
    ]
    return DataSettings.model_validate({"sources": sources, **values})


def test_a_groups_share_is_divided_among_its_sources(uri: Path) -> None:
    released = {"semantic": 2, "referring": 9, "vqa": 2, "muse": 4}
    weights = source_weights(data_settings(uri, group_weights=released))
    assert weights == pytest.approx([0.5 / 17, 1.5 / 17, 9 / 17, 2 / 17, 4 / 17])
    assert source_weights(data_settings(uri)) == pytest.approx([1 / 11, 3 / 11, 1 / 11, 1 / 11, 5 / 11])
    with pytest.raises(ConfigError, match=r"differ in muse, vqa"):
        source_weights(data_settings(uri, group_weights={"semantic": 1, "referring": 1}))


@pytest.mark.parametrize("replacement", [False, True])
def test_the_realised_mix_follows_the_released_weights_over_20000_draws(uri: Path, replacement: bool) -> None:
    released = {"semantic": 2, "referring": 9, "vqa": 2, "muse": 4}
    data = data_settings(uri, group_weights=released, replacement=replacement)
    order = build_order(data, open_sources(data), 3, global_batch_size=16, micro_batch_size=2)
    mix = realised_mix(order, source_weights(data), 1_000_003, 20_000)
    assert mix.max_error < 0.01
    assert mix.p_value > 0.01
    assert sum(mix.counts) == 20_000
    wrong = realised_mix(order, [1, 1, 1, 1, 1], 0, 2000)
    assert wrong.p_value < 1e-6
    assert wrong.max_error > 0.2


def test_with_replacement_every_sample_is_drawn_equally_often_and_epochs_do_not_bind() -> None:
    draws = [draw.index for draw in MixtureOrder([20], [1], 1, replacement=True).draws(0, 20_000)]
    assert chisquare([Counter(draws)[index] for index in range(20)]).pvalue > 1e-4
    assert len(set(draws[:20])) < 20


@given(st.integers(1, 80), st.integers(1, 90), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_a_cap_uses_one_seeded_choice_in_every_epoch_and_a_larger_cap_holds_it(size: int, cap: int, seed: int) -> None:
    def used(limit: int | None, epoch: int) -> list[int]:
        order = MixtureOrder([size], [1], seed, caps=[limit])
        return [draw.index for draw in order.draws(epoch * order.sizes[0], (epoch + 1) * order.sizes[0])]

    first = used(cap, 0)
    assert len(set(first)) == len(first) == min(size, cap)
    assert set(used(cap, 5)) == set(first)
    assert set(first) <= set(used(cap + 7, 0))
    assert set(used(None, 0)) == set(range(size))


def test_epochs_are_the_first_steps_after_which_every_source_was_gone_through(uri: Path) -> None:
    assert MixtureOrder([40], [1], 0).positions_for(2) == 80
    order = MixtureOrder([30, 10], [1, 3], 0)
    drawn = Counter(draw.source for draw in order.draws(0, order.positions_for(1)))
    assert drawn[0] == 30
    assert drawn[1] >= 10
    data = data_settings(uri, epochs=1.5)
    sources = open_sources(data)
    steps = steps_for_epochs(data, sources, 0, global_batch_size=16)
    assert steps == -(-40 * 1.5 * 11 // 16)
    assert steps_for_epochs(data_settings(uri), sources, 0, global_batch_size=16) is None


def grouped(uri: Path, batches: int, seed: int = 0) -> tuple[MixtureOrder, LengthGroupedOrder, list[QuestionSource]]:
    sources = [QuestionSource.open(uri, group, ComposeLimits(2, 2)) for group in ("vqa", "referring")]
    order = MixtureOrder([len(source) for source in sources], [2, 1], seed)
    return order, LengthGroupedOrder(order, sources, group_size=4, window=24 * batches, seed=seed), sources


@pytest.mark.parametrize("batches", [1, 3])
def test_grouping_by_length_moves_samples_only_inside_their_window(uri: Path, batches: int) -> None:
    order, by_length, _ = grouped(uri, batches)
    window = 24 * batches
    for start in (0, window, 7_000 * window):
        inside = [by_length.sample_at(position) for position in range(start, start + window)]
        assert sorted(inside, key=lambda draw: draw.position) == list(order.draws(start, start + window))
    places = [by_length.sample_at(position).position for position in range(window)]
    assert places != sorted(places)


def test_grouped_positions_are_a_pure_function_and_pickle_without_their_memory(uri: Path) -> None:
    _, by_length, _ = grouped(uri, 2)
    forwards = [by_length.sample_at(position) for position in range(10_000, 10_100)]
    elsewhere = pickle.loads(pickle.dumps(by_length))
    assert [elsewhere.sample_at(position) for position in reversed(range(10_000, 10_100))] == forwards[::-1]
    assert [grouped(uri, 2, seed=1)[1].sample_at(position) for position in range(48)] != forwards[:48]


def padding(sources: list[QuestionSource], order: object, count: int, group: int) -> float:
    def words(draw: object) -> int:
        _, dialogue = sources[draw.source].sample(draw)
        return sum(len(turn.question) + len(turn.answer) for turn in dialogue.turns)

    lengths = np.array([words(order.sample_at(position)) for position in range(count)]).reshape(-1, group)
    return 1 - lengths.sum() / (lengths.max(axis=1).sum() * group)


def test_grouping_by_length_takes_most_of_the_padding_away(uri: Path) -> None:
    order, by_length, sources = grouped(uri, 4)
    before, after = padding(sources, order, 960, 4), padding(sources, by_length, 960, 4)
    assert before > 0.35
    assert after < 0.3 * before


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_grouped_order_is_one_global_sequence_for_any_number_of_ranks_and_resumes(uri: Path, world_size: int) -> None:
    _, by_length, sources = grouped(uri, 2)

    def texts(rank: int, world: int, start: int, count: int) -> list[list]:
        encode = lambda sample, dialogue, draw: (sample.image_id, dialogue.turns, draw.position)  # noqa: E731
        part = {"rank": rank, "world_size": world, "start_position": start, "num_positions": count}
        return list(iterate_batches(sources, by_length, encode, global_batch_size=24, **part))

    whole = texts(0, 1, 24_000, 96)
    parts = [texts(rank, world_size, 24_000, 96) for rank in range(world_size)]
    assert [[example for part in parts for example in part[step]] for step in range(4)] == whole
    assert texts(0, 1, 24_072, 24) == whole[3:]


def test_a_window_that_holds_no_whole_groups_is_refused(uri: Path) -> None:
    with pytest.raises(ConfigError, match="window of 10 samples is no whole number of groups of 4"):
        LengthGroupedOrder(MixtureOrder([1], [1], 0), [], group_size=4, window=10, seed=0)


def test_the_released_mix_is_a_recipe() -> None:
    data = load_settings("released-mix").data
    groups = Counter(source.group for source in data.sources)
    assert data.group_weights == {"semantic": 2, "referring": 9, "vqa": 2, "muse": 4}
    assert groups == {"semantic": 5, "referring": 4, "vqa": 1, "muse": 1}
    assert sum(source_weights(data)) == pytest.approx(1)
    assert data.length_window > 0
