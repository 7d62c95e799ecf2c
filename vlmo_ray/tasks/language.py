"""The language stage: masked words on texts alone (paper section 3.4)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmo_ray.config import Config
from vlmo_ray.data.batch import Batch
from vlmo_ray.data.encoders.texts import MaskedTexts
from vlmo_ray.data.schema import Schema
from vlmo_ray.errors import UserError
from vlmo_ray.model.vlmo import VLMo
from vlmo_ray.objectives.masked_lm import masked_lm_loss
from vlmo_ray.recipes.language import LanguageConfig
from vlmo_ray.rng import Noise
from vlmo_ray.tasks.task import Columns, Counts, Evaluation, Losses, Pass, Score, Task, Term, by_row, given, joined

_TRAINED = ("text_embed", "modality", "relative", "norm", "mlm")


class Language(Task):
    """Trains what the released text stage does: the text embedding, the modalities, the language experts with their
    norms, the position table, the last norm and the head. The attention stays that of the vision stage."""

    shown = ("mlm", "mlm_accuracy")

    def __init__(self, model: VLMo, config: Config, schema: Schema):
        super().__init__(model, config, schema)
        assert isinstance(config.task, LanguageConfig)
        self.settings = config.task
        if "text" not in schema:
            raise UserError("the task language needs a 'text' column: `vlmo prepare text`")

    def encoder(self) -> MaskedTexts:
        config = self.model.config
        return MaskedTexts(config.max_text_len, config.vocab_size, self.settings.mlm_probability)

    def trainable(self, name: str) -> bool:
        _, *parts = name.split(".")  # model.<...>
        own = parts[2:4] in (["experts", "text"], ["experts", "all"]) or parts[2:3] == ["text_attention"]
        return parts[0] in _TRAINED or (parts[0] == "layers" and own)

    def counts(self, batch: Batch) -> Counts:
        return super().counts(batch) | {"targets": _targets(batch).sum()}

    def states(self, batch: Batch, noise: Noise | None = None) -> Tensor:
        """[B,T,D]"""
        return given(self.model.encode(text=batch.mlm_ids, text_mask=batch.text_mask, noise=noise).text)

    def losses(self, batch: Batch, totals: Counts, step: int) -> Losses:
        target = _targets(batch)
        hidden = self.states(batch, self.noise("text", batch.position, step))
        head, labels = given(self.model.mlm), batch.mlm_labels[target]
        loss, right = masked_lm_loss(head.hidden(hidden[target]), head.decoder, labels, totals["targets"])
        return Losses({"mlm": Term(loss)}, {"mlm_right": right})

    def metrics(self, sums: Counts, totals: Counts) -> dict[str, Tensor]:
        return {"mlm_accuracy": sums["mlm_right"] / totals["targets"].clamp(min=1)}

    def chance(self, global_batch: int) -> dict[str, float]:
        return {"mlm": math.log(self.model.config.vocab_size)}

    def passes(self) -> list[Pass]:
        return [Pass(self.model.config.max_text_len, image=False)]

    def evaluation(self, schema: Schema) -> MaskedWords:
        return MaskedWords(self)


class MaskedWords(Evaluation):
    """The share of masked tokens that are predicted right, and their cross-entropy in nats."""

    def __init__(self, task: Language):
        self.task = task

    def encoder(self) -> MaskedTexts:
        return self.task.encoder()

    def rows(self, batch: Batch) -> dict[str, Tensor]:
        target = _targets(batch)
        logits = given(self.task.model.mlm)(self.task.states(batch)[target])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labels = batch.mlm_labels[target]
        loss = F.cross_entropy(logits, labels, reduction="none")
        right = by_row(logits.argmax(dim=1) == labels, target)
        return {"right": right, "loss": by_row(loss, target), "targets": target.sum(dim=1)}

    def score(self, blocks: Iterable[Columns]) -> dict[str, Score]:
        found = joined(blocks)
        count = int(found["targets"].sum())
        right, loss = (float(np.sum(found[name])) / max(1, count) for name in ("right", "loss"))
        chance = math.log(self.task.model.config.vocab_size)
        return {
            "masked_word_accuracy": Score(right, None, count),
            "masked_word_loss": Score(loss, chance, count, is_share=False),
        }


def _targets(batch: Batch) -> Tensor:
    return (batch.mlm_labels >= 0) & batch.valid[:, None]
