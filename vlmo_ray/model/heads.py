"""Heads on the encoder: contrastive projections, pooler, masked words, classifiers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ContrastHead(nn.Module):
    """Projections of both CLS states into one space, and a learned temperature: paper equations (3), (4).

    The scalars have shape [1] because FSDP2 shards along the first axis and refuses 0-d tensors.
    """

    def __init__(self, width: int, with_bias: bool = False):
        super().__init__()
        self.image_projection = nn.Linear(width, width, bias=False)
        self.text_projection = nn.Linear(width, width, bias=False)
        self.log_scale = nn.Parameter(torch.zeros(1))  # log of 1 / temperature
        self.logit_bias = nn.Parameter(torch.zeros(1)) if with_bias else None  # of the sigmoid contrast

    def image(self, cls: Tensor) -> Tensor:
        """`[I_CLS]` states [B,D] -> [B,D] of length 1, in float32 or wider."""
        return _unit(self.image_projection(cls))

    def text(self, cls: Tensor) -> Tensor:
        """`[T_CLS]` states [B,D] -> [B,D] of length 1, in float32 or wider."""
        return _unit(self.text_projection(cls))


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


class Pooler(nn.Module):
    """Linear + tanh on the `[T_CLS]` state of a pair."""

    def __init__(self, width: int):
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, cls: Tensor) -> Tensor:
        """[B,D] -> [B,D]."""
        return torch.tanh(self.dense(cls))


class MaskedWordHead(nn.Module):
    """BERT's masked language model head: dense, GELU, LayerNorm, and a decoder that is not tied to the embeddings."""

    def __init__(self, width: int, vocab_size: int):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.decoder = nn.Linear(width, vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        """States [M,D] of the masked positions only -> logits [M,vocab]."""
        return self.decoder(self.hidden(x))

    def hidden(self, x: Tensor) -> Tensor:
        """What the decoder reads, [M,D]."""
        return self.norm(F.gelu(self.dense(x)))


class ClassifierHead(nn.Module):
    """Linear, LayerNorm, GELU, Linear: VQA from one pooled pair (D inputs), NLVR2 from two of them (2D)."""

    def __init__(self, inputs: int, hidden: int, num_classes: int):
        super().__init__()
        self.hidden = nn.Linear(inputs, hidden)
        self.norm = nn.LayerNorm(hidden, eps=1e-5)
        self.out = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B,inputs] -> logits [B,num_classes]."""
        return self.out(F.gelu(self.norm(self.hidden(x))))
