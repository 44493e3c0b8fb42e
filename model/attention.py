"""SAM's two-way transformer: a few tokens and an image map that attend to each other (the pixel decoder's block).

Parameter names follow the released checkpoint, so that its weights need no surgery. Self-attention is of full width,
the cross-attentions of half of it; post-norm throughout.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention whose inner width may be smaller than its input's."""

    def __init__(self, size: int, inner_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(size, inner_size)
        self.k_proj = nn.Linear(size, inner_size)
        self.v_proj = nn.Linear(size, inner_size)
        self.out_proj = nn.Linear(inner_size, size)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attends from `[M, Q, C]` to `[M, P, C]`; returns `[M, Q, C]`."""
        query, key, value = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class MLPBlock(nn.Module):
    """Linear, ReLU, Linear."""

    def __init__(self, size: int, hidden_size: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(size, hidden_size)
        self.lin2 = nn.Linear(hidden_size, size)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[…, C]` to `[…, C]`."""
        return self.lin2(F.relu(self.lin1(x)))


class TwoWayBlock(nn.Module):
    """Tokens attend to each other, then to the image; an MLP; then the image attends to the tokens."""

    def __init__(self, size: int, num_heads: int, mlp_size: int, is_first: bool) -> None:
        super().__init__()
        self.is_first = is_first
        self.self_attn = Attention(size, size, num_heads)
        self.cross_attn_token_to_image = Attention(size, size // 2, num_heads)
        self.cross_attn_image_to_token = Attention(size, size // 2, num_heads)
        self.mlp = MLPBlock(size, mlp_size)
        self.norm1 = nn.LayerNorm(size)
        self.norm2 = nn.LayerNorm(size)
        self.norm3 = nn.LayerNorm(size)
        self.norm4 = nn.LayerNorm(size)

    def forward(self, tokens: Tensor, image: Tensor, token_pe: Tensor, image_pe: Tensor) -> tuple[Tensor, Tensor]:
        """Updates tokens `[M, Q, C]` and image `[M, P, C]`; positions are added to queries and keys."""
        if self.is_first:
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            query = tokens + token_pe
            tokens = tokens + self.self_attn(query, query, tokens)
        tokens = self.norm1(tokens)
        image_keys = image + image_pe
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + token_pe, image_keys, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.norm4(image + self.cross_attn_image_to_token(image_keys, tokens + token_pe, tokens))
        return tokens, image


class TwoWayTransformer(nn.Module):
    """A stack of two-way blocks and a last attention from tokens to the image."""

    def __init__(self, size: int, num_heads: int, mlp_size: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(size, num_heads, mlp_size, i == 0) for i in range(depth))
        self.final_attn_token_to_image = Attention(size, size // 2, num_heads)
        self.norm_final_attn = nn.LayerNorm(size)

    def forward(self, tokens_MQC: Tensor, image_MPC: Tensor, image_pe_PC: Tensor) -> tuple[Tensor, Tensor]:
        """Runs the stack.

        Args:
            tokens_MQC: `[M, Q, C]` tokens, which are also their own positions.
            image_MPC: `[M, P, C]` flattened image map.
            image_pe_PC: `[P, C]` its positions.

        Returns:
            Tokens `[M, Q, C]` and image `[M, P, C]`.
        """
        tokens, image = tokens_MQC, image_MPC
        for layer in self.layers:
            tokens, image = layer(tokens, image, tokens_MQC, image_pe_PC)
        attended = self.final_attn_token_to_image(tokens + tokens_MQC, image + image_pe_PC, image)
        return self.norm_final_attn(tokens + attended), image
