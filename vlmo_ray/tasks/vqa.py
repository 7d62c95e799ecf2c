"""Visual question answering: fusion encoder, pooled [T_CLS], one logit an answer (paper section 4.2)."""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmo_ray.config import Config, DataConfig
from vlmo_ray.data.batch import Batch
from vlmo_ray.data.encoders.questions import OPTIONAL, Questions
from vlmo_ray.data.schema import Schema
from vlmo_ray.errors import UserError
from vlmo_ray.model.vlmo import VLMo
from vlmo_ray.recipes.vqa import VqaConfig
from vlmo_ray.tasks.task import (
    Columns,
    Counts,
    Losses,
    Pass,
    Score,
    Task,
    Term,
    ZeroShot,
    given,
    in_pair_pass,
    joined,
    pooled,
    share,
)


class Vqa(Task):
    """Soft scores as targets of a binary cross-entropy, summed over the answers.

    A question none of whose answers is in the list counts for nothing, as if it were not in the data set.
    """

    shown = ("answer_bce", "accuracy")

    def __init__(self, model: VLMo, config: Config, schema: Schema):
        super().__init__(model, config, schema)
        assert isinstance(config.task, VqaConfig)
        self.settings, self.data = config.task, config.data
        if "answers" not in schema:
            raise UserError("training for vqa needs an 'answers' column: `vlmo prepare vqa` with annotations")
        self.names = _answers(model, schema)

    def encoder(self) -> Questions:
        config = self.model.config
        return Questions(config.image_size, config.max_text_len, self.names, self.data)

    def trainable(self, name: str) -> bool:
        return name.startswith("model.vqa.") or in_pair_pass(name, self.model.config)

    def lr_scale(self, name: str) -> float:
        return self.settings.head_lr_scale if name.startswith("model.vqa.") else 1.0

    def counts(self, batch: Batch) -> Counts:
        return {"rows": _counted(batch).sum()}

    def losses(self, batch: Batch, totals: Counts, step: int) -> Losses:
        logits = given(self.model.vqa)(pooled(self.model, batch, self.noise("pair", batch.position, step)))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        target = batch.target.to(logits.dtype)
        each = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(dim=1)
        counted = _counted(batch)
        reached = target.gather(1, logits.argmax(dim=1, keepdim=True)).squeeze(1)
        loss = (each * counted).sum() / totals["rows"].clamp(min=1)
        return Losses({"answer_bce": Term(loss)}, {"reached": (reached * counted).sum()})

    def metrics(self, sums: Counts, totals: Counts) -> dict[str, Tensor]:
        return {"accuracy": sums["reached"] / totals["rows"].clamp(min=1)}

    def passes(self) -> list[Pass]:
        return [Pass(self.model.config.max_text_len, image=True)]

    def evaluation(self, schema: Schema) -> VqaAccuracy:
        return VqaAccuracy(self.model, schema, self.names)


def _counted(batch: Batch) -> Tensor:
    return batch.valid & (batch.target > 0).any(dim=1)


def _answers(model: VLMo, schema: Schema) -> tuple[str, ...]:
    """The list of answers of a data set, if the model has as many logits."""
    names = schema.field("answers").values
    if model.vqa is None or not names:
        what = "the model has no 'vqa' head" if names else "the data set has no list of answers"
        raise UserError(f"{what}, which the task vqa needs; see docs/tasks/vqa.md")
    if len(names) != model.config.num_answers:
        raise UserError(
            f"the data set has a list of {len(names):,} answers, the model logits for {model.config.num_answers:,}; "
            f"--set model.num_answers={len(names)}, or prepare the data set with the list of the weights"
        )
    return names


class VqaAccuracy(ZeroShot):
    """The official accuracy, over all questions and by type of answer and of question.

    Without the answers as people gave them (`given_answers`) it is the soft score of the answer. Chance is the share of
    the most frequent best answer. Without any answers there are only predictions.
    """

    def __init__(self, model: VLMo, schema: Schema, names: tuple[str, ...] = ()):
        self.model, self.schema = model, schema
        self.names = names or _answers(model, schema)
        self.reads = tuple(name for name in OPTIONAL if name in schema)

    def encoder(self) -> Questions:
        config = self.model.config
        return Questions(config.image_size, config.max_text_len, self.names, DataConfig(), self.reads)

    def rows(self, batch: Batch) -> dict[str, Tensor]:
        logits = given(self.model.vqa)(pooled(self.model, batch)).float()
        best = logits.argmax(dim=1, keepdim=True)
        found = {"answer": best, "score": logits.gather(1, best).sigmoid()}
        if worth := [batch.columns[name] for name in ("accuracy", "target") if name in batch.columns]:
            found["worth"] = worth[0].gather(1, best)
            most, truth = worth[-1].max(dim=1, keepdim=True)
            found["truth"] = truth.masked_fill(most == 0, -1)
        types = {name: batch.columns[name] for name in ("answer_type", "question_type") if name in batch.columns}
        return {name: tensor.squeeze(1) for name, tensor in found.items()} | types

    def predictions(self, block: Columns) -> Columns:
        names = np.array([*self.names, ""], dtype=object)  # -1: no answer of the list is right
        truth = {"truth": names[block["truth"]]} if "truth" in block else {}
        return {"id": block["id"], "prediction": names[block["answer"]], "score": block["score"], **truth}

    def submission(self, ids: list[str], predictions: list[str]) -> bytes:
        """EvalAI's JSON list."""
        if strange := [name for name in ids if not name.isdecimal()]:
            raise UserError(f"the id {strange[0]!r} is not the number of a question; prepare the official files")
        pairs = zip(ids, predictions, strict=True)
        return json.dumps([{"question_id": int(name), "answer": answer} for name, answer in pairs]).encode()

    def score(self, blocks: Iterable[Columns]) -> dict[str, Score]:
        found = joined(blocks)
        if "worth" not in found:
            return {}
        truth = found["truth"][found["truth"] >= 0]
        chance = np.bincount(truth).max() / len(found["truth"]) if len(truth) else 0.0
        scores = {"accuracy": share(found["worth"], float(chance))}
        for column in ("answer_type", "question_type"):
            for number in np.unique(found.get(column, ())):
                name = self.schema.field(column).values[int(number)]
                scores[f"accuracy ({name})"] = share(found["worth"][found[column] == number])
        return scores
