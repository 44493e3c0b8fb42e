"""The stream: Ray Data gives exactly the order's sequence, for any number of ranks and from any position."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pixellm.errors import ConfigError, DataError
from pixellm.platform.data.compose import ComposeLimits, Dialogue, QuestionSource
from pixellm.platform.data.order import Draw, MixtureOrder
from pixellm.platform.data.schema import Row
from pixellm.platform.data.shards import write_shards
from pixellm.platform.data.stream import RankSlice, iterate_batches, stream_batches
from tests.platform.data_builders import row, target, vqa

Sources = tuple[list[QuestionSource], MixtureOrder]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    uri = tmp_path_factory.mktemp("stream") / "set"
    rows = [
        row(f"p{n}", [target("cat", (n, 0, 30, 30)), target("dog", (31, 0, 60, 30))], [vqa("Pets.")] if n % 2 else [])
        for n in range(13)
    ]
    write_shards(rows, uri, name="set")
    sources = [QuestionSource.open(uri, group, ComposeLimits(2)) for group in ("segmentation", "vqa")]
    return sources, MixtureOrder([len(source) for source in sources], [3, 1], seed=4)


def make_encode() -> Callable[[Row, Dialogue, Draw], dict]:
    """A local function, so that the reading tasks get it by value (they cannot import the tests)."""

    def encode(row: Row, dialogue: Dialogue, draw: Draw) -> dict:
        if draw.position == 5_000_007:
            raise DataError(f"{row.image_id} is too long")
        noise = draw.rng().random(3).tolist()
        return {"position": draw.position, "text": dialogue.turns, "image": row.image, "noise": noise}

    return encode


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_any_number_of_ranks_streams_the_one_global_sequence(
    ray_cluster: str, mixture: Sources, world_size: int
) -> None:
    sources, order = mixture
    start, steps, batch = 1_000_003, 4, 12
    expected = list(
        iterate_batches(sources, order, make_encode(), global_batch_size=batch, start_position=start, num_positions=48)
    )
    parts = [
        list(
            stream_batches(
                sources,
                order,
                make_encode(),
                global_batch_size=batch,
                rank=rank,
                world_size=world_size,
                start_position=start,
                num_positions=steps * batch,
                block_size=5,
                max_tasks=2,
            )
        )
        for rank in range(world_size)
    ]

    for step in range(steps):
        streamed = [example for part in parts for example in part[step]]
        assert [example["position"] for example in streamed] == list(
            range(start + step * batch, start + (step + 1) * batch)
        )
        assert streamed == expected[step]


def test_a_reading_worker_that_is_killed_changes_nothing_in_the_sequence(ray_cluster: str, mixture: Sources) -> None:
    sources, order = mixture

    def encode(row: Row, dialogue: Dialogue, draw: Draw) -> tuple[int, tuple]:
        time.sleep(0.02)  # so that tasks are still to run when the worker dies
        return os.getpid(), (draw.position, row.image_id, dialogue.turns)

    batches = stream_batches(
        sources,
        order,
        encode,
        global_batch_size=4,
        rank=0,
        world_size=1,
        start_position=0,
        num_positions=240,
        block_size=8,
        max_tasks=2,
    )
    consumed, readers, killed = [], [], None
    for number, batch in enumerate(batches):
        consumed += [example for _, example in batch]
        readers += [pid for pid, _ in batch]
        if number == 12:
            killed = batch[-1][0]
            os.kill(killed, signal.SIGKILL)

    undisturbed = iterate_batches(sources, order, encode, global_batch_size=4, num_positions=240)
    assert consumed == [example for batch in undisturbed for _, example in batch]
    assert killed in readers
    assert readers[-1] != killed  # others did the rest
    assert not Path(f"/proc/{killed}").exists() or "Z" in Path(f"/proc/{killed}/stat").read_text().split(")")[1]


def test_an_error_in_a_reading_task_arrives_as_what_it_was(ray_cluster: str, mixture: Sources) -> None:
    sources, order = mixture
    batches = stream_batches(
        sources,
        order,
        make_encode(),
        global_batch_size=4,
        rank=0,
        world_size=1,
        start_position=5_000_000,
        num_positions=16,
        block_size=4,
        max_tasks=1,
    )

    with pytest.raises(DataError, match=r"p\d+ is too long"):
        list(batches)


@pytest.mark.parametrize("start", [0, 6, 17, 1_000_000])
def test_a_resumed_run_gets_exactly_the_rest(mixture: Sources, start: int) -> None:
    sources, order = mixture

    def sequence(first: int, count: int) -> list[dict]:
        batches = iterate_batches(
            sources, order, make_encode(), global_batch_size=6, start_position=first, num_positions=count
        )
        return [example for batch in batches for example in batch]

    whole, rest = sequence(start, 24), sequence(start + 12, 12)

    assert whole[12:] == rest


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_share_every_global_batch_without_gap_or_overlap(world_size: int) -> None:
    slices = [RankSlice(24, rank, world_size, 100, 72) for rank in range(world_size)]

    for step in range(3):
        taken = [part.position(step * part.batch_size + offset) for part in slices for offset in range(part.batch_size)]
        assert taken == list(range(100 + 24 * step, 124 + 24 * step))
    assert {len(part) for part in slices} == {72 // world_size}


def test_an_impossible_slice_says_what_to_change() -> None:
    with pytest.raises(ConfigError, match="cannot be shared equally by 3 ranks"):
        RankSlice(8, 0, 3, 0, 8)
    with pytest.raises(ConfigError, match="no whole number of global batches of 8"):
        RankSlice(8, 0, 2, 0, 12)
    with pytest.raises(ConfigError, match="no such slice"):
        RankSlice(8, 2, 2, 0, 8)
