"""Grounding: the map against attention written out for one pair, answers against slow definitions, boxes of scenes
against their pixels, and a run."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import make_image
from small_run import SMALL, job, train_on

from vlmo_ray.config import ClusterConfig, Config, DataConfig, OptimConfig, Phase, check
from vlmo_ray.data.batch import Batch
from vlmo_ray.data.decode import decode_eval, decode_train
from vlmo_ray.data.encoders import Draw
from vlmo_ray.data.encoders.grounding import MAX_PROPOSALS, Regions
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.reader import Reader, Sources, whole_chunk
from vlmo_ray.data.schema import PAIRS, Field, Record, Schema
from vlmo_ray.data.store import Store
from vlmo_ray.demo.scenes import render
from vlmo_ray.demo.scenes.captions import ADJECTIVES, NOUNS
from vlmo_ray.demo.scenes.grounding import GROUNDING, box_of, expressions, records
from vlmo_ray.demo.scenes.world import Shape, scene
from vlmo_ray.errors import RecordError, UserError
from vlmo_ray.model.vlmo import VLMo, init_weights
from vlmo_ray.recipes import RECIPES, recipe
from vlmo_ray.recipes.grounding import GroundingConfig, attended_layer
from vlmo_ray.runs.evaluations import read_evaluations
from vlmo_ray.runs.load import load_all
from vlmo_ray.runs.metrics import read_metrics
from vlmo_ray.tasks import build_evaluation
from vlmo_ray.tasks.grounding import Grounding, best_proposal, iou, peak, region_of
from vlmo_ray.tasks.task import pixels
from vlmo_ray.train.loop import train

MODEL = dataclasses.replace(SMALL.model, depth=3, vl_start=2, image_size=24, heads=("itc", "itm"))  # 3 x 3 patches
PROPOSED = Schema((*GROUNDING.fields, Field("proposals", "boxes")))


def make_model(**changes) -> VLMo:
    model = VLMo(dataclasses.replace(MODEL, **changes)).double()
    init_weights(model, 4)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


def make_batch(rows: int = 7) -> Batch:
    draw = torch.Generator().manual_seed(6)
    length = torch.randint(3, 10, (rows, 1), generator=draw)
    corner = torch.rand(rows, 2, generator=draw) * 20
    columns = {
        "image": torch.randint(0, 256, (rows, 3, 24, 24), generator=draw, dtype=torch.uint8),
        "text_ids": torch.randint(5, 1000, (rows, 12), generator=draw),
        "text_mask": torch.arange(12) < length,
        "size": torch.tensor([[60, 45]]).repeat(rows, 1),
        "box": torch.cat([corner, corner + 5 + 20 * torch.rand(rows, 2, generator=draw)], dim=1),
    }
    return Batch(columns, torch.ones(rows, dtype=torch.bool), torch.arange(rows), list("abcdefg")[:rows], [""] * rows)


# ---- the map ---------------------------------------------------------------------------------------------


def plain_map(model: VLMo, layer: int, image: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Of one pair without padding: (map [g,g], probability). Every head of every layer is written out."""
    config, num_text = model.config, len(ids)
    x = torch.cat([model.embed_text(ids[None]), model.embed_image(image[None].double() / 127.5 - 1)], dim=1)[0]
    bias = None if model.relative is None else model.relative(num_text, True)  # [L,H,S,S]
    d, watched = config.width // config.num_heads, []
    for index, block in enumerate(model.layers):
        attend, normed, heads = block.attention, block.attention_norm(x), []
        w_q, w_k, w_v = attend.qkv.weight.split(config.width)
        for h in range(config.num_heads):
            part = slice(h * d, (h + 1) * d)
            q, k = normed @ w_q[part].T + attend.q_bias[part], normed @ w_k[part].T
            logits = q @ k.T / math.sqrt(d)
            weights = (logits if bias is None else logits + bias[index, h]).softmax(dim=1)
            if index == layer:
                watched.append(weights)
            heads.append(weights @ (normed @ w_v[part].T + attend.v_bias[part]))
        scale = (lambda y, s: y) if block.attention_scale is None else (lambda y, s: y * s)
        x = x + scale(attend.out(torch.cat(heads, dim=1)), block.attention_scale)
        if index < config.vl_start:
            parts = block.experts["text"](x[:num_text]), block.experts["image"](x[num_text:])
            x = x + scale(torch.cat(parts), block.expert_scale)
        else:
            x = x + scale(block.experts["vl"](x), block.expert_scale)
    no, yes = model.itm(model.pooler(model.norm(x)[:1]))[0]
    side = config.image_size // config.patch_size
    heat = torch.zeros(side * side, dtype=torch.float64)
    for weights, gradient in zip(watched, torch.autograd.grad(yes, watched), strict=True):
        for token, patch in itertools.product(range(num_text), range(side * side)):
            at = token, num_text + 1 + patch
            heat[patch] += weights[at].detach() * max(0.0, float(gradient[at])) / (config.num_heads * num_text)
    return heat.view(side, side), float((yes - no).sigmoid().detach())


