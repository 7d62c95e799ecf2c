"""Multi-head self-attention, shared by all modalities."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Added to the logits of padded keys. It is finite because a row without any real token (a record that could not be
# read) must not give NaN, which would reach the shared weights in the backward. Next to a real key the softmax is 0.
PADDED = -1e30


class SelfAttention(nn.Module):
    """Scaled dot-product attention with an additive bias. Queries and values have a bias vector, keys do not."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.head_width = width // num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
        """[B,S,D] -> [B,S,D]; `bias` [H,S,S] of this layer; `padding` [B,1,1,S], 0 or `PADDED` per key."""
        qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, qkv_bias)
        qkv = qkv.unflatten(-1, (3, self.num_heads, self.head_width))
        if self.head_width % 8:
            # Fused kernels need head widths that are multiples of 8 (base_plus has 34). Zeros change no product.
            qkv = F.pad(qkv, (0, -self.head_width % 8))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B,S,3,H,d] -> 3 x [B,H,S,d]
        added = None  # [B,H,S,S]; [1,H,S,S] without padding; [B,1,S,S] without relative positions
        if bias is not None:
            added = bias.to(q.dtype)[None]
        if padding is not None:
            padding = padding.to(q.dtype)
            added = padding.expand(-1, -1, x.shape[1], -1) if added is None else added + padding
        # The kernels compute logits and softmax in float32 whatever the dtype of their inputs.
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=self.head_width**-0.5)
        heads = heads[..., : self.head_width].transpose(1, 2).flatten(2)  # [B,H,S,d] -> [B,S,D]
        return self.out(heads)
