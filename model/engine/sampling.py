"""Chooses next tokens: greedy, or temperature and top-p with each request's own random numbers.

Outside a group, only its first codebook token may be sampled; inside one nothing is sampled at all, because the group
is committed whole. A row's choice depends on its own logits and generator only, never on what runs beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from pixellm.model.engine.types import GenerationOptions


@dataclass
class RowSampler:
    """One request's way to choose: its options and its random numbers."""

    options: GenerationOptions
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        if self.options.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(self.options.seed)

    def next_uniform(self) -> float:
        """The request's next random number in [0, 1)."""
        return float(torch.rand((), generator=self.generator))


def banned_tokens(vocab_size: int, codebook_token_ids: Sequence[int], other_ids: Sequence[int]) -> torch.Tensor:
    """Marks what must never be sampled outside a group.

    Args:
        vocab_size: V.
        codebook_token_ids: one group's ids; all but the first are banned.
        other_ids: ids that belong to prompts only, such as im_start and im_end.

    Returns:
        bool [V].
    """
    banned = torch.zeros(vocab_size, dtype=torch.bool)
    banned[[*codebook_token_ids[1:], *other_ids]] = True
    return banned


def sample_tokens(logits_BV: torch.Tensor, banned_V: torch.Tensor, samplers: Sequence[RowSampler]) -> list[int]:
    """Chooses one token per row.

    Args:
        logits_BV: [B, V] next-token logits.
        banned_V: bool [V], see `banned_tokens`.
        samplers: one per row.

    Returns:
        B ids.
    """
    logits = logits_BV.float().masked_fill(banned_V, float("-inf"))
    greedy = logits.argmax(-1)
    rows = [row for row, sampler in enumerate(samplers) if sampler.options.temperature > 0]
    if not rows:
        return greedy.tolist()
    temperature = logits.new_tensor([samplers[row].options.temperature for row in rows])
    top_p = logits.new_tensor([samplers[row].options.top_p for row in rows])
    uniform = logits.new_tensor([samplers[row].next_uniform() for row in rows])
    greedy[rows] = _sample_top_p(logits[rows] / temperature[:, None], top_p, uniform)
    return greedy.tolist()


def _sample_top_p(logits_RV: torch.Tensor, top_p_R: torch.Tensor, uniform_R: torch.Tensor) -> torch.Tensor:
    """Inverts the distribution function of the smallest set of tokens that reaches `top_p`."""
    probabilities, order = logits_RV.softmax(-1).sort(dim=-1, descending=True, stable=True)
    cumulative = probabilities.cumsum(-1)
    is_kept = cumulative - probabilities < top_p_R[:, None]
    kept = probabilities * is_kept
    cumulative = kept.cumsum(-1)
    wanted = uniform_R[:, None] * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, wanted, right=True).clamp_max(is_kept.sum(-1, keepdim=True) - 1)
    return order.gather(-1, place)[:, 0]
