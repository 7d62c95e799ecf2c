"""What the fusion encoder has learned: matching, re-ranking by it, and masked words with and without the image."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmo_ray.config import DataConfig
from vlmo_ray.data.batch import Batch
from vlmo_ray.data.encoders.pairs import MaskedPairs
from vlmo_ray.data.schema import PAIRS, Schema
from vlmo_ray.errors import UserError
from vlmo_ray.model.vlmo import VLMo
from vlmo_ray.objectives.matching import hard_negatives
from vlmo_ray.objectives.pairs import Pairs
from vlmo_ray.rng import stream
from vlmo_ray.tasks.metrics import auc, auc_error
from vlmo_ray.tasks.retrieval import Retrieval
from vlmo_ray.tasks.task import Columns, Score, ZeroShot, given, joined, pixels

_BATCH = 128  # pairs per pass


class Matching(ZeroShot):
    """Scores on pairs, which are compared in one process: for data sets of some thousand pairs.

    Each text is set against two images of other pairs, and each image against two texts: one of each drawn at random,
    one mined as in training (paper section 3.3). `auc` is the chance that a true pair has higher odds of matching than
    a false one, `accuracy` the mean of the shares of true and of false pairs that are told apart, at the odds that
    training with one true pair in three implies.

    `reranked` is recall (at 1, 5 and 10, as far as `top` goes) after the `top` candidates by cosine are put in the
    order of cosine / temperature + log odds. Negatives in training are drawn from softmax(cosine / temperature), so
    this sum is the logarithm of the probability of the candidate, up to a constant (Deng et al. 2020, "Residual
    energy-based models", section 3).

    `masked_words` is the loss on masked words with the right image, `masked_words_gain` how much higher it is with the
    image of another pair; pairs that no other may oppose are left out of both. Neither is there without the head mlm.
    """

    def __init__(self, model: VLMo, schema: Schema = PAIRS, top: int = 10):
        if missing := [head for head in ("itc", "itm") if head not in model.config.heads]:
            raise UserError(
                f"this model has no head {missing[0]!r}, which the task matching needs; load a pre-trained one"
            )
        if top < 1:
            raise UserError(f"top={top} of matching must be at least 1")
        self.model, self.top = model, top
        self._features = Retrieval(model, schema)

    def encoder(self) -> MaskedPairs:
        config = self.model.config
        return MaskedPairs(config.image_size, config.max_text_len, DataConfig(), config.vocab_size, 0.15)

    def rows(self, batch: Batch) -> dict[str, Tensor]:
        own = ("image", "text_ids", "text_mask", "mlm_ids", "mlm_labels", "text_key")
        return self._features.rows(batch) | {name: batch.columns[name] for name in own}

    @torch.inference_mode()
    def score(self, blocks: Iterable[Columns]) -> dict[str, Score]:
        device = self.model.norm.weight.device
        columns = {name: values for name, values in joined(blocks).items() if values.dtype != object}
        rows = {name: torch.from_numpy(values).to(device) for name, values in columns.items()}
        count = len(rows["text_ids"])
        pairs = Pairs(rows["image_key"], rows["text_key"], torch.ones(count, dtype=torch.bool, device=device), 0, count)
        own = torch.arange(count, device=device)
        true = self.log_odds(rows, own, own)
        scores: dict[str, Score] = {}
        for kind, log_scale in (
            ("random", true.new_full((1,), -torch.inf)),
            ("mined", given(self.model.itc).log_scale),
        ):
            false = self._negatives(rows, pairs, log_scale)
            # training has one true pair in three: even odds there are odds of 1/2 here
            right = ((true > -np.log(2)).float().mean() + (false <= -np.log(2)).float().mean()) / 2
            scores |= {
                f"auc_{kind}": Score(auc(true.cpu().numpy(), false.cpu().numpy()), 0.5, len(false)),
                f"accuracy_{kind}": Score(float(right), 0.5, len(false)),
            }
        error = auc_error(scores["auc_mined"].value, count, scores["auc_mined"].count)
        scores["auc_mined_standard_error"] = Score(error, None, scores["auc_mined"].count)
        words = self._masked_words(rows, pairs) if self.model.mlm is not None else {}
        return scores | self._reranked(rows, pairs) | words

    def _negatives(self, rows: dict[str, Tensor], pairs: Pairs, log_scale: Tensor) -> Tensor:
        """The log odds of each text with one other image, and of each image with one other text."""
        found = []
        image, text = rows["image_feature"], rows["text_feature"]
        for purpose, of, among in (("image", text, image), ("text", image, text)):
            chosen = hard_negatives(of, among, log_scale, pairs, stream(0, f"matching/{purpose}"))
            kept = (chosen >= 0).nonzero().squeeze(1)
            images, texts = (chosen[kept], kept) if purpose == "image" else (kept, chosen[kept])
            found.append(self.log_odds(rows, images, texts))
        both = torch.cat(found)
        if not len(both):
            raise UserError("all pairs have the same image or the same text: nothing can be set against anything")
        return both

    def _states(
        self, rows: dict[str, Tensor], images: Tensor, ids: Tensor, texts: Tensor, read: int | None = None
    ) -> Tensor:
        """States [M,T,D] of the token ids [M,T], of the texts `texts`, fused with the images `images`; the first `read`
        of them."""
        shown, mask = pixels(self.model, rows["image"][images]), rows["text_mask"][texts]
        return given(self.model.encode(image=shown, text=ids, text_mask=mask, read=read or ids.shape[1]).text)

    def log_odds(self, rows: dict[str, Tensor], images: Tensor, texts: Tensor) -> Tensor:
        """log P(match) - log P(no match) of pairs of row numbers `[M]`, float32 `[M]`."""
        found = []
        for image, text in zip(images.split(_BATCH), texts.split(_BATCH), strict=True):
            states = self._states(rows, image, rows["text_ids"][text], text, read=1)
            logits = given(self.model.itm)(given(self.model.pooler)(states[:, 0])).float()
            found.append(logits[:, 1] - logits[:, 0])
        odds = torch.cat(found) if found else torch.zeros(0)
        if odds.isnan().any():
            raise UserError("the model's odds of matching are NaN; evaluate an earlier checkpoint")
        return odds

    def _reranked(self, rows: dict[str, Tensor], pairs: Pairs) -> dict[str, Score]:
        """Recall in both directions, before and after; a tie counts against the model."""
        scale = given(self.model.itc).log_scale.exp().float()
        images, texts = rows["image_feature"], rows["text_feature"]
        # equal images and equal texts are one candidate each, and all their partners are right answers
        first_image, first_text = (_first_of_each(keys) for keys in (pairs.image_key, pairs.text_key))
        scores = {}
        for name, queries, candidates, right in (
            (
                "text_retrieval",
                first_image,
                first_text,
                _partners(pairs.image_key, pairs.text_key, first_image, first_text),
            ),
            (
                "image_retrieval",
                first_text,
                first_image,
                _partners(pairs.text_key, pairs.image_key, first_text, first_image),
            ),
        ):
            of, among = (images, texts) if name == "text_retrieval" else (texts, images)
            cosine = of[queries] @ among[candidates].T
            k = min(self.top, len(candidates))
            best = cosine.topk(k, dim=1).indices
            asked, offered = queries[:, None].expand(-1, k).flatten(), candidates[best].flatten()
            odds = self.log_odds(rows, *((asked, offered) if name == "text_retrieval" else (offered, asked)))
            reranked = cosine.gather(1, best) * scale + odds.view(-1, k)
            wanted = right.gather(1, best)
            chance = float(right.float().mean())
            for kind, order in (("dual", cosine.gather(1, best)), ("reranked", reranked)):
                own = order.masked_fill(~wanted, -torch.inf).max(dim=1).values
                # wrong candidates that stand before the best right one; without that, all of them and more
                before = (~wanted & (order >= own[:, None])).sum(dim=1) + k * own.isinf()
                for at in (at for at in (1, 5, 10) if at <= k):
                    hit = float((before < at).float().mean())
                    scores[f"{name}_r@{at}_{kind}"] = Score(hit, chance if at == 1 else None, len(queries))
        return scores

    def _masked_words(self, rows: dict[str, Tensor], pairs: Pairs) -> dict[str, Score]:
        nothing = rows["text_feature"]
        uniform = nothing.new_full((1,), -torch.inf)
        other = hard_negatives(nothing, nothing, uniform, pairs, stream(0, "matching/words"))
        own = (other >= 0).nonzero().squeeze(1)
        other = other[own]
        losses = []
        for images in (own, other):
            total, words = 0.0, 0
            for image, text in zip(images.split(_BATCH), own.split(_BATCH), strict=True):
                states = self._states(rows, image, rows["mlm_ids"][text], text)
                labels = rows["mlm_labels"][text].long()
                logits = given(self.model.mlm)(states[labels >= 0]).float()
                total += float(F.cross_entropy(logits, labels[labels >= 0], reduction="sum"))
                words += len(logits)
            losses.append(total / words)
        right, wrong = losses
        return {
            "masked_words": Score(right, None, words, is_share=False),
            "masked_words_gain": Score(wrong - right, 0.0, words, is_share=False),
        }


def _first_of_each(keys: Tensor) -> Tensor:
    """The row numbers at which each key comes first."""
    _, index = np.unique(keys.cpu().numpy(), return_index=True)
    return torch.from_numpy(index).to(keys.device)


def _partners(query_keys: Tensor, keys: Tensor, queries: Tensor, candidates: Tensor) -> Tensor:
    """Bool [Q,C]: whether some row has the key of the query and the key of the candidate."""
    _, q = torch.unique(torch.cat([query_keys[queries], query_keys]), return_inverse=True)
    _, c = torch.unique(torch.cat([keys[candidates], keys]), return_inverse=True)
    right = torch.zeros(int(q.max()) + 1, int(c.max()) + 1, dtype=torch.bool, device=keys.device)
    right[q[len(queries) :], c[len(candidates) :]] = True
    return right[q[: len(queries)]][:, c[: len(candidates)]]
