"""Captioning: the masked tokens, a step against a plain one, and captions against a search without a cache."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_image
from small_run import SMALL, begin_at, encoded, job, same_run, train_on

from vlmo_ray.config import OptimConfig, Phase
from vlmo_ray.data.batch import Batch
from vlmo_ray.data.encoders import Draw
from vlmo_ray.data.encoders.captions import CaptionedImages, references_of
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.schema import PAIRS, Field, Record, Schema
from vlmo_ray.data.store import Store
from vlmo_ray.data.text import CLS_ID, MASK_ID, SEP_ID, Tokenizer, mask_tokens
from vlmo_ray.demo.scenes.captions import captions
from vlmo_ray.demo.scenes.claims import ShapeClaim
from vlmo_ray.demo.scenes.reading import read
from vlmo_ray.demo.scenes.world import scene
from vlmo_ray.errors import RecordError, UserError
from vlmo_ray.model.vlmo import VLMo, init_weights
from vlmo_ray.objectives.gather import Workers
from vlmo_ray.recipes.captioning import CaptioningConfig
from vlmo_ray.runs.evaluations import read_evaluations
from vlmo_ray.tasks.captioning import Captioning, sentence
from vlmo_ray.tasks.metrics.captions import caption_scores
from vlmo_ray.train.loop import train
from vlmo_ray.train.parallel import parallelize
from vlmo_ray.train.step import gradients

SCHEMA = Schema((Field("image", "image"), Field("captions", "captions")))
CONFIG = dataclasses.replace(
    SMALL,
    name="captions",
    model=dataclasses.replace(SMALL.model, heads=("mlm",), vocab_size=30522, layer_scale=None),
    task=CaptioningConfig(beams=2),
    phases=(Phase(6, 8),),
    optim=OptimConfig(peak_lr=3e-3, warmup_steps=1),
    checkpoint_every=4,
    evaluate_every=6,
    precision="float64",
)
FIGURES = ("loss", "accuracy", "grad_norm")


def rows(count: int):
    for i in range(count):
        texts = [f"a dog number {i % 3}", f"two cats , {i % 2}", "a house"][: 1 + i % 3]
        yield {"id": f"{i}", "image_id": f"{i}", "image": make_image(i), "captions": texts}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("captions") / "data")
    write_dataset(folder, rows(23), rows_per_group=5, groups_per_shard=2, schema=SCHEMA)
    return folder


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("alone")
    assert train(spec_of(data, run)).step == 6
    return run


def spec_of(data: str, run, **changes):
    return dataclasses.replace(job(data, run, CONFIG, **changes), eval_data=data)


def make_task(schema=SCHEMA) -> Captioning:
    model = VLMo(CONFIG.model)
    init_weights(model, 3)
    return Captioning(model, CONFIG, schema).double()


def make_batch(invalid=()) -> Batch:
    generator = torch.Generator().manual_seed(5)
    image = torch.randint(0, 256, (7, 3, 16, 16), generator=generator, dtype=torch.uint8)
    labels = torch.randint(1000, 1100, (7, 12), generator=generator)
    mask = torch.arange(12)[None] < torch.arange(4, 11)[:, None]
    chosen = (torch.rand(7, 12, generator=generator) < 0.6) & mask
    chosen[:, 0], chosen[:, 1] = False, True
    ids = torch.where(chosen, MASK_ID, labels)
    columns = {"image": image, "text_mask": mask, "mlm_ids": ids, "mlm_labels": torch.where(chosen, labels, -100)}
    valid = torch.ones(7, dtype=torch.bool)
    valid[list(invalid)] = False
    return Batch(columns, valid, torch.arange(7), [str(i) for i in range(7)], [""] * 7)


def test_tokens_are_masked_as_beit3_does():
    ids, mask, _ = Tokenizer(12).encode("one two three four five six")
    counts, hidden, kept, at_end = set(), 0, 0, 0
    for step in range(300):
        generator = Draw(1, step, 0).generator("caption_mask")
        masked, labels = mask_tokens(ids, mask, 30522, 0.7, generator)
        target = labels >= 0
        counts.add(int(target.sum()))
        np.testing.assert_array_equal(labels[target], ids[target])
        np.testing.assert_array_equal(masked[~target], ids[~target])
        assert not target[0] and not target[~mask].any()
        hidden += int((masked[target] == MASK_ID).sum())
        kept += int((masked[target] == ids[target]).sum())
        at_end += bool(target[7])
    assert counts == {6}  # round(0.7 x 8)
    assert 0.77 < hidden / 1800 < 0.83 and 0.07 < kept / 1800 < 0.13
    assert 0.8 < at_end / 300 < 0.92  # six of the seven tokens after [CLS]
    short, mask, _ = Tokenizer(12).encode("one")
    for probability, count in ((0.01, 1), (0.99, 2)):
        _, labels = mask_tokens(short, mask, 30522, probability, np.random.default_rng(0))
        assert (labels >= 0).sum() == count


@pytest.mark.parametrize("micro_batch", [7, 2])
def test_a_step_equals_the_plain_one(micro_batch):
    """Row by row, the loss written out: with the share 0.1 of the target spread over the vocabulary."""
    batch, task, plain = make_batch(invalid=(2,)), make_task(), make_task()
    parallel = parallelize(task, SMALL.cluster, 1, torch.device("cpu"))
    figures = gradients(parallel, batch, Workers((7,)), 4, micro_batch)
    total, count, right = torch.zeros((), dtype=torch.float64), 0, 0
    for i in range(7):
        row = batch.rows(slice(i, i + 1))
        if not row.valid:
            continue
        length = int(row.text_len)
        noise = plain.noise("pair", row.position, 4)
        states = plain.model.encode(
            image=row.image.double() / 127.5 - 1.0, text=row.mlm_ids[:, :length], noise=noise, writing=True
        )
        for place in (row.mlm_labels[0] >= 0).nonzero()[:, 0].tolist():
            log_probs = F.log_softmax(plain.model.mlm(states.text[0, place]), dim=0)
            label = int(row.mlm_labels[0, place])
            total = total - 0.9 * log_probs[label] - 0.1 * log_probs.mean()
            count, right = count + 1, right + int(log_probs.argmax() == label)
    wanted = total / count
    wanted.backward()
    assert float(figures["loss"]) == pytest.approx(float(wanted.detach()), rel=1e-12)
    assert float(figures["accuracy"]) == pytest.approx(right / count) and int(figures["masked_rows"]) == 1
    for (name, a), (_, b) in zip(task.named_parameters(), plain.named_parameters(), strict=True):
        assert (a.grad is not None) == task.trainable(name) == (b.grad is not None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name)


@pytest.mark.slow
def test_two_workers_equal_one(alone, data, tmp_path):
    assert [o.step for o in train_on(2, spec_of(data, tmp_path, micro_batch=2))] == [6, 6]
    same_run(tmp_path, alone, FIGURES)


def test_a_resumed_run_equals_an_uninterrupted_one(alone, data, tmp_path):
    begin_at(tmp_path, alone / "checkpoint-00000004")
    assert train(spec_of(data, tmp_path)).step == 6
    same_run(tmp_path, alone, FIGURES, 4)


def evaluated(task, count: int):
    evaluation = task.evaluation(SCHEMA)
    return evaluation, encoded(evaluation.encoder(), rows(count))


@torch.inference_mode()
def test_captions_are_those_of_a_search_without_a_cache():
    """Twenty images, so several searches; with one beam, the plain search takes the best token each time."""
    task = make_task()
    task.settings = dataclasses.replace(task.settings, beams=1)
    evaluation, batch = evaluated(task, 20)
    found = evaluation.rows(batch)
    for i in range(20):
        image, text = batch.image[i : i + 1].double() / 127.5 - 1.0, [CLS_ID]
        best, best_score, total = [], -np.inf, 0.0
        for count in range(11):
            ids = torch.tensor([[*text, MASK_ID]])
            states = task.model.encode(image=image, text=ids, writing=True).text
            log_probs = task.model.mlm(states[0, -1]).log_softmax(dim=0)
            score = (total + float(log_probs[SEP_ID])) / (count + 2) ** 0.6
            if count and score > best_score:
                best, best_score = text[1:], score
            log_probs[[0, 100, CLS_ID, MASK_ID, SEP_ID]] = -torch.inf
            total += float(log_probs.max())
            text.append(int(log_probs.argmax()))
        assert found["caption"][i].tolist() == best + [SEP_ID] * (11 - len(best))
        assert float(found["score"][i]) == pytest.approx(best_score, rel=1e-9)


def test_scores_are_those_of_the_captions():
    evaluation, batch = evaluated(make_task(), 7)
    with torch.inference_mode():
        found = {name: tensor.numpy() for name, tensor in evaluation.rows(batch).items()} | {"id": np.array(batch.ids)}
    said = [sentence(ids) for ids in found["caption"]]
    references = [row["captions"] for row in rows(7)]
    assert [references_of(row) for row in found["references"]] == references
    wanted = caption_scores(said, references)
    halves = [{name: values[part] for name, values in found.items()} for part in (slice(0, 3), slice(3, 7))]
    scores = evaluation.score(iter(halves))
    assert {name: score.value for name, score in scores.items()} == wanted
    assert {"bleu_4", "rouge_l", "cider"} <= set(scores) and scores["cider"].count == 7
    assert list(evaluation.predictions(found)["prediction"]) == said
    alone = make_task(PAIRS).evaluation(Schema((Field("image", "image"),)))
    with torch.inference_mode():
        bare = {name: tensor.numpy() for name, tensor in alone.rows(batch).items()}
    np.testing.assert_array_equal(bare["caption"], found["caption"])
    assert alone.score(iter([bare])) == {}


def test_words_that_the_tokenizer_takes_apart_are_put_together():
    ids, _, _ = Tokenizer(30).encode("A man's red T-shirt, 'big' dalmatians - two of them")
    assert sentence(ids) == "a man's red t-shirt , ' big ' dalmatians-two of them"


def test_data_without_references_have_predictions_and_rate_no_checkpoint(alone, data, tmp_path, capsys):
    kept = ({name: row[name] for name in ("id", "image_id", "image")} | {"text": "a dog"} for row in rows(6))
    write_dataset(str(tmp_path / "val"), kept, schema=PAIRS)
    begin_at(tmp_path / "run", alone / "checkpoint-00000004")
    assert train(dataclasses.replace(spec_of(data, tmp_path / "run"), eval_data=str(tmp_path / "val"))).step == 6
    [(_, result)] = read_evaluations(Store(str(tmp_path / "run")))
    assert result.scores == {} and result.num_rows == 6
    shown = capsys.readouterr().out
    assert "evaluation at step 6: predictions alone" in shown and "best evaluation" not in shown
    [(_, scored)] = read_evaluations(Store(str(alone)))
    assert next(iter(scored.scores)) == "cider"  # by which checkpoints are rated


def test_what_does_not_fit_is_refused(tmp_path):
    evaluation = make_task().evaluation(SCHEMA)
    results = json.loads(evaluation.submission(["COCO_val2014_000000391895.jpg"], ["a man"]))
    assert results == [{"image_id": 391895, "caption": "a man"}]
    results = json.loads(evaluation.submission(["COCO_val2014_000000391895.jpg#770337"], ["a man"]))
    assert results == [{"image_id": 391895, "caption": "a man"}]
    for ids in (["a_7.jpg#1", "a_7.jpg#2"], ["667626_18933d713e.jpg", "667627_713.jpg"]):
        with pytest.raises(UserError, match=f"'{ids[0]}' and '{ids[1]}' would both be image (7|713), .*together"):
            evaluation.submission(ids, ["a man", "a dog"])
    with pytest.raises(UserError, match="'photo' has no number"):
        evaluation.submission(["photo"], ["a man"])
    with pytest.raises(UserError, match="'captions' or a 'text' column"):
        make_task(Schema((Field("image", "image"),)))
    long = Record("1", "1", {"image": make_image(1), "captions": ["word " * 2000]})
    with pytest.raises(RecordError, match="more than 8192 bytes"):
        CaptionedImages(16, True, CONFIG.data)(long, None)


def test_what_captions_of_scenes_say_is_read_back():
    for index in range(300):
        for caption in captions(scene(2, index), 4):
            said = caption.claim
            shapes = tuple(ShapeClaim(shape.kind, shape.colour, shape.size) for shape in said.shapes)
            found = read(caption.text)
            assert (found.shapes, found.background, found.pattern) == (shapes, said.background, said.pattern)
    assert read("a dog on the sofa").shapes == ()
