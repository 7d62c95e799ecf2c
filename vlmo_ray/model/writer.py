"""Writing a text about an image, token by token: a cache of keys and values, and beam search.

The next token is read from a [MASK] after those written so far, as masked words were trained (UniLM, Dong et al. 2019,
section 2.3): every step asks with the last token, which stays in the cache, and with a new [MASK], which does not.
Image tokens do not attend to the text, so the image is computed once.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import torch
from torch import Tensor

from vlmo_ray.errors import UserError
from vlmo_ray.model.attention import PADDED, KeyValues
from vlmo_ray.model.experts import Route
from vlmo_ray.model.vlmo import VLMo


class NextToken(Protocol):
    """What beam search asks: `__call__` writes a token in every row and tells what may follow."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """int64 [B] -> log probabilities [B,V] of the token after them."""
        ...

    def select(self, rows: Tensor) -> None:
        """Goes on with these rows, int64 [B']; a row may be there several times."""
        ...


class Writer:
    """The texts of B images, all of the same length."""

    def __init__(self, model: VLMo, image: Tensor, mask_id: int):
        """`image`: pixels [B,3,H,W] from -1 to 1. UserError for a model that cannot write."""
        check_writer(model)
        self.model, self.mask_id, self.written = model, mask_id, 0
        self.memories = [KeyValues() for _ in model.layers]
        self.text_len = model.config.max_text_len
        self.bias = model.position_bias(self.text_len)  # [L,H,S,S]
        x = model.embed_image(image)
        block = None if self.bias is None else self.bias[:, :, self.text_len :, self.text_len :]
        self._run(x, "image", block)

    def __call__(self, tokens: Tensor) -> Tensor:
        """int64 [B] -> log probabilities [B,V], in float32 or wider."""
        first = self.written
        if first + 2 > self.text_len:
            raise UserError(
                f"a text of this model has {self.text_len} tokens at most; ask for fewer, or train with more"
            )
        asked = torch.stack([tokens, torch.full_like(tokens, self.mask_id)], dim=1)
        x = self.model.text_embed(asked, first=first) + self.model.modality.weight[0]
        state = self.model.norm(self._run(x, "text", self._block(first, x)))[:, -1]
        for memory in self.memories:
            memory.update(lambda kept: kept[:, :-1])
        self.written += 1
        assert self.model.mlm is not None, "`check_writer` has seen it"
        logits = self.model.mlm(state)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)

    def select(self, rows: Tensor) -> None:
        for memory in self.memories:
            memory.update(lambda kept: kept[rows])

    def _block(self, first: int, x: Tensor) -> Tensor:
        """[L,H,2,M+2] for the tokens at `first` and after; keys are the image, then the text. The first of them may not
        see the second, which is a [MASK]."""
        image = 1 + self.model.config.num_patches
        later = torch.zeros(2, image + first + 2, dtype=torch.bool, device=x.device)
        later[0, -1] = True
        if self.bias is None:
            return x.new_zeros(len(self.memories), 1, *later.shape).masked_fill(later, PADDED)
        rows = self.bias[:, :, first : first + 2]
        return torch.cat([rows[..., self.text_len :], rows[..., : first + 2]], dim=-1).masked_fill(later, PADDED)

    def _run(self, x: Tensor, below: Route, bias: Tensor | None) -> Tensor:
        for index, (layer, memory) in enumerate(zip(self.model.layers, self.memories, strict=True)):
            route = below if index < self.model.config.vl_start else "vl"
            x = layer(x, route, bias=None if bias is None else bias[index], memory=memory)
        return x


def check_writer(model: VLMo) -> None:
    """UserError if the model has no head for words, or attention of its own for texts."""
    if model.mlm is None:
        raise UserError(
            "this model has no head for words ('mlm'), which writing needs; load one that was trained with it"
        )
    if model.config.attention == "separate":
        raise UserError(
            "with model.attention='separate' texts do not attend to images below the top, so no caption can be "
            "written; use 'shared'"
        )


def beam_search(
    following: NextToken,
    rows: int,
    *,
    start: int,
    end: int,
    banned: Collection[int],
    max_tokens: int,
    beams: int = 3,
    length_exponent: float = 0.6,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """The best text of each row: tokens int64 [rows, max_tokens + 1], filled with `end`, and their score [rows].

    A text has 1 to `max_tokens` tokens, none of them `banned`, and then `end`. Its score is the sum of the log
    probabilities, of `end` too, divided by its length, `start` and `end` included, to the power of `length_exponent`.
    Of every row `beams` unfinished texts are kept. With as many beams as there are texts the search is exhaustive. It
    ends early only when no unfinished text can win any more.
    """
    best = torch.full((rows, max_tokens + 1), end, dtype=torch.int64, device=device)
    best_score = torch.full((rows,), -torch.inf, dtype=torch.float64, device=device)
    tokens = torch.full((rows, 1), start, dtype=torch.int64, device=device)  # [rows * width, t + 1]
    sums = torch.zeros(rows, 1, dtype=torch.float64, device=device)  # [rows, width] of the unfinished texts
    for count in range(max_tokens + 1):  # tokens written so far
        log_probs = following(tokens[:, -1]).double().unflatten(0, (rows, -1))  # [rows, width, V]
        log_probs[..., [*banned, *([end] if count == 0 else [])]] = -torch.inf
        # those that end here
        finished, which = (sums + log_probs[..., end]).max(dim=1)
        score = finished / (count + 2) ** length_exponent
        better = score > best_score
        ended = tokens.unflatten(0, (rows, -1))[torch.arange(rows, device=device), which, 1:]
        best[better] = end
        best[better, :count] = ended[better]
        best_score = torch.where(better, score, best_score)
        # those that go on
        log_probs[..., end] = -torch.inf
        sums, chosen = (sums[..., None] + log_probs).flatten(1).topk(min(beams, log_probs[0].numel()), dim=1)
        # sums only fall, and the longest text divides them by most
        reachable = sums[:, 0] / (max_tokens + 2) ** length_exponent
        if count == max_tokens or not (reachable > best_score).any():
            break
        vocabulary, width = log_probs.shape[-1], log_probs.shape[1]
        parent = (chosen // vocabulary + torch.arange(rows, device=device)[:, None] * width).flatten()
        tokens = torch.cat([tokens[parent], (chosen % vocabulary).flatten()[:, None]], dim=1)
        following.select(parent)
    return best, best_score
