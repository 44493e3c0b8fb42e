"""From hidden states of codebook tokens to one embedding per target and scale (paper Sec. 3.1, φ).

Every hidden state goes through a shared two-layer head into the decoder's width; the N of a scale are then fused into
one. The released code fuses with the constant 1/(N·L); here φ is a linear layer that starts as exactly that.
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from pixellm.errors import DataError


class TokenFusion(nn.Module):
    """φ: one linear layer per scale over the N tokens of a group, `h^ℓ = φ^ℓ(h_1 … h_N)`."""

    def __init__(self, tokens_per_scale: int, num_scales: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_scales, size, tokens_per_scale * size))
        self.start = released_fusion_weight(tokens_per_scale, num_scales)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts as the released constant: the token embeddings summed and divided by N·L."""
        num_scales, size, width = self.weight.shape
        identity = torch.eye(size, device=self.weight.device).repeat(1, width // size) * self.start
        with torch.no_grad():
            init.copy_(self.weight, identity.expand(num_scales, -1, -1))

    def forward(self, hidden_MGKC: Tensor) -> Tensor:
        """Fuses `[M, G, K, C]` to `[M, G, C]`."""
        return torch.einsum("mgi,goi->mgo", hidden_MGKC.flatten(2), self.weight)


class MeanFusion(nn.Module):
    """The released constant φ, without parameters."""

    def __init__(self, tokens_per_scale: int, num_scales: int) -> None:
        super().__init__()
        self.scale = released_fusion_weight(tokens_per_scale, num_scales)

    def forward(self, hidden_MGKC: Tensor) -> Tensor:
        """Fuses `[M, G, K, C]` to `[M, G, C]`."""
        return hidden_MGKC.sum(2) * self.scale


def released_fusion_weight(tokens_per_scale: int, num_scales: int) -> float:
    """1/(N·L), or 1 where there is one token per scale and nothing to fuse."""
    return 1.0 if tokens_per_scale == 1 else 1.0 / (tokens_per_scale * num_scales)


class SegmentationCodebook(nn.Module):
    """Hidden states of one group's N·L tokens → one embedding per scale."""

    def __init__(self, text_size: int, size: int, tokens_per_scale: int, num_scales: int, fusion: str) -> None:
        super().__init__()
        self.shape = (num_scales, tokens_per_scale)
        self.head = nn.Sequential(nn.Linear(text_size, text_size), nn.ReLU(), nn.Linear(text_size, size))
        self.fusion = (
            TokenFusion(tokens_per_scale, num_scales, size)
            if fusion == "learned"
            else MeanFusion(tokens_per_scale, num_scales)
        )

    def forward(self, hidden_MJD: Tensor) -> Tensor:
        """Embeds groups.

        Args:
            hidden_MJD: `[M, G·K, D]` language-model states at the positions that predict the group's tokens.

        Returns:
            `[M, G, C]`, scale 0 (deepest) first.
        """
        hidden_MJC = self.head(hidden_MJD)
        return self.fusion(hidden_MJC.unflatten(1, self.shape))


def find_groups(input_ids: Tensor, codebook_token_ids: list[int]) -> tuple[Tensor, Tensor]:
    """Finds every complete codebook group.

    Args:
        input_ids: `[B, L]` long.
        codebook_token_ids: the J ids of one group in order.

    Returns:
        Rows `[M]` and positions `[M]` of the groups' first tokens, in order of appearance, row by row.
    """
    size = len(codebook_token_ids)
    if input_ids.shape[1] < size:
        empty = input_ids.new_zeros(0)
        return empty, empty
    wanted = input_ids.new_tensor(codebook_token_ids)
    rows, positions = (input_ids.unfold(1, size, 1) == wanted).all(-1).nonzero(as_tuple=True)
    return rows, positions


def gather_groups(hidden_BLD: Tensor, rows: Tensor, positions: Tensor, size: int) -> Tensor:
    """Collects each group's hidden states at the positions that PREDICT its tokens (a shift of −1).

    Args:
        hidden_BLD: `[B, L, D]` after the final norm.
        rows: `[M]` batch row of each group.
        positions: `[M]` position of each group's first token (at least 1).
        size: J, tokens of a group.

    Returns:
        `[M, J, D]`.
    """
    steps = torch.arange(size, device=positions.device) - 1
    return hidden_BLD[rows[:, None], positions[:, None] + steps]


def match_groups(input_ids: Tensor, codebook_token_ids: list[int], target_rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Finds the groups and puts them in the order of the targets.

    Args:
        input_ids: `[B, L]` long.
        codebook_token_ids: the J ids of one group in order.
        target_rows: `[M]` long, row of each target, in order of appearance within a row; None keeps row by row.

    Returns:
        Rows `[M]` and positions `[M]` of the groups' first tokens.

    Raises:
        DataError: a row whose number of groups differs from its number of targets.
    """
    rows, positions = find_groups(input_ids, codebook_token_ids)
    if target_rows is None:
        return rows, positions
    num_rows = max(len(input_ids), int(target_rows.max()) + 1 if len(target_rows) else 0)
    found = torch.bincount(rows, minlength=num_rows)
    wanted = torch.bincount(target_rows, minlength=num_rows)
    if differing := (found != wanted).nonzero().flatten().tolist():
        row = differing[0]
        raise DataError(
            f"row {row} has {int(found[row])} codebook groups and {int(wanted[row])} targets; every target needs "
            "one group of all codebook tokens in the row's answer"
        )
    appearance = torch.argsort(target_rows, stable=True)
    order = torch.empty_like(appearance).scatter_(0, appearance, torch.arange(len(rows), device=rows.device))
    return rows[order], positions[order]
