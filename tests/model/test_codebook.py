"""Groups are found exactly, read one position early, and fused as the paper's φ."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from pixellm.model.codebook import MeanFusion, SegmentationCodebook, TokenFusion, find_groups, gather_groups

CODEBOOK = [7, 8, 9]


@given(st.lists(st.lists(st.integers(5, 10), min_size=2, max_size=24), min_size=1, max_size=3))
def test_groups_are_the_complete_runs_in_order(rows: list[list[int]]) -> None:
    length = max(len(row) for row in rows)
    padded = [row + [0] * (length - len(row)) for row in rows]
    wanted = [(r, i) for r, row in enumerate(padded) for i in range(length - 2) if row[i : i + 3] == CODEBOOK]
    found = find_groups(torch.tensor(padded), CODEBOOK)
    assert list(zip(found[0].tolist(), found[1].tolist(), strict=True)) == wanted


def test_hidden_states_are_those_that_predict_the_tokens() -> None:
    hidden = torch.arange(2 * 11 * 4.0).view(2, 11, 4)
    groups = gather_groups(hidden, torch.tensor([1, 0]), torch.tensor([4, 1]), 3)
    torch.testing.assert_close(groups[0], hidden[1, 3:6])
    torch.testing.assert_close(groups[1], hidden[0, 0:3])


def test_learned_fusion_is_a_linear_layer_per_scale() -> None:
    fusion = TokenFusion(3, 2, 5)
    torch.nn.init.normal_(fusion.weight)
    hidden = torch.randn(4, 2, 3, 5)
    fused = fusion(hidden)
    for scale in range(2):
        linear = torch.nn.Linear(15, 5, bias=False)
        linear.weight.data = fusion.weight.data[scale]
        torch.testing.assert_close(fused[:, scale], linear(hidden[:, scale].reshape(4, 15)))


def test_both_fusions_start_equal_and_only_one_has_weights() -> None:
    for tokens_per_scale in (1, 2, 3, 4):
        for num_scales in (1, 2, 3):
            learned, mean = TokenFusion(tokens_per_scale, num_scales, 6), MeanFusion(tokens_per_scale, num_scales)
            hidden = torch.randn(5, num_scales, tokens_per_scale, 6)
            torch.testing.assert_close(learned(hidden), mean(hidden))
            assert learned.weight.requires_grad
            assert not list(mean.parameters())


def test_tokens_belong_to_scales_in_order() -> None:
    codebook = SegmentationCodebook(10, 6, 3, 2, "mean")
    hidden = torch.randn(2, 6, 10)
    changed = hidden.clone()
    changed[:, 3:] += 1  # the second scale's tokens
    before, after = codebook(hidden), codebook(changed)
    torch.testing.assert_close(before[:, 0], after[:, 0])
    assert not torch.allclose(before[:, 1], after[:, 1])