@pytest.mark.parametrize("layer", [0, 1, 2, -1])
@pytest.mark.parametrize("changes", [{}, {"position": "absolute", "layer_scale": None}])
def test_the_map_is_attention_times_gradient(layer, changes):
    model, batch = make_model(**changes), make_batch()
    columns = batch.image, batch.text_ids, batch.text_mask
    own = 2 if layer == -1 else layer
    plain = [plain_map(model, own, image, ids[mask]) for image, ids, mask in zip(*columns, strict=True)]
    heat, match = Grounding(model, GROUNDING, layer).maps(*columns)
    torch.testing.assert_close(heat, torch.stack([one for one, _ in plain]), rtol=0, atol=1e-9)
    assert match.tolist() == pytest.approx([probability for _, probability in plain], abs=1e-6)
    assert float(heat.amax(dim=(1, 2)).min()) > 1e-5, "maps of nothing say nothing"
    single, _ = Grounding(model.float(), GROUNDING, layer).maps(*columns)
    torch.testing.assert_close(single.double(), heat, rtol=0, atol=1e-5)
    assert not heat.requires_grad and all(p.grad is None for p in model.parameters())
    assert not model.layers[own].attention._forward_hooks


def test_rows_depend_neither_on_their_batch_nor_on_padding():
    """In inference mode, as on a GPU, where the columns are made in it."""
    evaluation, batch = Grounding(make_model(), GROUNDING), make_batch()
    with torch.inference_mode():
        batch = batch.with_columns(**{name: column.clone() for name, column in batch.columns.items()})
        whole = evaluation.rows(batch)
        parts = [evaluation.rows(batch.rows(slice(*span))) for span in ((0, 1), (1, 5), (5, 7))]
    for name, values in whole.items():
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), values, rtol=0, atol=1e-9)
    image, ids, mask = batch.image, batch.text_ids, batch.text_mask
    heat = evaluation.maps(image, ids, mask)[0]
    other = evaluation.maps(image, ids.masked_fill(~mask, 7), mask)[0]
    torch.testing.assert_close(other, heat, rtol=0, atol=1e-9)


def test_a_frozen_and_compiled_layer_is_read_too():
    """A compiled layer ignores hooks that come later."""
    model, batch = make_model(), make_batch(3)
    columns = batch.image, batch.text_ids, batch.text_mask
    heat = Grounding(model, GROUNDING).maps(*columns)[0]
    model.requires_grad_(False)
    layer = model.layers[2]  # the one that is read
    layer.forward = torch.compile(layer.forward, backend="eager")
    with torch.no_grad():
        model.encode(image=pixels(model, columns[0]), text=columns[1], text_mask=columns[2], read=1)
    torch.testing.assert_close(Grounding(model, GROUNDING).maps(*columns)[0], heat, rtol=0, atol=1e-9)


# ---- answers ---------------------------------------------------------------------------------------------


