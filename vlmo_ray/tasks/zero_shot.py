"""Zero-shot classification: images against the names of the classes, with the dual encoder.

As CLIP does it (Radford et al. 2021, "Learning transferable visual models from natural language supervision", section
3.1.4): each name is put into every template, and the class is the normalised mean of the normalised texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmo_ray.config import DataConfig
from vlmo_ray.data.batch import Batch
from vlmo_ray.data.encoders.classes import Classes
from vlmo_ray.data.encoders.pairs import tokenizer
from vlmo_ray.data.prepare.folders import class_lines
from vlmo_ray.data.schema import Schema
from vlmo_ray.errors import UserError
from vlmo_ray.model.vlmo import VLMo
from vlmo_ray.tasks.classification import rank_of, top_k
from vlmo_ray.tasks.task import Columns, Score, ZeroShot, given, image_states, joined, texts_of

TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "an image of a {}.", "there is a {} in the photo.")
_BATCH = 256  # texts per pass


class ZeroShotClasses(ZeroShot):
    """The share of images whose class is among the 1 and the 5 nearest.

    Classes are those of the data set's `label` column; `names`, a list or the address of a file with a line for each,
    says how they are called in a sentence (default: as in the data set, `_` as a space). Every one of `templates` has
    a `{}`.
    """

    def __init__(
        self, model: VLMo, schema: Schema, templates: Sequence[str] = TEMPLATES, names: Sequence[str] | str = ()
    ):
        if model.itc is None:
            raise UserError("this model has no contrastive head ('itc'), which zero-shot classification needs")
        if "label" not in schema:
            raise UserError("zero_shot needs a 'label' column with the classes: `vlmo prepare folders`")
        classes = schema.field("label").values
        called = class_lines(names) if isinstance(names, str) else texts_of("names", names)
        if called and len(called) != len(classes):
            raise UserError(f"names={names!r} has {len(called)} names for the {len(classes)} classes of the data set")
        templates = (templates,) if isinstance(templates, str) else texts_of("templates", templates)
        if not templates or any(text.count("{}") != 1 for text in templates):
            raise UserError(f"templates={list(templates)}: write texts with one {{}} each, for the name of a class")
        self.model, self.classes = model, classes
        self._sentences = [
            [text.replace("{}", name) for text in templates]
            for name in (called or (name.replace("_", " ") for name in classes))
        ]
        self._features: Tensor | None = None

    def encoder(self) -> Classes:
        return Classes(self.model.config.image_size, self.classes, DataConfig())

    def class_features(self) -> Tensor:
        """[C, D], L2-normalised; computed once."""
        if self._features is None:
            head, encode = given(self.model.itc), tokenizer(self.model.config.max_text_len).encode
            encoded = [encode(text)[:2] for sentences in self._sentences for text in sentences]
            ids, mask = (torch.stack([torch.as_tensor(each[i]) for each in encoded]) for i in (0, 1))
            device, found = self.model.norm.weight.device, []
            for some, shown in zip(ids.split(_BATCH), mask.split(_BATCH), strict=True):
                states = self.model.encode(text=some.long().to(device), text_mask=shown.to(device), read=1).text
                found.append(head.text(given(states)[:, 0]).float())
            each = torch.cat(found).view(len(self._sentences), -1, found[0].shape[1])
            self._features = F.normalize(each.mean(dim=1), dim=1)
        return self._features

    def rows(self, batch: Batch) -> dict[str, Tensor]:
        image = given(self.model.itc).image(image_states(self.model, batch.image, read=1)[:, 0]).float()
        return {"rank": rank_of(image @ self.class_features().T, batch.label)}

    def score(self, blocks: Iterable[Columns]) -> dict[str, Score]:
        return top_k(joined(blocks)["rank"], len(self.classes))
