"""Captioning: the fusion encoder writes a text, from masked tokens that see only what stands before them (UniLM)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from vlmo_ray.config import Config, DataConfig
from vlmo_ray.data.batch import Batch
from vlmo_ray.data.encoders.captions import CaptionedImages, MaskedCaptions, references_of
from vlmo_ray.data.schema import Schema
from vlmo_ray.data.text import CLS_ID, MASK_ID, PAD_ID, SEP_ID, UNK_ID, written
from vlmo_ray.errors import UserError
from vlmo_ray.model.vlmo import VLMo
from vlmo_ray.model.writer import Writer, beam_search
from vlmo_ray.objectives.masked_lm import masked_lm_loss
from vlmo_ray.objectives.pairs import columns_of
from vlmo_ray.recipes.captioning import CaptioningConfig
from vlmo_ray.tasks.metrics.captions import caption_scores
from vlmo_ray.tasks.task import (
    Columns,
    Counts,
    Evaluation,
    Losses,
    Pass,
    Score,
    Task,
    Term,
    given,
    in_pair_pass,
    pixels,
)

_IMAGES = 16  # whose captions are searched for at once


class Captioning(Task):
    """Cross-entropy of masked caption tokens, [SEP] among them.

    Image tokens do not attend to the text, and a text token attends to the image and to the text up to itself.
    """

    shown = ("words", "accuracy")

    def __init__(self, model: VLMo, config: Config, schema: Schema):
        super().__init__(model, config, schema)
        assert isinstance(config.task, CaptioningConfig)
        self.settings, self.data = config.task, config.data
        if not {"text", "captions"} & set(schema.names):
            raise UserError("captioning needs a 'captions' or a 'text' column: `vlmo prepare karpathy`")
        self.several = "captions" in schema

    def encoder(self) -> MaskedCaptions:
        config, share = self.model.config, self.settings.mask_share
        return MaskedCaptions(
            config.image_size, config.max_text_len, self.data, config.vocab_size, share, captions=self.several
        )

    def trainable(self, name: str) -> bool:
        own = in_pair_pass(name, self.model.config) and not name.startswith("model.pooler.")
        return own or name.startswith("model.mlm.")

    def counts(self, batch: Batch) -> Counts:
        return super().counts(batch) | {"targets": _targets(batch).sum()}

    def losses(self, batch: Batch, totals: Counts, step: int) -> Losses:
        target, ids = _targets(batch), batch.mlm_ids
        pair = self.model.encode(
            image=pixels(self.model, batch.image),
            text=ids,
            text_mask=batch.text_mask,
            read=ids.shape[1],
            noise=self.noise("pair", batch.position, step),
            writing=True,
        )
        head, labels, soft = given(self.model.mlm), batch.mlm_labels[target], self.settings.label_smoothing
        hidden = head.hidden(given(pair.text)[target])
        loss, right = masked_lm_loss(hidden, head.decoder, labels, totals["targets"], soft)
        return Losses({"words": Term(loss)}, {"right": right})

    def metrics(self, sums: Counts, totals: Counts) -> dict[str, Tensor]:
        return {"accuracy": sums["right"] / totals["targets"].clamp(min=1)}

    def chance(self, global_batch: int) -> dict[str, float]:
        return {"words": math.log(self.model.config.vocab_size)}

    def passes(self) -> list[Pass]:
        return [Pass(self.model.config.max_text_len, image=True)]

    def evaluation(self, schema: Schema) -> Captions:
        return Captions(self, schema)


class Captions(Evaluation):
    """BLEU, ROUGE-L and CIDEr-D of the captions that beam search finds, against all captions of each image.

    Without a column `captions` there are only predictions.
    """

    def __init__(self, task: Captioning, schema: Schema):
        self.task, self.references = task, "captions" in schema

    def encoder(self) -> CaptionedImages:
        return CaptionedImages(self.task.model.config.image_size, self.references, DataConfig())

    def rows(self, batch: Batch) -> dict[str, Tensor]:
        parts = [self._written(batch.image[part]) for part in columns_of(len(batch), _IMAGES)]
        found = {"caption": torch.cat([tokens for tokens, _ in parts]), "score": torch.cat([s for _, s in parts])}
        return found | ({"references": batch.references} if self.references else {})

    def _written(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids [B,T] that end in [SEP], and their scores [B]."""
        model, settings = self.task.model, self.task.settings
        writer = Writer(model, pixels(model, image), MASK_ID)
        return beam_search(
            writer,
            len(image),
            start=CLS_ID,
            end=SEP_ID,
            banned=(PAD_ID, UNK_ID, CLS_ID, MASK_ID),
            max_tokens=model.config.max_text_len - 2,
            beams=settings.beams,
            length_exponent=settings.length_exponent,
            device=image.device,
        )

    def predictions(self, block: Columns) -> Columns:
        captions = np.array([sentence(ids) for ids in block["caption"]], dtype=object)
        return {"id": block["id"], "prediction": captions, "score": block["score"]}

    def score(self, blocks: Iterable[Columns]) -> dict[str, Score]:
        captions: list[str] = []
        references: list[list[str]] = []
        for block in blocks:
            captions += [sentence(ids) for ids in block["caption"]]
            references += [references_of(row) for row in block.get("references", ())]
        if not references:
            return {}
        scores = caption_scores(captions, references)
        return {name: Score(value, None, len(captions), is_share=False) for name, value in scores.items()}

    def submission(self, ids: list[str], predictions: list[str]) -> bytes:
        """COCO's results: `[{"image_id": int, "caption": str}]`. The number is the last one in the record's id, without
        that of a caption, which follows a #."""
        of_image: dict[int, str] = {}
        for name in ids:
            if not (found := re.findall(r"\d+", name.partition("#")[0])):
                raise UserError(
                    f"the id {name!r} has no number, which COCO's form of results needs; prepare COCO's files"
                )
            if (number := int(found[-1])) in of_image:
                raise UserError(
                    f"{of_image[number]!r} and {name!r} would both be image {number}, and the file has one caption an "
                    "image; prepare COCO's files with `--option captions=together`"
                )
            of_image[number] = name
        pairs = zip(of_image, predictions, strict=True)
        return json.dumps([{"image_id": number, "caption": text} for number, text in pairs]).encode()


def sentence(ids: np.ndarray) -> str:
    """Token ids `[T]` as a text; what the tokenizer took apart within a word is together again: "man's", "t-shirt"."""
    return re.sub(r"(?<=\w) (-|'(?= (?:s|t|d|m|re|ve|ll)\b)) (?=\w)", r"\1", written(ids))


def _targets(batch: Batch) -> Tensor:
    return (batch.mlm_labels >= 0) & batch.valid[:, None]
