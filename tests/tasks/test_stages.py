"""The vision and the language stage: masks, losses and gradients against plain ones, what trains, workers, a resume."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_image
from safetensors.torch import load as load_tensors
from small_run import SMALL, begin_at, job, train_on

from vlmo_ray.config import DataConfig, OptimConfig, Phase
from vlmo_ray.data.batch import Batch
from vlmo_ray.data.encoders import Draw
from vlmo_ray.data.encoders.patches import MaskedImages, blocks, random_units
from vlmo_ray.data.encoders.texts import MaskedTexts
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.schema import Field, Record, Schema
from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError
from vlmo_ray.model.vlmo import VLMo, init_weights
from vlmo_ray.objectives.gather import Workers
from vlmo_ray.recipes.language import LanguageConfig
from vlmo_ray.recipes.vision import VisionConfig
from vlmo_ray.runs.evaluations import read_evaluations
from vlmo_ray.runs.metrics import read_metrics
from vlmo_ray.tasks import build_task
from vlmo_ray.tasks.vision import normalised, patches
from vlmo_ray.train.build import starting_task
from vlmo_ray.train.loop import train
from vlmo_ray.train.optim import WeightAverage, build_optimizer
from vlmo_ray.train.parallel import parallelize
from vlmo_ray.train.step import gradients

SCHEMAS = {"vision": Schema((Field("image", "image"),)), "language": Schema((Field("text", "text"),))}
MODEL = dataclasses.replace(SMALL.model, drop_path=0.1)
BASE = dataclasses.replace(
    SMALL,
    phases=(Phase(10, 8),),
    data=DataConfig(randaugment_ops=0),
    optim=OptimConfig(peak_lr=3e-3, warmup_steps=2),
    checkpoint_every=4,
    evaluate_every=5,
    precision="float64",
)
CONFIGS = {
    "vision": dataclasses.replace(
        BASE, name="vision", model=dataclasses.replace(MODEL, heads=(), patch_size=4), task=VisionConfig()
    ),
    "tokens": dataclasses.replace(
        BASE,
        name="vision",
        model=dataclasses.replace(MODEL, heads=(), patch_size=4),
        task=VisionConfig(target="test_stages:Brightness", mask="block", mask_share=0.4),
    ),
    "features": dataclasses.replace(
        BASE,
        name="vision",
        model=dataclasses.replace(MODEL, heads=(), patch_size=4),
        task=VisionConfig(target="features"),
        optim=dataclasses.replace(BASE.optim, average_decay=0.9),
    ),
    "language": dataclasses.replace(
        BASE, name="language", model=dataclasses.replace(MODEL, heads=("mlm",), vocab_size=30522), task=LanguageConfig()
    ),
}
WORDS = ["red", "blue", "green", "small", "large", "circle", "square", "above", "below", "dalmatian"]


class Brightness:
    """Five steps of the mean of a patch."""

    vocab_size = 5

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return ((patches(image, 4).mean(dim=2) + 1) / 2 * 4.999).long()


def schema_of(kind: str) -> Schema:
    return SCHEMAS["language" if kind == "language" else "vision"]


def make_rows(kind: str, first: int, count: int):
    for i in range(first, first + count):
        words = np.random.default_rng(i).choice(WORDS, 6)
        own = {"text": " ".join(words)} if kind == "language" else {"image": make_image(i)}
        yield {"id": f"{i}", "image_id": "" if kind == "language" else f"{i}"} | own


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, tuple[str, str]]:
    found = {}
    for kind in CONFIGS:
        folder = tmp_path_factory.mktemp(kind)
        for name, first, count in (("train", 0, 45), ("val", 100, 22)):
            rows = make_rows(kind, first, count)
            write_dataset(str(folder / name), rows, rows_per_group=5, groups_per_shard=2, schema=schema_of(kind))
        found[kind] = str(folder / "train"), str(folder / "val")
    return found


def spec_of(kind: str, data, run, **changes):
    return dataclasses.replace(job(data[kind][0], run, CONFIGS[kind], **changes), eval_data=data[kind][1])


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """The runs of one process."""
    found = {}
    for kind in CONFIGS:
        found[kind] = tmp_path_factory.mktemp(f"{kind}-alone")
        outcome = train(spec_of(kind, data, found[kind]))
        assert outcome.step == 10, outcome
    return found


def make_task(kind: str):
    config = CONFIGS[kind]
    model = VLMo(config.model)
    init_weights(model, 3)
    return build_task(model, config, schema_of(kind)).double()


def make_batch(kind: str, invalid=(2,)) -> Batch:
    encoder = make_task(kind).encoder()
    rows = []
    for i, values in enumerate(make_rows(kind, 0, 7)):
        record = Record(values["id"], values["image_id"], values)
        rows.append(encoder(record, Draw(1, 2, i)))
    columns = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
    columns = {name: c.long() if c.dtype == torch.int32 else c for name, c in columns.items()}
    valid = torch.ones(7, dtype=torch.bool)
    valid[list(invalid)] = False
    return Batch(columns, valid, torch.arange(7), [str(i) for i in range(7)], [""] * 7)


def plain_loss(kind: str, task, batch: Batch) -> torch.Tensor:
    """Row by row: the mean over all masked places of valid rows."""
    errors, teacher = [], copy.deepcopy(task.model)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(0.8)
    for i in range(len(batch)):
        if not batch.valid[i]:
            continue
        row = batch.rows(slice(i, i + 1))
        if kind == "language":
            noise = task.noise("text", row.position, 4)
            states = task.model.encode(text=row.mlm_ids, text_mask=row.text_mask, noise=noise).text[0]
            for t, label in enumerate(row.mlm_labels[0].tolist()):
                if label >= 0:
                    errors.append(-F.log_softmax(task.model.mlm(states[t]), dim=-1)[label])
            continue
        image = row.image.double() / 127.5 - 1
        tokens = task.model.embed_image(image).clone()
        shown = task.model.modality.weight[1] + task.mask_token[0, 0]
        for place in row.masked[0].nonzero()[:, 0].tolist():
            tokens[0, 1 + place] = shown
        states = task.model.encode(image=tokens, noise=task.noise("image", row.position, 4)).image[0]
        for place in row.masked[0].nonzero()[:, 0].tolist():
            y, x = divmod(place, 4)
            patch = image[0, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
            found = task.head(states[1 + place])
            if kind == "features":
                states_of = teacher.encode(image=image).image[0, 1 + place]
                wanted = (states_of - states_of.mean()) / (states_of.var(correction=0) + 1e-6).sqrt()
                errors.append((found - wanted.detach()).square().mean())
            elif kind == "tokens":
                errors.append(-F.log_softmax(found, dim=-1)[int((patch.mean() + 1) / 2 * 4.999)])
            else:
                values = (patch - patch.mean()) / (patch.var(correction=0) + 1e-6).sqrt()
                errors.append((found - values.flatten()).square().mean())
    return torch.stack(errors).mean() if errors else 0 * sum(p.sum() for p in task.parameters())


@pytest.mark.parametrize("micro_batch", [7, 3, 1])
@pytest.mark.parametrize("invalid", [(), (2,), tuple(range(7))], ids=["all", "one not", "none"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_step_equals_the_plain_one(kind, micro_batch, invalid):
    batch, task, plain = make_batch(kind, invalid), make_task(kind), make_task(kind)
    parallel = parallelize(task, BASE.cluster, 1, torch.device("cpu"))
    average = WeightAverage(task, 0.9) if kind == "features" else None
    for name, tensor in average.tensors.items() if average else ():
        tensor.mul_(0.8 if name.startswith("model.") else 1.0)
    figures = gradients(parallel, batch, Workers((7,)), 4, micro_batch, average=average)
    wanted = plain_loss(kind, plain, batch)
    wanted.backward()
    assert float(figures["loss"]) == pytest.approx(wanted.item(), rel=1e-12)
    assert int(figures["masked_rows"]) == len(invalid)
    for (name, a), (_, b) in zip(task.named_parameters(), plain.named_parameters(), strict=True):
        assert (a.grad is not None) == task.trainable(name), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad if b.grad is not None else torch.zeros_like(b), msg=name)


LISTED = {
    "language": ("text_embed", "modality", "relative", "norm", "mlm", "layers.#.experts.text"),
    "vision": ("image_embed", "modality", "relative", "norm", "layers.#.attention", "layers.#.attention_norm",
               "layers.#.attention_scale", "layers.#.expert_scale", "layers.#.experts.image"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["vision", "language"])
def test_only_the_listed_parts_train(kind):
    """After 20 steps every other tensor has the same bits, and no state in the optimizer."""
    task, before = make_task(kind), make_task(kind).state_dict()
    parallel = parallelize(task, BASE.cluster, 1, torch.device("cpu"))
    optimizer = build_optimizer(task, CONFIGS[kind])
    for step in range(20):
        gradients(parallel, make_batch(kind), Workers((7,)), step, 7)
        optimizer.step()
        optimizer.zero_grad()
    trained = {name for name, value in task.state_dict().items() if not torch.equal(value, before[name])}

    def listed(name: str) -> bool:
        parts = name.removeprefix("model.").split(".")
        parts[1:2] = ["#"] if parts[0] == "layers" else parts[1:2]
        return not name.startswith("model.") or any(f"{'.'.join(parts)}.".startswith(f"{p}.") for p in LISTED[kind])

    assert trained == {name for name, _ in task.named_parameters() if listed(name)}
    assert len(optimizer.state) == len(trained)
    # of shared tables, the other modality's rows stay
    other = 1 if kind == "language" else 0
    assert torch.equal(task.model.modality.weight[other], before["model.modality.weight"][other])


def curve(run) -> np.ndarray:
    names = ("loss", "grad_norm", "lr")
    return np.array([[m[name] for name in names] for m in read_metrics(Store(str(run)))[0]])


def assert_same(run, wanted, first=0) -> None:
    np.testing.assert_allclose(curve(run), curve(wanted)[first:], rtol=1e-9)
    found, expected = (load_tensors(Store(str(r)).read("model/model.safetensors")) for r in (run, wanted))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    found, expected = (dict(read_evaluations(Store(str(r)))) for r in (run, wanted))
    assert 10 in found
    for step, result in found.items():
        for name, score in result.scores.items():
            assert score.value == pytest.approx(expected[step].scores[name].value, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", ["vision", "features", "language"])
def test_two_workers_equal_one(kind, alone, data, tmp_path, strategy):
    cluster = dataclasses.replace(BASE.cluster, strategy=strategy)
    outcomes = train_on(2, spec_of(kind, data, tmp_path, cluster=cluster, micro_batch=2))
    assert [outcome.step for outcome in outcomes] == [10, 10], outcomes
    assert_same(tmp_path, alone[kind])


@pytest.mark.parametrize("kind", ["vision", "features", "language"])
def test_a_resumed_run_equals_an_uninterrupted_one(kind, alone, data, tmp_path):
    begin_at(tmp_path, alone[kind] / "checkpoint-00000008")
    assert train(spec_of(kind, data, tmp_path)).step == 10
    assert_same(tmp_path, alone[kind], 8)


def test_evaluations_have_their_chance(alone, data):
    scores = {kind: dict(read_evaluations(Store(str(alone[kind]))))[10].scores for kind in CONFIGS}
    vision, tokens, language = scores["vision"], scores["tokens"], scores["language"]
    assert vision["masked_patch_variance"].value == pytest.approx(1 - vision["mim"].value)
    assert vision["mim"].chance == 1.0 and vision["masked_patch_variance"].chance == 0.0
    assert vision["mim"].count == 22 * 4 * round(0.6 * 4)  # of four units
    assert tokens["mim"].chance == pytest.approx(math.log(5)) and tokens["masked_patch_accuracy"].chance == 0.2
    assert language["masked_word_loss"].chance == pytest.approx(math.log(30522))
    assert 0 <= language["masked_word_accuracy"].value <= 1


def test_the_pairs_stage_begins_from_the_language_stage(alone):
    """All that both have; the heads of the pairs are new."""
    config = dataclasses.replace(SMALL, init=str(alone["language"]), model=CONFIGS["language"].model)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, heads=SMALL.model.heads))
    model = starting_task(config, schema_of("language")).model
    given = load_tensors(Store(str(alone["language"])).read("model/model.safetensors"))
    state = model.state_dict()
    assert len(given) > 50 and all(torch.equal(state[name], value.float()) for name, value in given.items())


@pytest.mark.parametrize("grid", [2, 3, 4, 7, 14, 24])
def test_random_masks_are_units(grid):
    found = np.stack([random_units(grid, 0.6, np.random.default_rng(seed)) for seed in range(300)])
    side = -(-grid // 2)
    counts = {int(mask[::2, ::2].sum()) for mask in found}
    assert counts == {max(1, round(0.6 * side**2))}
    for mask in found[:20]:
        assert np.array_equal(mask, mask[::2, ::2].repeat(2, 0).repeat(2, 1)[:grid, :grid])
    share = counts.pop() / side**2
    assert np.abs(found.mean(0) - share).max() < 5 * math.sqrt(share * (1 - share) / 300) + 1e-9  # every place alike


@pytest.mark.parametrize("grid, share", [(14, 75 / 196), (4, 0.4), (2, 0.1), (7, 0.9)])
def test_blocks_never_exceed_the_share(grid, share):
    found = [blocks(grid, share, np.random.default_rng(seed)) for seed in range(200)]
    wanted = max(1, round(share * grid**2))
    counts = np.array([mask.sum() for mask in found])
    assert counts.min() >= 1 and counts.max() <= wanted
    assert counts.mean() > 0.85 * wanted or grid < 7
    if grid == 14:  # neighbours are masked together far more often than apart
        together = np.mean([(mask[:, 1:] == mask[:, :-1]).mean() for mask in found])
        assert together > 0.8 and np.mean(counts == wanted) > 0.9


def test_masks_are_drawn_by_place_and_in_an_evaluation_by_id():
    images = MaskedImages(16, 4, "random", 0.5, DataConfig(randaugment_ops=0))
    texts = MaskedTexts(12, 1100, 0.3)
    image = Record("a", "a", {"image": make_image(0)})
    text = Record("a", "", {"text": " ".join(WORDS)})
    for encoder, record, column in ((images, image, "masked"), (texts, text, "mlm_labels")):
        drawn = [encoder(record, Draw(1, step, 0))[column] for step in (0, 0, *range(1, 9))]
        assert np.array_equal(drawn[0], drawn[1]) and len({d.tobytes() for d in drawn}) > 4
        fixed = [encoder(dataclasses.replace(record, id=name), None)[column] for name in "aabcdefgh"]
        assert np.array_equal(fixed[0], fixed[1]) and len({f.tobytes() for f in fixed}) > 3


def test_patches_are_those_of_the_projection():
    """A convolution with one weight per pixel sums what `patches` lists."""
    image = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    weight = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    wanted = F.conv2d(image, weight, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patches(image, 4) @ weight.flatten(1).T, wanted)
    values = normalised(patches(image, 4))
    torch.testing.assert_close(values.mean(-1), torch.zeros(2, 9, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(values.std(-1, correction=0), torch.ones(2, 9, dtype=torch.float64), atol=1e-4, rtol=0)


@pytest.mark.parametrize("position", ["relative", "absolute"])
def test_a_masked_patch_is_not_seen(position):
    model = VLMo(dataclasses.replace(MODEL, heads=(), patch_size=4, position=position)).double()
    init_weights(model, 1)
    masked = torch.tensor([[True, False] * 8])
    token = torch.randn(1, 1, 24, dtype=torch.float64)
    image = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    other = image + 5 * masked.view(1, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    tokens = [model.embed_image(pixels, masked=masked, mask_token=token) for pixels in (image, other)]
    torch.testing.assert_close(*tokens, rtol=0, atol=0)
    assert not torch.allclose(model.embed_image(image), model.embed_image(other))


def test_mistakes(data):
    with pytest.raises(UserError, match="needs an 'image' column"):
        build_task(VLMo(CONFIGS["vision"].model), CONFIGS["vision"], SCHEMAS["language"])
    with pytest.raises(UserError, match="needs a 'text' column"):
        build_task(VLMo(CONFIGS["language"].model), CONFIGS["language"], SCHEMAS["vision"])
    config = dataclasses.replace(CONFIGS["vision"], task=VisionConfig(target="no_such:thing"))
    with pytest.raises(UserError, match=r"task\.target='no_such:thing' cannot be imported"):
        build_task(VLMo(config.model), config, SCHEMAS["vision"])
    with pytest.raises(UserError, match="none of 'pixels', 'features' and 'module:name'"):
        VisionConfig(target="dalle").check(config)
    with pytest.raises(UserError, match="needs an average of the weights"):
        VisionConfig(target="features").check(config)
    with pytest.raises(UserError, match="lacks mlm"):
        LanguageConfig().check(CONFIGS["vision"])


def test_one_expert_for_all_learns_from_texts():
    """As the row of the ablations with a standard Transformer."""
    config = CONFIGS["language"]
    model = VLMo(dataclasses.replace(config.model, experts="one"))
    task = build_task(model, dataclasses.replace(config, model=model.config), schema_of("language"))
    experts = [name for name, _ in task.named_parameters() if ".experts." in name]
    assert experts and all(".experts.all." in name and task.trainable(name) for name in experts)
