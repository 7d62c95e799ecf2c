"""Multi-head self-attention, shared by all modalities."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The logit of padded keys. It is finite because a row without any real token (a record that could not be read) must not
# give NaN, which would reach the shared weights in the backward. Next to a real key the softmax is exactly 0.
PADDED = -1e4


class KeyValues:
    """Keys and values [B,S,H,d] of the tokens that one layer has seen, for tokens that come later."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def extended(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What is kept and then these, which are kept as well."""
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys], dim=1), torch.cat([self.values, values], dim=1)
        self.keys, self.values = keys, values
        return keys, values

    def update(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replaces what is kept: by some of its rows, or of its tokens."""
        assert self.keys is not None and self.values is not None, "nothing is kept yet"
        self.keys, self.values = change(self.keys), change(self.values)


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

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        padding: Tensor | None = None,
        read: int | None = None,
        memory: KeyValues | None = None,
    ) -> Tensor:
        """[B,S,D] -> [B,S,D], or [B,read,D]: only the first `read` tokens ask.

        `bias` [H,S,S] of this layer; `padding` bool [B,S], True for padded keys. With `memory`, keys and values are
        those in it and then those of `x`, without padding, and `bias` is [H,S,M+S].

        The bias is broadcast over the batch. A padded key has one more component, `PADDED`, which meets a 1 in every
        query. So no [B,H,S,S] exists: a sum of bias and padding would be kept by every layer for the backward.
        """
        weight, width, per_head = self.qkv.weight, len(self.q_bias), (self.num_heads, self.head_width)
        kv_bias = torch.cat([torch.zeros_like(self.v_bias), self.v_bias])
        if read is None:
            qkv = F.linear(x, weight, torch.cat([self.q_bias, kv_bias]))
            q, k, v = qkv.unflatten(-1, (3, *per_head)).unbind(2)  # [B,S,H,d]
        else:
            q = F.linear(x[:, :read], weight[:width], self.q_bias).unflatten(-1, per_head)
            k, v = F.linear(x, weight[width:], kv_bias).unflatten(-1, (2, *per_head)).unbind(2)
        if memory is not None:
            k, v = memory.extended(k, v)
        scale = self.head_width**-0.5
        # Fused kernels need head widths that are multiples of 8 (base_plus has 34). Zeros change no product.
        more = -self.head_width % 8 or (8 if padding is not None else 0)
        if padding is None:
            q, k, v = (F.pad(t, (0, more)) if more else t for t in (q, k, v))
        else:
            last = F.pad(torch.ones_like(k[..., :1]), (more - 1, 0))
            q = torch.cat([q, last[:, : q.shape[1]]], dim=-1)
            k = torch.cat([k, last * (padding[:, :, None, None] * (PADDED / scale)).to(k.dtype)], dim=-1)
            v = F.pad(v, (0, more)) if self.head_width % 8 else v.clone()  # a view would keep all of qkv
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B,H,S,d]
        added = None if bias is None else bias[:, :read].to(q.dtype)[None]  # [1,H,S,S]
        # The kernels compute logits and softmax in float32 whatever the dtype of their inputs.
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=scale)
        heads = heads[..., : self.head_width].transpose(1, 2).flatten(2)  # [B,H,S,d] -> [B,S,D]
        return self.out(heads)

    def weights(
        self, x: Tensor, bias: Tensor | None = None, padding: Tensor | None = None, read: int | None = None
    ) -> Tensor:
        """How much each token attends to each other, [B,H,S,S] or [B,H,read,S], which `forward` never holds; the
        arguments are those of `forward`."""
        width, per_head = len(self.q_bias), (self.num_heads, self.head_width)
        q = F.linear(x[:, :read], self.qkv.weight[:width], self.q_bias).unflatten(-1, per_head).transpose(1, 2)
        k = F.linear(x, self.qkv.weight[width : 2 * width]).unflatten(-1, per_head).transpose(1, 2)
        logits = q @ k.transpose(-2, -1) * self.head_width**-0.5
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = logits if bias is None else logits + bias[:, :read]
        logits = logits if padding is None else logits + padding[:, None, None] * PADDED
        return logits.softmax(dim=-1)

    def attended(self, x: Tensor, weights: Tensor) -> Tensor:
        """What `forward` gives for `x` [B,S,D] where these are the weights, in a form that can be differentiated by
        them."""
        v = F.linear(x, self.qkv.weight[2 * len(self.q_bias) :], self.v_bias)
        v = v.unflatten(-1, (self.num_heads, self.head_width)).transpose(1, 2)
        return self.out((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))
