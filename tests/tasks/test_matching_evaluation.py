"""Matching on pairs: the oracle scores every pair alone, in plain Python loops."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_run import SMALL

from vlmo_ray.data.batch import Batch
from vlmo_ray.errors import UserError
from vlmo_ray.model.vlmo import VLMo, init_weights
from vlmo_ray.objectives.matching import hard_negatives
from vlmo_ray.objectives.pairs import Pairs
from vlmo_ray.rng import stream
from vlmo_ray.tasks.matching import Matching
from vlmo_ray.tasks.metrics import auc, auc_error

IMAGES = (0, 0, 1, 2, 3, 4, 5, 6, 6, 7, 8)  # of the rows: two images have two captions
TEXTS = (0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9)  # and one caption belongs to two images
TOP = 7


def make_model(*without: str) -> VLMo:
    heads = tuple(head for head in SMALL.model.heads if head not in without)
    model = VLMo(dataclasses.replace(SMALL.model, layer_scale=None, init_std=0.3, heads=heads))
    init_weights(model, 2)
    return model


def make_batch() -> Batch:
    draw = torch.Generator().manual_seed(1)
    caption = torch.randint(1000, 1100, (10, 12), generator=draw)
    length = torch.randint(4, 12, (10, 1), generator=draw)
    image, text = torch.tensor(IMAGES), torch.tensor(TEXTS)
    ids = caption[text]
    labels = torch.where(torch.rand(len(text), 12, generator=draw) < 0.3, ids, -100)
    pictures = torch.randint(0, 256, (9, 3, 16, 16), generator=draw, dtype=torch.uint8)
    columns = {
        "image": pictures[image], "text_ids": ids, "text_mask": torch.arange(12) < length[text],
        "mlm_ids": ids.masked_fill(labels >= 0, 1004), "mlm_labels": labels,
        "image_key": image * 7, "text_key": text * 5,
    }  # fmt: skip
    count = len(text)
    return Batch(columns, torch.ones(count, dtype=torch.bool), torch.arange(count), [str(i) for i in range(count)],
                 [""] * count)  # fmt: skip


def scores_of(model: VLMo, *cuts: int):
    """Scores of the batch when workers had cut it into rows up to each of `cuts`."""
    matching, batch = Matching(model, top=TOP), make_batch()
    ends = [0, *cuts, len(batch)]
    with torch.inference_mode():
        blocks = [matching.rows(batch.rows(slice(*span))) for span in itertools.pairwise(ends)]
    return matching.score({name: rows.numpy() for name, rows in block.items()} for block in blocks)


class Slow:
    """Each figure of one pair, with the model's public methods."""

    def __init__(self, model: VLMo):
        self.model, self.batch = model, make_batch()

    def states(self, image: int, text: int, ids: str) -> torch.Tensor:
        picture, row = self.batch.image[image : image + 1] / 127.5 - 1, slice(text, text + 1)
        columns = self.batch.columns
        return self.model.encode(image=picture, text=columns[ids][row], text_mask=columns["text_mask"][row]).text

    def odds(self, image: int, text: int) -> float:
        no, yes = self.model.itm(self.model.pooler(self.states(image, text, "text_ids")[:, 0]))[0]
        return float(yes - no)

    def features(self) -> tuple[torch.Tensor, torch.Tensor]:
        image = self.model.encode(image=self.batch.image / 127.5 - 1).image
        text = self.model.encode(text=self.batch.text_ids, text_mask=self.batch.text_mask).text
        return self.model.itc.image(image[:, 0]), self.model.itc.text(text[:, 0])

    def true(self, image: int, text: int) -> bool:
        return any(IMAGES[image] == i and TEXTS[text] == t for i, t in zip(IMAGES, TEXTS, strict=True))


@pytest.fixture(scope="module")
def found():
    model = make_model()
    return model, scores_of(model)


@torch.no_grad()
def test_true_pairs_against_false_ones(found):
    model, scores = found
    slow, count = Slow(model), len(IMAGES)
    image, text = slow.features()
    keys = (torch.tensor(IMAGES), torch.tensor(TEXTS))
    pairs = Pairs(*keys, torch.ones(count, dtype=torch.bool), 0, count)
    true = [slow.odds(i, i) for i in range(count)]
    for kind, scale in (("random", torch.tensor([-torch.inf])), ("mined", model.itc.log_scale)):
        of_text = hard_negatives(text, image, scale, pairs, stream(0, "matching/image")).tolist()
        of_image = hard_negatives(image, text, scale, pairs, stream(0, "matching/text")).tolist()
        drawn = [(i, t) for t, i in enumerate(of_text)] + list(enumerate(of_image))
        assert all(IMAGES[i] != IMAGES[t] and TEXTS[i] != TEXTS[t] for i, t in drawn)
        false = [slow.odds(*pair) for pair in drawn]
        above = np.mean([(t > f) + (t == f) / 2 for t in true for f in false])
        right = (np.mean([t > -math.log(2) for t in true]) + np.mean([f <= -math.log(2) for f in false])) / 2
        assert scores[f"auc_{kind}"].value == pytest.approx(above, abs=1e-9)
        assert scores[f"accuracy_{kind}"].value == pytest.approx(right, abs=1e-6)
        assert scores[f"auc_{kind}"].count == 2 * count
    assert scores["auc_random"] != scores["auc_mined"]