def plain_iou(a, b) -> float:
    """REFER's, on boxes x, y, w, h with whole numbers: counts pixels."""
    inside = [max(a[i], b[i]) for i in (0, 1)], [min(a[i] + a[i + 2] - 1, b[i] + b[i + 2] - 1) for i in (0, 1)]
    (x0, y0), (x1, y1) = inside
    both = (x1 - x0 + 1) * (y1 - y0 + 1) if x0 < x1 and y0 < y1 else 0
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def test_iou_is_that_of_refer():
    draw = np.random.default_rng(1)
    boxes = np.concatenate([draw.integers(0, 9, (400, 2)), draw.integers(1, 9, (400, 2))], axis=1)
    first, second = boxes[:200], boxes[200:]
    corners = [torch.tensor(np.concatenate([b[:, :2], b[:, :2] + b[:, 2:]], axis=1)).double() for b in (first, second)]
    slow = [plain_iou(a.tolist(), b.tolist()) for a, b in zip(first, second, strict=True)]
    assert iou(*corners).tolist() == pytest.approx(slow, abs=1e-12)
    assert 0 < sum(value == 0 for value in slow) < 200


def test_peak_and_region_are_those_of_loops():
    draw = torch.Generator().manual_seed(2)
    heat = torch.rand(60, 5, 5, generator=draw) ** 4
    heat[7] = 0
    for one, point, box in zip(heat, peak(heat), region_of(heat), strict=True):
        cells = [(float(one[r, c]), c, r) for r in range(5) for c in range(5)]
        most, col, row = max(cells)
        high = [(c, r) for value, c, r in cells if value > most / 2]
        cols, rows = ([cell[i] for cell in high] or [0, 4] for i in (0, 1))
        assert box.tolist() == [min(cols) / 5, min(rows) / 5, (max(cols) + 1) / 5, (max(rows) + 1) / 5]
        assert point.tolist() == ([(col + 0.5) / 5, (row + 0.5) / 5] if most else [0.5, 0.5])


