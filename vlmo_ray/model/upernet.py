"""UperNet (Xiao et al. 2018) on the maps of a plain transformer, as BEiT fine-tunes it for ADE20K.

Where BEiT has synchronised batch norm there are group norms here, of as many parameters: a row's loss must not depend
on the other rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_POOLS = (1, 2, 3, 6)
_GROUPS = 32


def _norm(channels: int) -> nn.GroupNorm:
    """Groups of at least eight channels: alone, a channel pooled to one value would be normalised to 0."""
    return nn.GroupNorm(math.gcd(_GROUPS, channels, max(1, channels // 8)), channels)


class ConvNorm(nn.Sequential):
    """Convolution, norm, ReLU; [B,C,h,w] -> [B,C',h,w]."""

    def __init__(self, inputs: int, outputs: int, kernel: int):
        conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        super().__init__(conv, _norm(outputs), nn.ReLU())


class Pyramid(nn.Module):
    """Four maps [B,D,g,g] of patches -> maps of 4, 2, 1 and 1/2 times the side."""

    def __init__(self, width: int):
        super().__init__()
        twice = [nn.ConvTranspose2d(width, width, 2, 2) for _ in range(3)]
        self.four = nn.Sequential(twice[0], _norm(width), nn.GELU(), twice[1])
        self.two = twice[2]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        first, second, third, fourth = maps
        return [self.four(first), self.two(second), third, F.max_pool2d(fourth, 2)]


class UperNet(nn.Module):
    """Pyramid pooling on the smallest map, then a feature pyramid; logits at 4 times the side of the patches' map.

    An auxiliary head reads the third map, for a loss of its own.
    """

    def __init__(self, width: int, channels: int, num_classes: int, auxiliary: int = 256):
        super().__init__()
        self.pyramid = Pyramid(width)
        self.pools = nn.ModuleList(ConvNorm(width, channels, 1) for _ in _POOLS)
        self.pooled = ConvNorm(width + len(_POOLS) * channels, channels, 3)
        self.laterals = nn.ModuleList(ConvNorm(width, channels, 1) for _ in range(3))
        self.smooth = nn.ModuleList(ConvNorm(channels, channels, 3) for _ in range(3))
        self.joined = ConvNorm(4 * channels, channels, 3)
        self.classes = nn.Conv2d(channels, num_classes, 1)
        self.auxiliary = ConvNorm(width, auxiliary, 3)
        self.auxiliary_classes = nn.Conv2d(auxiliary, num_classes, 1)

    def forward(
        self, maps: Sequence[Tensor], keep: Tensor | None = None, keep_auxiliary: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Four maps [B,D,g,g] -> logits [B,K,4g,4g] and auxiliary ones [B,K,g,g].

        `keep` [B,C] and `keep_auxiliary` [B,C'] are factors of dropout by channel, before the classifiers.
        """
        *fine, coarse = self.pyramid(maps)
        pools = [conv(F.adaptive_avg_pool2d(coarse, size)) for size, conv in zip(_POOLS, self.pools, strict=True)]
        top = self.pooled(torch.cat([coarse, *(_to(pool, coarse) for pool in pools)], dim=1))
        levels = [lateral(level) for lateral, level in zip(self.laterals, fine, strict=True)]
        above = top
        for index in (2, 1, 0):
            above = levels[index] = levels[index] + _to(above, levels[index])
        levels = [smooth(level) for smooth, level in zip(self.smooth, levels, strict=True)]
        joined = self.joined(torch.cat([levels[0], *(_to(level, levels[0]) for level in (*levels[1:], top))], dim=1))
        aside = self.auxiliary(maps[2])
        return self.classes(_dropped(joined, keep)), self.auxiliary_classes(_dropped(aside, keep_auxiliary))


def resized(logits: Tensor, height: int, width: int) -> Tensor:
    """[B,K,h,w] -> [B,K,height,width], bilinear."""
    return F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)


def _to(x: Tensor, like: Tensor) -> Tensor:
    return resized(x, *like.shape[2:])


def _dropped(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x * keep[:, :, None, None].to(x.dtype)