@torch.no_grad()
def test_reranking_is_the_slow_one(found):
    """One query at a time; equal images and equal texts are one candidate."""
    model, scores = found
    slow = Slow(model)
    image, text = slow.features()
    scale = float(model.itc.log_scale.exp())
    first_image = [IMAGES.index(key) for key in sorted(set(IMAGES))]
    first_text = [TEXTS.index(key) for key in sorted(set(TEXTS))]
    changed = 0
    for name, queries, candidates in (
        ("text_retrieval", first_image, first_text),
        ("image_retrieval", first_text, first_image),
    ):
        hits = {f"{k}_{kind}": 0 for k in (1, 5) for kind in ("dual", "reranked")}
        for query in queries:

            def pair(candidate, query=query, name=name):
                return (query, candidate) if name == "text_retrieval" else (candidate, query)

            def cosine(candidate, pair=pair):
                i, t = pair(candidate)
                return float(image[i] @ text[t])

            best = sorted(candidates, key=cosine, reverse=True)[:TOP]

            def fused(candidate, cosine=cosine, pair=pair):
                return scale * cosine(candidate) + slow.odds(*pair(candidate))

            for kind, order in (("dual", best), ("reranked", sorted(best, key=fused, reverse=True))):
                for k in (1, 5):
                    hits[f"{k}_{kind}"] += any(slow.true(*pair(candidate)) for candidate in order[:k])
                changed += order[0] != best[0]
        for kind, hit in hits.items():
            assert scores[f"{name}_r@{kind}"].value == pytest.approx(hit / len(queries), abs=1e-6)
            assert scores[f"{name}_r@{kind}"].count == len(queries)
        assert f"{name}_r@10_dual" not in scores  # more than were re-ranked
    assert changed, "matching changed no order, so this test says nothing"


@torch.no_grad()
def test_masked_words_with_the_right_image_and_another(found):
    model, scores = found
    slow, count = Slow(model), len(IMAGES)
    pairs = Pairs(torch.tensor(IMAGES), torch.tensor(TEXTS), torch.ones(count, dtype=torch.bool), 0, count)
    nothing = torch.zeros(count, 1)
    other = hard_negatives(nothing, nothing, torch.tensor([-torch.inf]), pairs, stream(0, "matching/words")).tolist()
    labels = slow.batch.columns["mlm_labels"]
    losses = []
    for images in (range(count), other):
        each = []
        for t, i in enumerate(images):
            states = slow.states(i, t, "mlm_ids")[0]
            each += [float(F.cross_entropy(model.mlm(states[k]), labels[t, k])) for k in range(12) if labels[t, k] >= 0]
        losses.append(np.mean(each))
    assert scores["masked_words"].value == pytest.approx(losses[0], rel=1e-5)
    assert scores["masked_words_gain"].value == pytest.approx(losses[1] - losses[0], abs=1e-5)
    assert scores["masked_words"].count == int((labels >= 0).sum())


def test_scores_do_not_depend_on_how_rows_were_cut(found):
    """Another number of workers, or of rows in a chunk."""
    model, scores = found
    cut = scores_of(model, 2, 3, 8)
    assert {name: score.count for name, score in cut.items()} == {name: score.count for name, score in scores.items()}
    for name, score in scores.items():
        assert cut[name].value == pytest.approx(score.value, abs=1e-5), name


def test_auc_counts_pairs():
    draw = np.random.default_rng(0)
    positive, negative = draw.integers(0, 6, 13), draw.integers(-2, 5, 17)  # many ties
    slow = np.mean([(p > n) + (p == n) / 2 for p in positive for n in negative])
    assert auc(positive, negative) == pytest.approx(slow, abs=1e-12)
    assert auc(np.ones(3), np.ones(4)) == 0.5 and auc(np.ones(3), np.zeros(4)) == 1


def test_the_error_of_auc_is_the_spread_of_many_draws():
    """The formula assumes exponential scores: an AUC of 0.75 if one mean is thrice the other."""
    draw = np.random.default_rng(1)
    values = [auc(draw.exponential(3, 40), draw.exponential(1, 80)) for _ in range(2000)]
    assert np.mean(values) == pytest.approx(0.75, abs=0.01)
    assert auc_error(0.75, 40, 80) == pytest.approx(np.std(values), rel=0.1)


def test_masked_words_leave_out_a_pair_that_none_may_oppose():
    """The last row shares its image or its text with both others."""
    matching, batch = Matching(make_model()), make_batch().rows(slice(2, 5))
    batch = batch.with_columns(image_key=torch.tensor([1, 2, 1]), text_key=torch.tensor([1, 2, 2]))
    with torch.inference_mode():
        rows = {name: values.numpy() for name, values in matching.rows(batch).items()}
    wanted = int((batch.columns["mlm_labels"][:2] >= 0).sum())
    assert matching.score([rows])["masked_words"].count == wanted < int((batch.columns["mlm_labels"] >= 0).sum())


def test_refusals():
    with pytest.raises(UserError, match="no head 'itm'"):
        Matching(make_model("itm"))
    with pytest.raises(UserError, match="top=0 of matching must be at least 1"):
        Matching(make_model(), top=0)
    matching, batch = Matching(make_model()), make_batch()
    with torch.inference_mode():
        rows = {name: values.numpy() for name, values in matching.rows(batch.rows(slice(0, 2))).items()}
    with pytest.raises(UserError, match="same image or the same text"):
        matching.score([rows])  # both rows show the same image
    with torch.no_grad():
        matching.model.itm.bias[0] = torch.nan
    with pytest.raises(UserError, match="odds of matching are NaN"):
        matching.score([rows])


def test_a_model_without_masked_words_is_measured_without_them():
    scores = scores_of(make_model("mlm"))
    assert "masked_words" not in scores and "auc_mined" in scores and "text_retrieval_r@1_reranked" in scores