def cubic(t: float) -> float:
    """Keys' kernel with a = -0.75, which torch interpolates with."""
    a, t = -0.75, abs(t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def enlarged(heat: np.ndarray, width: int, height: int) -> np.ndarray:
    """Bicubic, pixel by pixel; the border is repeated."""
    side = len(heat)

    def of(pixel: int, size: int) -> list[tuple[int, float]]:
        at = (pixel + 0.5) * side / size - 0.5
        near = range(math.floor(at) - 1, math.floor(at) + 3)
        return [(min(max(i, 0), side - 1), cubic(at - i)) for i in near]

    return np.array(
        [[sum(u * v * heat[r, c] for r, u in of(y, height) for c, v in of(x, width)) for x in range(width)]
         for y in range(height)]
    )  # fmt: skip


def test_the_best_proposal_has_the_most_of_the_map():
    draw = np.random.default_rng(3)
    chosen = set()
    for _ in range(40):
        heat = draw.random((4, 4)) ** 3
        shown = enlarged(heat, 13, 9)
        corner, side = draw.random((6, 2)) * (8, 5), draw.random((6, 2)) * (5, 4) + 0.6
        boxes = np.concatenate([corner, corner + side], axis=1)
        scores = [
            sum(shown[y, x] for y in range(int(y0), int(y1)) for x in range(int(x0), int(x1)))
            / math.sqrt((x1 - x0) * (y1 - y0))
            for x0, y0, x1, y1 in boxes
        ]
        found = best_proposal(torch.from_numpy(heat), torch.from_numpy(boxes), 13, 9)
        assert found == int(np.argmax(scores))
        chosen.add(found)
    assert len(chosen) > 2
    boxes = torch.tensor([[0.0, 0.0, 5.0, 5.0]]).double()
    assert best_proposal(torch.zeros(4, 4), boxes, 13, 9) == -1
    assert best_proposal(torch.ones(4, 4), boxes[:0], 13, 9) == -1


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Expressions about scenes of 32 px, the shapes' boxes as proposals; the last record has none, one has no box."""
    rows = list(records(3, 13, image_size=32))
    shapes = {row["image_id"]: [] for row in rows}
    for row in rows:
        shapes[row["image_id"]] += row["boxes"]
    rows = [row | {"proposals": shapes[row["image_id"]]} for row in rows]
    rows[-1]["proposals"], rows[4]["boxes"] = [], []
    uri = str(tmp_path_factory.mktemp("grounding"))
    return uri, write_dataset(uri, rows, rows_per_group=5, schema=PROPOSED), rows


def test_scores_are_shares_of_the_answers(data):
    """The map of each record, and its answers by the definitions above; the record without a box is left out."""
    _, manifest, stored = data
    model = make_model(image_size=32, vocab_size=30522)
    evaluation = build_evaluation("grounding", model, PROPOSED, layer=0)
    sources = Sources((manifest,))
    reader, blocks, kept, hits = Reader(sources.places, evaluation.encoder()), [], [], []
    for index in range(sources.num_chunks):
        columns = reader(whole_chunk(sources, index))
        batch = Batch.from_numpy(columns)
        with torch.inference_mode():
            rows = evaluation.rows(batch)
        heat = evaluation.maps(batch.image, batch.text_ids, batch.text_mask)[0]
        valid = columns["valid"]
        blocks.append({name: values.numpy()[valid] for name, values in rows.items()} | {"id": columns["id"][valid]})
        kept += [(heat[i], columns["id"][i]) for i in np.flatnonzero(valid)]
    by_id = {row["id"]: row for row in stored}
    assert [name for _, name in kept] == [row["id"] for i, row in enumerate(stored) if i != 4]

    points, regions, accuracy, chance, answers = [], [], [], [], []
    for heat, name in kept:
        row = by_id[name]
        x0, y0, x1, y1 = (truth := row["boxes"][0])
        (x, y), region = (peak(heat[None])[0] * 32).tolist(), (region_of(heat[None])[0] * 32).tolist()
        points.append(x0 <= x <= x1 and y0 <= y <= y1)
        as_refer = [x0, y0, x1 - x0, y1 - y0]

        def right(box, truth=as_refer):
            return plain_iou([box[0], box[1], box[2] - box[0], box[3] - box[1]], truth) >= 0.5

        offered = row["proposals"] or [[0, 0, 32, 32]]
        best = best_proposal(heat, torch.tensor(offered).double(), 32, 32)
        regions.append(right(region))
        accuracy.append(right(offered[max(best, 0)]))
        chance.append(np.mean([right(box) for box in offered]))
        hits.append((x1 - x0) * (y1 - y0) / 32**2)
        answers.append((" ".join(map(str, offered[max(best, 0)])), " ".join(map(str, truth))))
    scores = evaluation.score(blocks)
    assert {name: score.count for name, score in scores.items()} == dict.fromkeys(scores, 12)
    assert list(scores) == ["accuracy", "pointing", "threshold_iou50"]
    assert scores["accuracy"].value == np.mean(accuracy) and 0 < np.mean(accuracy) < 1
    assert scores["accuracy"].chance == pytest.approx(np.mean(chance))
    assert scores["pointing"].value == np.mean(points) and scores["pointing"].chance == pytest.approx(np.mean(hits))
    assert scores["threshold_iou50"].value == np.mean(regions)
    assert scores["threshold_iou50"].chance == np.mean(np.array(hits) >= 0.5)
    predicted = [evaluation.predictions(block) for block in blocks]
    told = [pair for block in predicted for pair in zip(block["prediction"], block["truth"], strict=True)]
    assert told == answers and evaluation.remark(scores) == ""

    without = build_evaluation("grounding", model, GROUNDING, layer=0)
    assert "proposals" not in without.encoder().fields
    scores = without.score([{name: block[name] for name in ("hit", "covered", "region_iou")} for block in blocks])
    assert list(scores) == ["pointing", "threshold_iou50"] and "cannot be computed" in without.remark(scores)


# ---- records ---------------------------------------------------------------------------------------------


def test_the_encoder_keeps_boxes_as_they_are_stored():
    values = {"image": make_image(1, "PNG", (30, 20)), "text": "a b", "boxes": [[1.5, 2.0, 9.25, 8.0]]}
    values["proposals"] = [[0.0, 0.0, 3.0, 4.0], [1.0, 2.0, 5.5, 6.0]]
    row = Regions(24, 12, DataConfig(), True)(Record("a", "a", values), None)
    assert row["size"] == (30, 20) and row["box"] == [1.5, 2.0, 9.25, 8.0] and row["num_proposals"] == 2
    np.testing.assert_array_equal(row["proposals"][:3], [*values["proposals"], [0.0] * 4])
    np.testing.assert_array_equal(row["image"], decode_eval(values["image"], 24, DataConfig()))
    for name, boxes, words in (
        ("boxes", [], "no box"),
        ("boxes", [[0, 0, 1, 1]] * 2, "several boxes"),
        ("boxes", [[2, 2, 31.5, 8]], "leaves the image"),
        ("boxes", [[2, -1.5, 9, 8]], "leaves the image"),
        ("boxes", [[0.1, 0.2, 0.5, 1.0]], "in fractions of the image"),
        ("proposals", [[0, 0, 1, 1]] * (MAX_PROPOSALS + 1), "more than 100 proposals"),
    ):
        with pytest.raises(RecordError, match=words):
            Regions(24, 12, DataConfig(), True)(Record("a", "a", values | {name: boxes}), None)


@pytest.mark.parametrize("image_size", [16, 37])
def test_boxes_of_scenes_hold_the_pixels_of_the_shape(image_size, monkeypatch):
    """Those that change when the shape is painted brighter, and nothing else; neither tone is near 0 or 255."""
    for name, tone in (("dark", 64), ("bright", 192)):
        monkeypatch.setitem(render.PALETTE, name, (tone,) * 3)
    for index in range(40):
        shown = scene(2, index, image_size=image_size)
        for number, shape in enumerate(shown.shapes):
            painted = []
            for tone in ("dark", "bright"):
                shapes = list(shown.shapes)
                shapes[number] = dataclasses.replace(shape, colour=tone)
                painted.append(dataclasses.replace(shown, shapes=tuple(shapes)).image)
            y, x = np.nonzero((painted[0] != painted[1]).any(axis=2))
            assert box_of(shape, image_size) == [x.min(), y.min(), x.max() + 1, y.max() + 1]


def fits(words: list[str], shape: Shape) -> bool:
    """Whether the words, by the dictionaries of captions, are true of a shape."""
    known = {
        word: (name, value)
        for name, values in (("kind", NOUNS), ("size", ADJECTIVES))
        for value, spelled in values.items()
        for word in spelled
    }
    told = [known.get(word, ("colour", word)) for word in words if word not in ("the", "shape", "object")]
    return all(getattr(shape, name) == value for name, value in told)


def test_an_expression_is_true_of_one_shape():
    seen = set()
    for index in range(60):
        shown = scene(5, index, "eval")
        for expression, shape in zip(expressions(shown), shown.shapes, strict=True):
            assert [s for s in shown.shapes if fits(expression.text.split(), s)] == [shape] == [expression.shape]
            seen.add(expression.text)
    assert len(seen) > 60 and {"the large shape", "the big object"} & seen
    found = list(records(5, 9, "eval"))
    assert len(found) == 9 and list(records(5, 4, "eval")) == found[:4]
    assert all("crop" in row["forbid"] and "geometric" in row["forbid"] for row in found)
    assert min(sum(row["image_id"] == other["image_id"] for row in found[:6]) for other in found[:6]) > 1


# ---- training --------------------------------------------------------------------------------------------


def test_training_sees_whole_images():
    image = make_image(2, "PNG", (50, 31))
    for name in (name for name in RECIPES if name.startswith("grounding")):
        config = dataclasses.replace(recipe(name).data, flip=False, randaugment_ops=0)
        for position in range(3):
            shown = decode_train(image, 24, config, (), Draw(1, 0, position))
            np.testing.assert_array_equal(shown, decode_eval(image, 24, config))


def small_recipe(**changes) -> Config:
    config = recipe("grounding_tiny")
    model = dataclasses.replace(config.model, width=24, num_heads=2)
    return dataclasses.replace(
        config, model=model, phases=(Phase(3, 4),), slice_size=2, micro_batch=2, checkpoint_every=3,
        optim=OptimConfig(peak_lr=1e-2, warmup_steps=1), task=GroundingConfig(layer=1), **changes,
    )  # fmt: skip


@pytest.mark.slow
def test_two_workers_equal_one(data, tmp_path):
    def run(name: str, world: int):
        config = small_recipe(precision="float64", evaluate_every=3)
        spec = dataclasses.replace(job(data[0], tmp_path / name, config), eval_data=data[0])
        outcomes = [train(spec)] if world == 1 else train_on(world, spec)
        assert all(outcome.step == 3 and not outcome.stopped for outcome in outcomes), outcomes
        store = Store(str(tmp_path / name))
        return read_metrics(store)[0], read_evaluations(store)

    (alone, result), (metrics, other) = run("alone", 1), run("two", 2)
    for name in ("loss", "itc", "itm", "grad_norm"):
        np.testing.assert_allclose([m[name] for m in metrics], [m[name] for m in alone], rtol=1e-9)
    assert other == result and result[0][1].num_rows == 12


def test_a_run_is_evaluated_on_the_way(data, tmp_path):
    """Which changes nothing of it; both with the layer of the recipe."""
    uri, config = data[0], small_recipe()
    plain = job(uri, tmp_path / "plain", config)
    watched = dataclasses.replace(job(uri, tmp_path / "watched", config, evaluate_every=3), eval_data=uri)
    assert train(plain).step == train(watched).step == 3
    one, two = (load_all(str(tmp_path / name)).model for name in ("plain", "watched"))
    start = VLMo(config.model)
    init_weights(start, config.seed)
    moved = 0
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name
        moved += not torch.equal(value, start.state_dict()[name])
    assert moved > 0.9 * len(one.state_dict())
    [(step, result)] = read_evaluations(Store(str(tmp_path / "watched")))
    assert step == 3 and result.num_rows == 12 and len(result.problems) == 1

    evaluation, sources = Grounding(two, PROPOSED, 1), Sources((data[1],))
    reader, blocks = Reader(sources.places, evaluation.encoder()), []
    for index in range(sources.num_chunks):
        batch = Batch.from_numpy(reader(whole_chunk(sources, index)))
        blocks.append({name: values[batch.valid].numpy() for name, values in evaluation.rows(batch).items()})
    assert {name: score.value for name, score in evaluation.score(blocks).items()} == {
        name: score.value for name, score in result.scores.items()
    }


# ---- refusals --------------------------------------------------------------------------------------------


def test_the_layer_by_default():
    for size, layer in (("base", 10), ("large", 21)):
        assert attended_layer(recipe(f"grounding_refcoco_plus_{size}").model) == layer
    assert attended_layer(recipe("grounding_tiny").model) == 3  # the last
    assert attended_layer(dataclasses.replace(MODEL, vl_start=MODEL.depth)) == MODEL.depth - 1


def test_mistakes_are_sentences():
    model = make_model()
    with pytest.raises(UserError, match=r"layer=3 is none of the model's 3 layers"):
        build_evaluation("grounding", model, GROUNDING, layer=3)
    for value in ("top", 2.5, True):
        with pytest.raises(UserError, match=f"layer={value!r} of grounding is not a whole number"):
            build_evaluation("grounding", model, GROUNDING, layer=value)
    with pytest.raises(UserError, match="no matching head"):
        build_evaluation("grounding", make_model(heads=("itc",)), GROUNDING)
    with pytest.raises(UserError, match=r"in layer=1 .* no text attends to an image .* name one from 2 on"):
        build_evaluation("grounding", make_model(attention="separate"), GROUNDING, layer=1)
    evaluation = build_evaluation("grounding", model, PAIRS)
    with pytest.raises(UserError, match="no column 'boxes'"):
        Reader((("there", PAIRS),), evaluation.encoder())
    config = recipe("grounding_tiny")
    with pytest.raises(UserError, match="layer=4 is none"):
        check(dataclasses.replace(config, task=GroundingConfig(layer=4)))
    sharded = ClusterConfig(strategy="fsdp")
    check(dataclasses.replace(config, cluster=sharded))
    with pytest.raises(UserError, match="cannot be evaluated inside a run"):
        check(dataclasses.replace(config, cluster=sharded, evaluate_every=5))
