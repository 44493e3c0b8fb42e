"""From rows to training examples."""

import pickle

import numpy as np
import pytest
from micro_run import MICRO

from pixellm.jobs.train.encode import SampleEncoder
from pixellm.model.processing import PixelLMProcessor
from pixellm.platform.data.compose import ComposeLimits, Dialogue, QuestionSource, Turn
from pixellm.platform.data.order import Draw, MixtureOrder
from pixellm.platform.masks import rle_decode


@pytest.fixture(scope="module")
def encoder() -> SampleEncoder:
    return SampleEncoder(PixelLMProcessor.for_preset("tiny", **MICRO), mask_size=28)


def test_masks_come_in_the_order_of_the_markers(encoder: SampleEncoder, demo_shards: dict[str, str]) -> None:
    source = QuestionSource.open(demo_shards["segmentation"], "segmentation", ComposeLimits(3, 1, 0.01))
    row, _ = source.sample(Draw(0, 0, 0, 0, 7))
    big = [number for number, target in enumerate(row.targets) if target.area > 0.02 * row.height * row.width][:2]
    assert len(big) == 2
    turn = Turn("Where are they?", "Here {seg} and there {seg}.", tuple(big))
    forward = encoder(row, Dialogue("segmentation", (turn,)), Draw(0, 0, 0, 0, 7))
    backward = encoder(
        row, Dialogue("segmentation", (turn._replace(target_indices=tuple(big[::-1])),)), Draw(0, 0, 0, 0, 7)
    )
    assert np.array_equal(forward.masks, backward.masks[::-1])
    scale = 28 / max(row.height, row.width)
    for mask, number in zip(forward.masks, big, strict=True):
        wanted = rle_decode(row.targets[number].mask).sum() * scale**2
        assert abs(mask.sum() - wanted) < 0.35 * wanted + 4
    assert forward.sample_id == f"{row.source}/{row.image_id}"


def test_each_kind_of_question_gives_one_group_per_target(encoder: SampleEncoder, demo_shards: dict[str, str]) -> None:
    limits = ComposeLimits(3, 2, 0.01)
    groups = ("segmentation", "vqa", "muse")
    sources = [QuestionSource.open(demo_shards[group], group, limits) for group in groups]  # type: ignore[arg-type]
    order = MixtureOrder([len(source) for source in sources], [2, 2, 4], 0)
    codebook = encoder.processor.token_ids.codebook
    for draw in order.draws(0, 24):
        row, dialogue = sources[draw.source].sample(draw)
        example = encoder(row, dialogue, draw)
        assert example.kind == groups[draw.source]
        assert len(example.masks) == int((example.input_ids == codebook[0]).sum())
        assert (len(example.masks) == 0) == (example.kind == "vqa")
        assert (example.labels != -100).any()


def test_the_encoder_travels_to_other_processes(encoder: SampleEncoder, demo_shards: dict[str, str]) -> None:
    copy = pickle.loads(pickle.dumps(encoder))
    source = QuestionSource.open(demo_shards["muse"], "muse", ComposeLimits(5, 1, 0.0))
    draw = Draw(0, 0, 0, 0, 3)
    row, dialogue = source.sample(draw)
    one, other = encoder(row, dialogue, draw), copy(row, dialogue, draw)
    assert np.array_equal(one.input_ids, other.input_ids)
    assert np.array_equal(one.pixels, other.pixels)


def test_what_is_kept_changes_nothing_and_is_bounded(encoder: SampleEncoder, demo_shards: dict[str, str]) -> None:
    source = QuestionSource.open(demo_shards["segmentation"], "segmentation", ComposeLimits(3, 1, 0.01))
    order = MixtureOrder([len(source)], [1], 5)
    kept = SampleEncoder(encoder.processor, 28)
    kept._recent._max_bytes = 8 * 56 * 56 * 3  # eight pictures
    for draw in order.draws(0, 60):
        row, dialogue = source.sample(draw)
        turns = [(turn.question, turn.answer, len(turn.target_indices)) for turn in dialogue.turns]
        masks = [rle_decode(row.targets[index].mask) for index in dialogue.target_indices]
        fresh = encoder.processor.encode_sample(
            row.image, turns, masks, 28, f"{row.source}/{row.image_id}", "segmentation"
        )
        for one in (kept(row, dialogue, draw), kept(row, dialogue, draw)):
            for name in ("masks", "input_ids", "labels", "valid_hw", "original_hw"):
                assert np.array_equal(getattr(one, name), getattr(fresh, name)), name
            assert np.abs(one.pixels.astype(int) - fresh.pixels).max() <= 1
        assert kept._recent._num_bytes <= kept._recent._max_bytes
