"""One layer of the Mixture-of-Modality-Experts transformer: paper section 3.2, equations (1) and (2)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmo_ray.config import ModelConfig
from vlmo_ray.model.attention import KeyValues, SelfAttention

# Which expert processes the tokens: one expert for all of them, or ("pair") the language expert for the text tokens and
# the vision expert for the image tokens, as in a pair pass below the first vision-language layer.
Route = Literal["text", "image", "vl", "pair"]


class LayerNorm(nn.LayerNorm):
    """In the precision of its input, whatever that of its weights, which sharded workers may gather in bf16."""

    def forward(self, input: Tensor) -> Tensor:
        kind = input.dtype
        return F.layer_norm(input, self.normalized_shape, self.weight.to(kind), self.bias.to(kind), self.eps)


class Expert(nn.Module):
    """A feed-forward network with its own LayerNorm: V-FFN, L-FFN or VL-FFN."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = LayerNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class MoMELayer(nn.Module):
    """Shared self-attention, then an expert chosen by modality; layers from `vl_start` have a third one.

    Two ablations of the paper change that: one expert for everything, and texts with attention of their own.
    """

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.attention_norm = LayerNorm(config.width, eps=1e-6)
        self.attention = SelfAttention(config.width, config.num_heads)
        # Table 7: below the vision-language layers no text token attends to an image, nor the other way round
        separate = config.attention == "separate" and index < config.vl_start
        self.text_attention = SelfAttention(config.width, config.num_heads) if separate else None
        names = ("text", "image", "vl") if index >= config.vl_start else ("text", "image")
        self.one = config.experts == "one"
        names = ("all",) if self.one else names
        self.experts = nn.ModuleDict({name: Expert(config.width) for name in names})
        self.attention_scale = self.expert_scale = None  # LayerScale
        if config.layer_scale is not None:
            self.attention_scale = nn.Parameter(torch.full((config.width,), config.layer_scale))
            self.expert_scale = nn.Parameter(torch.full((config.width,), config.layer_scale))

    def forward(
        self,
        x: Tensor,
        route: Route,
        *,
        num_text: int = 0,
        read: int | None = None,
        bias: Tensor | None = None,
        padding: Tensor | None = None,
        keep: Tensor | None = None,
        memory: KeyValues | None = None,
    ) -> Tensor:
        """[B,S,D] -> [B,S,D], or [B,read,D]: the first tokens alone, to which the others are only keys and values.

        `num_text` is the number of text tokens of a "pair". `bias` [H,S,S] and `padding` [B,S] are as in
        `SelfAttention`. `keep` [B,3] holds each row's drop path factors, 0 or 1/(1 - rate): of the attention, of the
        expert, and of the vision expert of a "pair". None: no drop path. `memory`: what `x` attends to before itself.
        """
        keep_attention = keep_expert = keep_image = None
        if keep is not None:
            keep_attention, keep_expert, keep_image = keep[:, :, None, None].unbind(1)  # each [B,1,1]

        # (1)  H' = MSA(LN(H)) + H
        if memory is None:
            attended = self._attend(self.attention_norm(x), route, num_text, read, bias, padding)
        else:
            attended = self.attention(self.attention_norm(x), bias, memory=memory)
        x = x[:, :read] + _branch(attended, self.attention_scale, keep_attention)

        # (2)  H = MoME-FFN(LN(H')) + H'
        if route == "pair" and not self.one:
            text, image = x[:, :num_text], x[:, num_text:]
            text = text + _branch(self.experts["text"](text), self.expert_scale, keep_expert)
            image = image + _branch(self.experts["image"](image), self.expert_scale, keep_image)
            return torch.cat([text, image], dim=1)
        return x + _branch(self.experts["all" if self.one else route](x), self.expert_scale, keep_expert)

    def _attend(
        self, x: Tensor, route: Route, num_text: int, read: int | None, bias: Tensor | None, padding: Tensor | None
    ) -> Tensor:
        if self.text_attention is None or route == "image":
            return self.attention(x, bias, padding, read)
        if route == "text":
            return self.text_attention(x, bias, padding, read)
        text, image = (slice(0, num_text), slice(num_text, None))
        own_bias = None if bias is None else bias[:, text, text]
        own_padding = None if padding is None else padding[:, text]
        attended = self.text_attention(x[:, text], own_bias, own_padding)
        own_bias = None if bias is None else bias[:, image, image]
        return torch.cat([attended, self.attention(x[:, image], own_bias)], dim=1)[:, :read]


def _branch(x: Tensor, layer_scale: Tensor | None, keep: Tensor | None) -> Tensor:
    if layer_scale is not None:
        x = x * layer_scale
    return x if keep is None else x * keep
