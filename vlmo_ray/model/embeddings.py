"""What enters the transformer: text and image embeddings, and the relative position bias."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmo_ray.config import ModelConfig
from vlmo_ray.errors import UserError
from vlmo_ray.rng import Noise, Noises


class TextEmbedding(nn.Module):
    """Word + token type (+ absolute position), LayerNorm, dropout (paper section 3.1, after BERT)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dropout = config.drop_path  # the released models tie the two rates
        self.word = nn.Embedding(config.vocab_size, config.width)
        # Row 0 is added to every token. Row 1, BERT's second sentence, is never read; released weights have it.
        self.token_type = nn.Embedding(2, config.width)
        self.position = None
        if config.position == "absolute":
            self.position = nn.Embedding(config.max_text_len, config.width)
        self.norm = nn.LayerNorm(config.width, eps=1e-12)

    def forward(self, ids: Tensor, noise: Noise | Noises | None = None, first: int = 0) -> Tensor:
        """`ids` int [B,T] -> [B,T,D]; without `noise` there is no dropout. They stand at `first` and after."""
        x = self.word(ids) + self.token_type.weight[0]
        if self.position is not None:
            if first + ids.shape[1] > len(self.position.weight):
                raise UserError(
                    f"The text has {first + ids.shape[1]} tokens, but the model has {len(self.position.weight)} text "
                    "positions: cut the text to that."
                )
            x = x + self.position.weight[first : first + ids.shape[1]]
        x = self.norm(x)
        if noise is not None and self.dropout > 0:
            uniform = noise.uniform("text_dropout", x.shape[1] * x.shape[2]).view_as(x)
            x = x * ((uniform >= self.dropout).to(x.dtype) / (1 - self.dropout))
        return x


class ImageEmbedding(nn.Module):
    """`[I_CLS]`, then projected patches row by row (+ absolute position); paper section 3.1."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.image_size = config.image_size
        self.patch = nn.Conv2d(3, config.width, kernel_size=config.patch_size, stride=config.patch_size)
        self.cls = nn.Parameter(torch.zeros(1, 1, config.width))
        self.position = None
        if config.position == "absolute":
            self.position = nn.Parameter(torch.zeros(1, 1 + config.num_patches, config.width))

    def forward(self, pixels: Tensor, masked: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """`pixels` [B,3,H,W] -> [B,P,D], P = 1 + patches. `mask_token` [1,1,D] takes the place of the patches that
        `masked` bool [B,P-1] names."""
        if pixels.shape[1:] != (3, self.image_size, self.image_size):
            raise UserError(
                f"The model takes images of shape (3, {self.image_size}, {self.image_size}), "
                f"not {tuple(pixels.shape[1:])}: resize them, or load the model at that image size."
            )
        patches = self.patch(pixels).flatten(2).transpose(1, 2)  # [B,D,h,w] -> [B,h*w,D]
        if masked is not None and mask_token is not None:
            patches = torch.where(masked[:, :, None], mask_token.to(patches.dtype), patches)
        x = torch.cat([self.cls.expand(len(patches), -1, -1).to(patches.dtype), patches], dim=1)
        return x if self.position is None else x + self.position


def relative_position_index(grid: int, text_len: int) -> Tensor:
    """The row of the bias table for every (query, key), int64 `[S,S]`, S = text_len + 1 + grid * grid, text first.

    The table has three blocks:

        image   (2 grid - 1)^2 + 3    two-dimensional distance, query minus key
        cross   2                     text-to-image, image-to-text
        text    2 text_len            distance, key minus query

    The last three rows of the image and text blocks are CLS-to-others (CLS is the query), others-to-CLS and
    CLS-to-itself. The signs of the two distances differ because the image rows come from BEiT.
    """
    side = 2 * grid - 1
    first_cross = side * side + 3
    first_text = first_cross + 2
    num_rows = first_text + 2 * text_len

    y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    y, x = y.flatten(), x.flatten()
    image = (y[:, None] - y[None, :] + grid - 1) * side + (x[:, None] - x[None, :] + grid - 1)
    image = _with_cls(image, first_cross)

    t = torch.arange(text_len - 1)
    text = first_text + (t[None, :] - t[:, None]) + (text_len - 2)
    text = _with_cls(text, num_rows)

    text_to_image = torch.full((len(text), len(image)), first_cross)
    return torch.cat([torch.cat([text, text_to_image], dim=1), torch.cat([text_to_image.T + 1, image], dim=1)], dim=0)


def _with_cls(distances: Tensor, end: int) -> Tensor:
    """Adds CLS in front: row `end - 3` where CLS is the query, `end - 2` where it is the key, `end - 1` where both."""
    index = F.pad(distances, (1, 0, 1, 0))
    index[0, 1:] = end - 3
    index[1:, 0] = end - 2
    index[0, 0] = end - 1
    return index


class RelativePositionBias(nn.Module):
    """One learned table of attention biases for all layers and heads, as in BEiT, with text rows added.

    `table` is `[rows, L*H]`: rows as in `relative_position_index`; columns l*H .. (l+1)*H belong to layer l.
    """

    index: Tensor  # [S,S], of the longest text and the image

    def __init__(self, config: ModelConfig):
        super().__init__()
        grid = config.image_size // config.patch_size
        self.depth, self.num_heads, self.text_len = config.depth, config.num_heads, config.bias_text_len
        index = relative_position_index(grid, config.bias_text_len)
        num_rows = (2 * grid - 1) ** 2 + 3 + 2 + 2 * config.bias_text_len
        self.table = nn.Parameter(torch.zeros(num_rows, config.depth * config.num_heads))
        self.register_buffer("index", index, persistent=False)

    def forward(self, text_len: int, image: bool = True, kept: Tensor | None = None) -> Tensor:
        """The bias `[L,H,S,S]` of all layers for `text_len` text tokens and, if `image`, then the image tokens: all,
        or those at `kept` int64 [P]."""
        if text_len > self.text_len:
            raise UserError(
                f"The text has {text_len} tokens, but the relative bias table has room for {self.text_len}: "
                "cut the text to that."
            )
        tokens = torch.arange(len(self.index), device=self.index.device)
        text, pictures = tokens[:text_len], tokens[self.text_len :] if image else tokens[:0]
        tokens = torch.cat([text, pictures if kept is None else pictures[kept]])
        index = self.index[tokens][:, tokens]
        bias = F.embedding(index, self.table)  # [S,S,L*H]
        return bias.permute(2, 0, 1).reshape(self.depth, self.num_heads, *index.shape)
