"""Chooses next tokens: greedy, or temperature and top-p with each request's own random numbers.

Outside a group, only its first codebook token may be sampled; inside one nothing is sampled at all, because the group
is committed whole. A row's choice depends on its own logits and generator only, never on what runs beside it: adding
Gumbel noise and taking the best draws from the softmax, and rounding noise in the logits hardly ever changes the best.
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

    def next_gumbel(self, vocab_size: int) -> torch.Tensor:
        """The request's next random numbers, fp32 [V], distributed as Gumbel(0, 1)."""
        uniform = torch.rand(vocab_size, generator=self.generator, dtype=torch.float64)
        return -(-uniform.clamp_min(torch.finfo(torch.float64).tiny).log()).log().float()


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
    noise = torch.stack([samplers[row].next_gumbel(logits.shape[-1]) for row in rows]).to(logits.device)
    kept = _keep_top_p(logits[rows] / temperature[:, None], top_p)
    greedy[rows] = (kept + noise).argmax(-1)
    return greedy.tolist()


def _keep_top_p(logits_RV: torch.Tensor, top_p_R: torch.Tensor) -> torch.Tensor:
    """Sets what lies outside the smallest set of tokens that reaches `top_p` to −inf."""
    probabilities, order = logits_RV.softmax(-1).sort(dim=-1, descending=True, stable=True)
    is_kept = probabilities.cumsum(-1) - probabilities < top_p_R[:, None]
    return logits_RV.masked_fill(~torch.zeros_like(is_kept).scatter(-1, order, is_kept), float("-inf"))
