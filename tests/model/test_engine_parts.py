"""The engine's parts, each against arithmetic written out here: sampling, caches, stop strings, target descriptions."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pixellm.errors import (
    ConfigError,
)
from pixellm.model.engine import (
    GenerationOptions,
)
from pixellm.model.engine.answer_state import AnswerState
from pixellm.model.engine.kv_cache import SlotCache
from pixellm.model.engine.picture_cache import PictureCache, picture_digest
from pixellm.model.engine.sampling import RowSampler, banned_tokens, sample_tokens
from pixellm.model.engine.targets import finish_targets
from pixellm.model.images import PreparedImage, prepare_image


def test_score_and_threshold_are_of_the_probabilities_at_the_pictures_own_size() -> None:
    logits = torch.linspace(-4, 4, 16).reshape(1, 4, 4)
    picture = PreparedImage(np.zeros((4, 4, 3), np.uint8), (4, 4), (4, 4))
    for threshold in (0.2, 0.5, 0.9):
        (target,) = finish_targets(
            logits,
            picture,
            options=GenerationOptions(threshold=threshold, keep_logits=True),
            first_index=3,
            phrases=["x"],
        )
        probability = 1 / (1 + np.exp(-logits[0].numpy()))
        np.testing.assert_array_equal(target.mask, probability > threshold)
        assert target.score == pytest.approx(probability[probability > threshold].mean(), rel=1e-5)
        assert (target.index, target.phrase) == (3, "x")
        np.testing.assert_allclose(target.mask_logits, logits[0])


class Letters:
    """A tokenizer double: token i is the letter i."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(i) for i in ids)


@given(text=st.text("ab", max_size=30), stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_where_the_first_complete_one_begins(text: str, stops: list[str]) -> None:
    from pixellm.model.answers import AnswerReader

    state = AnswerState(AnswerReader(Letters()), GenerationOptions(stop=tuple(stops)), [1000, 1001], 2, 100)
    streamed = ""
    for letter in text:
        state.choose(ord(letter))
        streamed += state.add_word(ord(letter))
        if state.stop_reason:
            break
    streamed += state.finish()
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    shortest = min((end for end, _ in ends), default=None)
    expected = text if shortest is None else text[: min(start for end, start in ends if end == shortest)]
    assert streamed == state.text == expected


def test_greedy_sampling_takes_the_best_allowed_token() -> None:
    logits = torch.zeros(2, 20)
    logits[0, [11, 12, 4]] = torch.tensor([9.0, 8.0, 7.0])
    logits[1, [10, 3]] = torch.tensor([5.0, 4.0])
    banned = banned_tokens(20, [10, 11, 12], [13])
    assert banned.nonzero().flatten().tolist() == [11, 12, 13]
    assert sample_tokens(logits, banned, [RowSampler(GenerationOptions())] * 2) == [4, 10]


def test_sampling_follows_temperature_and_top_p() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 3.0]])
    banned = torch.tensor([False, False, False, False, True])
    options = GenerationOptions(temperature=0.7, top_p=0.9, seed=3)
    sampler = RowSampler(options)
    drawn = [sample_tokens(logits, banned, [sampler])[0] for _ in range(3000)]
    weights = np.exp(np.array([2.0, 1.0, 0.0, -1.0]) / 0.7)
    weights /= weights.sum()
    kept = np.cumsum(weights) - weights < 0.9
    expected = weights * kept / (weights * kept).sum()
    assert set(drawn) == set(np.flatnonzero(kept))
    counts = np.bincount(drawn, minlength=4)[kept]
    assert stats.chisquare(counts, expected[kept] * len(drawn)).pvalue > 1e-3


def test_a_rows_draw_does_not_depend_on_its_neighbours() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    banned = torch.zeros(50, dtype=torch.bool)

    def samplers() -> list[RowSampler]:
        return [
            RowSampler(GenerationOptions(temperature=t, top_p=0.8, seed=i)) for i, t in enumerate((1.0, 0.0, 2.0, 0.5))
        ]

    together = sample_tokens(logits, banned, samplers())
    alone = [sample_tokens(logits[i : i + 1], banned, [sampler])[0] for i, sampler in enumerate(samplers())]
    assert together == alone


def test_cache_rows_grow_move_and_come_back() -> None:
    cache = SlotCache(3, 1000, torch.device("cpu"))
    rows = [cache.allocate() for _ in range(3)]
    assert rows == [0, 1, 2]
    with pytest.raises(ConfigError, match="max_batch_size"):
        cache.allocate()
    cache.begin_row(2, 0, 5)
    keys = torch.randn(1, 4, 5, 8)
    assert torch.equal(cache.update(keys, keys + 1, 0)[0], keys)
    cache.mark_valid(2, torch.tensor([True, False, True]))
    cache.release(0)
    cache.move(2, 0)
    cache.begin_rows(torch.tensor([0]), torch.tensor([5]), 300, 305)
    more = torch.randn(1, 4, 300, 8)
    got, values = cache.update(more, more + 1, 0)
    torch.testing.assert_close(got, torch.cat([keys, more], dim=2))
    torch.testing.assert_close(values, got + 1)
    allowed = cache.allowed_keys()
    assert allowed.shape == (1, 300, 305)
    assert not allowed[:, :, 1].any()
    assert allowed[0, 0].sum() == 5
    assert cache.capacity >= 305
    states = cache.export_row(0, 5)
    cache.import_row(1, states)
    cache.begin_row(1, 5, 1)
    one = torch.randn(1, 4, 1, 8)
    torch.testing.assert_close(cache.update(one, one, 0)[0][:, :, :5], keys)
    assert cache.allocate() == 2


def test_the_cache_says_when_no_forward_was_announced() -> None:
    with pytest.raises(ConfigError, match="begin_row"):
        SlotCache(1, 10, torch.device("cpu")).update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), 0)


def test_the_picture_cache_keeps_its_bound_and_forgets_the_least_recent(micro: Any, pictures: Any) -> None:
    model, processor = micro
    prepared = [prepare_image(picture, 84) for picture in pictures]
    digests = [picture_digest(picture) for picture in prepared]
    assert len(set(digests)) == 5
    with torch.inference_mode():
        valid = torch.tensor([p.valid_hw for p in prepared])
        features = model.encode_images(processor.normalise(np.stack([p.pixels for p in prepared]), valid), valid)
    one = features.index(0)
    size = sum(t.numel() * t.element_size() for t in (one.image_tokens, one.token_valid, one.scales))
    cache = PictureCache(int(size * 2.5))
    for place in range(3):
        cache.add_features(digests[place], features.index(place))
        assert cache.num_bytes <= cache.max_bytes
    assert cache.features(digests[0]) is None
    assert cache.features(digests[1]) is not None
    cache.add_features(digests[3], features.index(3))
    assert cache.features(digests[2]) is None
    assert (len(cache), cache.num_hits, cache.num_misses) == (2, 1, 2)
    nothing = PictureCache(0)
    nothing.add_features(digests[0], features.index(0))
    assert len(nothing) == nothing.num_bytes == 0
