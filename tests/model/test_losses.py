"""Losses against loops written from the paper's formulas."""

import math

import pytest
import torch
from micro import micro_config

from pixellm.errors import DataError
from pixellm.model.losses import dice_losses, mean_over_targets, refinement_losses, text_loss, valid_pixels
from pixellm.model.objective import MaskTargets, mask_losses


def softplus_bce(logit: float, target: float) -> float:
    return max(logit, 0) - logit * target + math.log1p(math.exp(-abs(logit)))


def looped_refinement(logits, targets, questions, alpha, valid) -> list[float]:
    losses = []
    for k in range(len(logits)):
        total, count = 0.0, 0
        for y in range(logits.shape[1]):
            for x in range(logits.shape[2]):
                if not valid[k, y, x]:
                    continue
                predicted = sum(bool(logits[j, y, x] > 0) for j in range(len(logits)) if questions[j] == questions[k])
                a = alpha if predicted >= 2 else 1.0
                total += a * softplus_bce(float(logits[k, y, x]), float(targets[k, y, x]))
                count += 1
        losses.append(total / count)
    return losses


@pytest.fixture
def case() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 7, 6, generator=generator) * 3
    targets = (torch.rand(5, 7, 6, generator=generator) > 0.5).float()
    valid = torch.ones(5, 7, 6, dtype=torch.bool)
    valid[:2, 5:] = False
    return logits, targets, torch.tensor([1, 1, 0, 0, 0]), valid


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.5])
def test_the_refinement_loss_is_the_papers_with_overlap_counted_within_a_question(case, alpha: float) -> None:
    logits, targets, questions, valid = case
    got = refinement_losses(logits, targets, questions, alpha, valid)
    torch.testing.assert_close(got, torch.tensor(looped_refinement(logits, targets, questions, alpha, valid)))


def test_targets_of_different_questions_do_not_overlap() -> None:
    logits = torch.full((2, 3, 3), 2.0)
    targets, valid = torch.zeros(2, 3, 3), torch.ones(2, 3, 3, dtype=torch.bool)
    apart = refinement_losses(logits, targets, torch.tensor([0, 1]), 2.0, valid)
    together = refinement_losses(logits, targets, torch.tensor([4, 4]), 2.0, valid)
    torch.testing.assert_close(together, 2 * apart)


def test_padding_has_no_part_in_any_mask_loss(case) -> None:
    logits, targets, questions, valid = case
    changed = torch.where(valid, logits, logits + 50)
    flipped = torch.where(valid, targets, 1 - targets)
    for loss in (
        lambda m, t: refinement_losses(m, t, questions, 2.0, valid),
        lambda m, t: dice_losses(m, t, valid),
    ):
        torch.testing.assert_close(loss(logits, targets), loss(changed, flipped))


def test_dice_is_one_minus_twice_the_overlap_over_the_sum(case) -> None:
    logits, targets, _, valid = case
    for k, got in enumerate(dice_losses(logits, targets, valid)):
        p, t = logits[k][valid[k]].sigmoid().double() / 1000, targets[k][valid[k]].double()
        wanted = 1 - (2 * (p * t).sum() + 1e-6) / (p.sum() + t.sum() / 1000 + 1e-6)
        assert float(got) == pytest.approx(float(wanted), rel=1e-5)


def test_no_targets_cost_nothing() -> None:
    empty = torch.zeros(0, 4, 4)
    loss = refinement_losses(empty, empty, torch.zeros(0, dtype=torch.long), 2.0, empty.bool())
    assert float(mean_over_targets(loss)) == 0.0


def test_text_loss_is_the_mean_over_supervised_next_tokens() -> None:
    logits = torch.randn(2, 5, 9)
    labels = torch.tensor([[-100, 3, -100, 8, 0], [-100, -100, -100, -100, 4]])
    wanted = [
        -logits[b, t - 1].log_softmax(-1)[labels[b, t]] for b in range(2) for t in range(1, 5) if labels[b, t] >= 0
    ]
    torch.testing.assert_close(text_loss(logits, labels), torch.stack(wanted).mean())
    assert float(text_loss(logits, torch.full((2, 5), -100))) == 0.0


def test_valid_pixels_are_those_whose_centre_is_real() -> None:
    valid = valid_pixels(torch.tensor([[32, 16], [9, 32]]), torch.tensor([1, 0, 1]), 32, 8)
    assert valid.shape == (3, 8, 8)
    assert valid[0].sum(0).tolist() == [2] * 8  # rows with centres 2 and 6 lie above 9, centre 10 does not
    assert valid[1].sum(1).tolist() == [4] * 8


def test_masks_at_original_size_give_the_losses_of_upsampled_cropped_logits() -> None:
    config = micro_config(target_refinement_alpha=2.0, ref_loss_weight=2.0, dice_loss_weight=0.5)
    logits = torch.randn(3, 32, 32)
    masks = [(torch.rand(1, 11, 5) > 0.5).float(), (torch.rand(2, 9, 14) > 0.5).float()]
    valid_hw, original_hw = torch.tensor([[32, 15], [21, 32]]), torch.tensor([[11, 5], [9, 14]])
    targets = MaskTargets(masks, torch.tensor([0, 1, 1]), torch.tensor([0, 1, 1]), valid_hw, original_hw)
    got = mask_losses(logits, targets, config)
    ref, dice = [], []
    for picture, rows in ((0, [0]), (1, [1, 2])):
        height, width = valid_hw[picture].tolist()
        cropped = logits[rows][None, :, :height, :width]  # the canvas has the decoder's size here
        resized = torch.nn.functional.interpolate(cropped, original_hw[picture].tolist(), mode="bilinear")[0]
        everywhere = torch.ones_like(resized, dtype=torch.bool)
        questions = torch.zeros(len(rows), dtype=torch.long)
        ref += looped_refinement(resized, masks[picture], questions, 2.0, everywhere)
        dice += dice_losses(resized, masks[picture], everywhere).tolist()
    assert float(got["ref"]) == pytest.approx(2.0 * sum(ref) / 3, rel=1e-5)
    assert float(got["dice"]) == pytest.approx(0.5 * sum(dice) / 3, rel=1e-5)


def test_another_number_of_masks_than_groups_is_refused() -> None:
    rows = torch.tensor([0, 0])
    targets = MaskTargets(torch.zeros(3, 8, 8), rows, rows, torch.tensor([[32, 32]]))
    with pytest.raises(DataError, match="3 target masks for 2 codebook groups"):
        mask_losses(torch.zeros(2, 32, 32), targets, micro_config())
