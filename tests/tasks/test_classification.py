"""Classification, and with it what every row-wise task has: heads, frozen parts, rates, clipping, averages, evaluation.

The oracles are a plain step with autograd, one process where there are several, and a run that was not interrupted.
"""

import dataclasses
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_run import SMALL, begin_at, job, same_run, train_on
from timm.data import Mixup
from timm.models.beit import Beit

from vlmo_ray import rng
from vlmo_ray.config import DataConfig, OptimConfig, Phase, check
from vlmo_ray.data.batch import Batch
from vlmo_ray.data.decode import decode_center
from vlmo_ray.data.prepare import prepare
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.schema import Field, Schema
from vlmo_ray.data.store import Store
from vlmo_ray.demo.scenes.world import SHAPE_COLOURS, scene
from vlmo_ray.errors import UserError
from vlmo_ray.evaluate import evaluate
from vlmo_ray.model.vlmo import VLMo, init_weights
from vlmo_ray.objectives.gather import Workers
from vlmo_ray.overrides import from_dict, to_dict
from vlmo_ray.recipes import recipe
from vlmo_ray.recipes.classification import ClassificationConfig
from vlmo_ray.runs.evaluations import read_evaluations
from vlmo_ray.runs.load import load_all
from vlmo_ray.runs.metrics import read_metrics
from vlmo_ray.tasks.classification import Classification, draw_mixing, mixed, rank_of
from vlmo_ray.train.agree import Notice
from vlmo_ray.train.build import starting_task
from vlmo_ray.train.loop import train
from vlmo_ray.train.optim import build_optimizer
from vlmo_ray.train.parallel import Parallel, clip, parallelize, total_norm
from vlmo_ray.train.step import gradients
from vlmo_ray.weights.timm import to_timm

NAMES = ("dark", "bright", "red")
SCHEMA = Schema((Field("image", "image"), Field("label", "label", NAMES)))
CONFIG = dataclasses.replace(
    SMALL,
    name="classes",
    model=dataclasses.replace(SMALL.model, heads=(), layer_scale=None),
    task=ClassificationConfig(label_smoothing=0.1, head_lr_scale=5.0, layer_decay=0.5),
    phases=(Phase(10, 8),),
    optim=OptimConfig(peak_lr=3e-3, warmup_steps=2, schedule="cosine", clip_norm=0.5, average_decay=0.8),
    checkpoint_every=4,
    evaluate_every=5,
    precision="float64",
)
MIXED = dataclasses.replace(
    CONFIG,
    task=dataclasses.replace(CONFIG.task, head="mean_norm", mixup=0.8, cutmix=1.0, eval_crop="center"),
    slice_size=4,
    phases=(Phase(10, 12),),
)
FIGURES = ("loss", "cross_entropy", "accuracy", "grad_norm", "lr")


def rows(first: int, count: int):
    for i in range(first, first + count):
        pixels = np.random.default_rng(i).integers(0, 80, (16, 16, 3), dtype=np.uint8)
        pixels[..., 0 if i % 3 == 2 else slice(None)] += np.uint8(0 if i % 3 == 0 else 150)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        yield {"id": f"{i}", "image_id": f"{i}", "image": file.getvalue(), "label": i % 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("classes")
    for name, first, count in (("train", 0, 45), ("val", 100, 22)):
        write_dataset(str(folder / name), rows(first, count), rows_per_group=5, groups_per_shard=2, schema=SCHEMA)
    return str(folder / "train"), str(folder / "val")


def spec_of(data: tuple[str, str], run, config=CONFIG, **changes):
    return dataclasses.replace(job(data[0], run, config, **changes), eval_data=data[1])


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """The run of one process."""
    run = tmp_path_factory.mktemp("alone")
    outcome = train(spec_of(data, run))
    assert outcome.step == 10, outcome
    return run


def make_task(config=CONFIG) -> Classification:
    model = VLMo(config.model)
    init_weights(model, 3)
    return Classification(model, config, SCHEMA).double()


def make_batch(invalid=(2,)) -> Batch:
    generator = torch.Generator().manual_seed(5)
    image = torch.randint(0, 256, (7, 3, 16, 16), generator=generator, dtype=torch.uint8)
    valid = torch.ones(7, dtype=torch.bool)
    valid[list(invalid)] = False
    columns = {"image": image, "label": torch.tensor([0, 1, 2, 2, 1, 0, 2])}
    return Batch(columns, valid, torch.arange(7), [str(i) for i in range(7)], [""] * 7)


@pytest.mark.parametrize("micro_batch", [7, 3, 1])
@pytest.mark.parametrize("invalid", [(), (2,), tuple(range(7))])
def test_a_step_equals_the_plain_one(micro_batch, invalid):
    batch, task, plain = make_batch(invalid), make_task(), make_task()
    parallel = parallelize(task, CONFIG.cluster, 1, torch.device("cpu"))
    figures = gradients(parallel, batch, Workers((7,)), 4, micro_batch)
    valid = batch.valid
    logits = plain.logits(batch.image, plain.noise("image", batch.position, 4))[valid]
    wanted = F.cross_entropy(logits, batch.label[valid], label_smoothing=0.1) if len(logits) else logits.sum()
    wanted.backward()
    assert float(figures["loss"]) == pytest.approx(float(wanted), rel=1e-12)
    assert float(figures["accuracy"]) == pytest.approx(
        float((logits.argmax(1) == batch.label[valid]).double().mean()) if len(logits) else 0.0
    )
    assert int(figures["masked_rows"]) == len(invalid)
    for (name, a), (_, b) in zip(task.named_parameters(), plain.named_parameters(), strict=True):
        assert (a.grad is not None) == task.trainable(name), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad if b.grad is not None else torch.zeros_like(b), msg=name)


def mixing_batch(invalid=()) -> Batch:
    """Three slices of four rows."""
    image = torch.randint(0, 256, (12, 3, 16, 16), generator=torch.Generator().manual_seed(6), dtype=torch.uint8)
    valid = torch.ones(12, dtype=torch.bool)
    valid[list(invalid)] = False
    columns = {"image": image, "label": torch.tensor([0, 1, 2, 2, 1, 0, 2, 1, 0, 0, 1, 2])}
    return Batch(columns, valid, torch.arange(12), [str(i) for i in range(12)], [""] * 12)


def timms_mixing(monkeypatch, step: int, image: torch.Tensor, label: torch.Tensor, **settings):
    """Images and soft targets of one slice from timm's `Mixup`, given the draws of the step."""
    draws = rng.generator(MIXED.seed, "mixing", step, 0)
    switch, *middle = draws.random(3)
    use_cutmix = settings["cutmix_alpha"] > 0 and not (settings["mixup_alpha"] > 0 and switch >= 0.5)
    share = draws.beta(*[settings["cutmix_alpha" if use_cutmix else "mixup_alpha"]] * 2)
    mixup = Mixup(**settings, label_smoothing=0.1, num_classes=3)
    monkeypatch.setattr(mixup, "_params_per_batch", lambda: (share, use_cutmix))
    places = iter(middle)
    monkeypatch.setattr(np.random, "randint", lambda low, high, size=None: low + int(next(places) * (high - low)))
    mixed, target = mixup(image.double(), label)
    monkeypatch.undo()
    return mixed, target, use_cutmix


@pytest.mark.parametrize("mixup, cutmix, cuts", [(0.8, 1.0, {True, False}), (0.8, 0.0, {False}), (0.0, 1.0, {True})])
def test_mixing_a_slice_is_timms(mixup, cutmix, cuts, monkeypatch):
    batch, kinds = mixing_batch(), set()
    for step in range(40):
        found = mixed(batch, draw_mixing(mixup, cutmix, 16, MIXED.seed, step), 4, torch.float64)
        one_hot = (F.one_hot(label, 3).double() for label in (batch.label, found.partner_label))
        mine = sum(share[:, None] * hot for share, hot in zip((found.share, 1 - found.share), one_hot, strict=True))
        for rows in (slice(0, 4), slice(4, 8), slice(8, 12)):
            given = {"mixup_alpha": mixup, "cutmix_alpha": cutmix}
            image, target, cut = timms_mixing(monkeypatch, step, batch.image[rows], batch.label[rows], **given)
            torch.testing.assert_close(found.image[rows], image, rtol=1e-12, atol=1e-10)
            torch.testing.assert_close(0.9 * mine[rows] + 0.1 / 3, target.double(), rtol=0, atol=1e-6)
            kinds.add(cut)
    assert kinds == cuts


@pytest.mark.parametrize("invalid", [(), (1, 4, 7, 11), tuple(range(12))])
def test_invalid_rows_mix_with_nobody(invalid):
    batch = mixing_batch(invalid)
    for step in range(6):
        drawn = draw_mixing(0.8, 1.0, 16, 1, step)
        found = mixed(batch, drawn, 4, torch.float64)
        for row in range(12):
            partner = row // 4 * 4 + 3 - row % 4
            alone = not (batch.valid[row] and batch.valid[partner])
            assert float(found.share[row]) == (1.0 if alone else pytest.approx(drawn.share, rel=1e-12))
            same = torch.equal(found.image[row], batch.image[row].double())
            assert same if alone else found.partner_label[row] == batch.label[partner]
            bad = dict.fromkeys(range(12)).keys() - {row, partner}  # what other rows hold changes nothing
            other = batch.with_columns(image=batch.image.index_fill(0, torch.tensor(sorted(bad)), 9))
            assert torch.equal(mixed(other, drawn, 4, torch.float64).image[row], found.image[row])


@pytest.mark.parametrize("micro_batch", [12, 5, 4, 1])
@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_a_step_with_mixed_images_equals_the_plain_one(micro_batch, step, monkeypatch):
    batch, task, plain = mixing_batch((2, 9)), make_task(MIXED), make_task(MIXED)
    figures = gradients(
        parallelize(task, MIXED.cluster, 1, torch.device("cpu")), batch, Workers((12,)), step, micro_batch
    )
    pairs = [
        timms_mixing(monkeypatch, step, batch.image[[a, b]], batch.label[[a, b]], mixup_alpha=0.8, cutmix_alpha=1.0)
        for a, b in ((0, 3), (4, 7), (5, 6), (8, 11))
    ]
    rows = [0, 3, 4, 7, 5, 6, 8, 11, 1, 10]
    rest = F.one_hot(batch.label[[1, 10]], 3) * 0.9 + 0.1 / 3
    image = torch.cat([*(pair[0] for pair in pairs), batch.image[[1, 10]].double()])
    target = torch.cat([*(pair[1].double() for pair in pairs), rest.double()])
    logits = plain.logits(image, plain.noise("image", batch.position[rows], step))
    wanted = -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()
    wanted.backward()
    assert float(figures["loss"].detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    assert int(figures["masked_rows"]) == 2
    right = (logits.argmax(dim=1) == target.argmax(dim=1)).double().mean()
    assert float(figures["accuracy"]) == pytest.approx(float(right))
    for (name, a), (_, b) in zip(task.named_parameters(), plain.named_parameters(), strict=True):
        assert (a.grad is not None) == task.trainable(name), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-8, msg=name)


def test_mixing_differs_from_step_to_step_and_takes_both_kinds():
    drawn = [draw_mixing(0.8, 1.0, 16, 1, step) for step in range(400)]
    assert drawn == [draw_mixing(0.8, 1.0, 16, 1, step) for step in range(400)] and len(set(drawn)) > 370
    assert 160 < sum(each.box is None for each in drawn) < 240
    assert drawn != [draw_mixing(0.8, 1.0, 16, 2, step) for step in range(400)]


def test_mixing_needs_slices_of_several_rows():
    with pytest.raises(UserError, match="slice_size=1 has no other row to mix with"):
        check(dataclasses.replace(MIXED, slice_size=1))


def test_the_head_of_beit_is_timms():
    """Its own names, its place of the norm, its start."""
    config = dataclasses.replace(MIXED.model, layer_scale=0.1)
    model = VLMo(config)
    init_weights(model, 3)
    task = Classification(model, dataclasses.replace(MIXED, model=config), SCHEMA)
    assert float(task.head.weight.detach().std()) == pytest.approx(0.1 * 0.001, rel=0.2)
    own = {name: tensor for name, tensor in task.state_dict().items() if not name.startswith("model.")}
    assert {name.partition(".")[0] for name in own} == {"fc_norm", "head"}
    with torch.no_grad():
        for tensor in own.values():
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):  # so that the final norm would be seen
                parameter.mul_(1.7)
    beit = Beit(
        img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, init_values=0.1, use_rel_pos_bias=True,
        use_abs_pos_emb=False, num_classes=3, global_pool="avg",
    ).eval()  # fmt: skip
    given = {name: t for name, t in to_timm(model).items() if not name.startswith("norm.")}
    missing, unexpected = beit.load_state_dict(given | own, strict=False)
    assert not unexpected and all("relative_position_index" in name for name in missing)
    image = mixing_batch().image
    with torch.no_grad():
        torch.testing.assert_close(task.logits(image), beit(image / 127.5 - 1), rtol=1e-4, atol=1e-5)


def test_a_stored_config_without_a_choice_of_head_means_the_old_one():
    stored = to_dict(CONFIG)
    for name in ("head", "mixup", "cutmix", "eval_crop"):
        del stored["task"][name]
    for name in ("augment", "erase"):
        del stored["data"][name]
    assert from_dict(stored) == CONFIG
    assert make_task().fc_norm is None and make_task().encoder().center is False
    assert make_task().prepared(batch := make_batch(), 3) is batch


def test_only_what_an_image_passes_through_is_trained(data, tmp_path):
    task, before = make_task(), make_task().state_dict()
    parallel = parallelize(task, CONFIG.cluster, 1, torch.device("cpu"))
    optimizer = build_optimizer(task, CONFIG)
    for step in range(20):
        gradients(parallel, make_batch(), Workers((7,)), step, 7)
        optimizer.step()
        optimizer.zero_grad()
    trained = {name for name, value in task.state_dict().items() if not torch.equal(value, before[name])}
    assert trained == {name for name, p in task.named_parameters() if task.trainable(name)}
    assert not any(part in name for name in trained for part in ("text", "vl", "itm", "mlm"))
    assert {"head.weight", "model.image_embed.cls", "model.layers.1.experts.image.fc1.weight"} <= trained
    assert len(optimizer.state) == len(trained)


def test_rates_fall_from_the_head_down():
    task = make_task()
    scales = {name: task.lr_scale(name) for name, _ in task.named_parameters()}
    assert scales["head.weight"] == 5.0 and scales["model.norm.weight"] == 1.0
    assert scales["model.layers.1.attention.out.weight"] == 0.5 and scales["model.layers.0.attention.q_bias"] == 0.25
    assert scales["model.image_embed.cls"] == scales["model.relative.table"] == 0.125
    groups = build_optimizer(task, CONFIG).param_groups
    assert {(group["lr_scale"], group["weight_decay"]) for group in groups} >= {(5.0, 0.01), (5.0, 0.0), (0.25, 0.01)}
    beit = make_task(MIXED)
    assert beit.lr_scale("fc_norm.weight") == beit.lr_scale("fc_norm.bias") == 1.0
    assert not any(beit.trainable(f"model.norm.{name}") for name in ("weight", "bias"))


def test_a_run_learns_evaluates_and_publishes_its_average(alone, data):
    metrics = read_metrics(Store(str(alone)))[0]
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    lr = [m["lr"] for m in metrics]
    assert lr[1] == pytest.approx(3e-3) and lr[6] == pytest.approx(3e-3 * 0.5 * (1 + np.cos(np.pi * 0.5)))
    [(first, _), (last, result)] = read_evaluations(Store(str(alone)))
    assert (first, last) == (5, 10) and result.num_rows == 22 and result.data == data[1]
    assert set(result.scores) == {"top1"} and result.scores["top1"].chance == pytest.approx(1 / 3)
    assert result.scores["top1"].count == 22


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_workers_equal_one(alone, data, tmp_path, strategy):
    cluster = dataclasses.replace(CONFIG.cluster, strategy=strategy)
    outcomes = train_on(2, spec_of(data, tmp_path, cluster=cluster, micro_batch=2))
    assert [outcome.step for outcome in outcomes] == [10, 10], outcomes
    same_run(tmp_path, alone, FIGURES)


@pytest.fixture(scope="module")
def mixed_alone(data, tmp_path_factory):
    """A run of one process with mixed images, and how often it mixed."""
    run, steps = tmp_path_factory.mktemp("mixed"), []
    with pytest.MonkeyPatch.context() as patched:
        prepared = Classification.prepared
        patched.setattr(Classification, "prepared", lambda *given: (steps.append(given[2]), prepared(*given))[1])
        outcome = train(spec_of(data, run, MIXED))
    assert outcome.step == 10, outcome
    return run, steps


def test_a_run_mixes_its_images_and_evaluates_plain_ones(mixed_alone, data):
    run, steps = mixed_alone
    assert steps == list(range(10))  # the evaluations after steps 5 and 10 mix nothing
    [_, (_, result)] = read_evaluations(Store(str(run)))
    loaded = load_all(run)
    assert set(loaded.own) == {"task.head.weight", "task.head.bias", "task.fc_norm.weight", "task.fc_norm.bias"}
    task = Classification(loaded.model, MIXED, SCHEMA)
    loaded.fill(task)
    stored = list(rows(100, 22))
    image = np.stack([decode_center(row["image"], 16, DataConfig()) for row in stored])
    with torch.no_grad():
        best = task.logits(torch.from_numpy(image)).argmax(dim=1).tolist()
    assert result["top1"] == pytest.approx(np.mean([a == row["label"] for a, row in zip(best, stored, strict=True)]))


@pytest.mark.slow
def test_two_workers_mix_as_one(mixed_alone, data, tmp_path, strategy="ddp"):
    cluster = dataclasses.replace(MIXED.cluster, strategy=strategy)
    outcomes = train_on(2, spec_of(data, tmp_path, MIXED, cluster=cluster, micro_batch=4))
    assert [outcome.step for outcome in outcomes] == [10, 10], outcomes
    same_run(tmp_path, mixed_alone[0], FIGURES)


def test_a_run_can_start_from_other_classes(mixed_alone, tmp_path):
    """As from ImageNet-22k: the head starts anew."""
    run, names = mixed_alone[0], ("bright", "dark")
    few = [dict(row, label=row["label"] % 2) for row in rows(0, 24)]
    schema = Schema((Field("image", "image"), Field("label", "label", names)))
    write_dataset(str(tmp_path / "other"), few, schema=schema)
    config = dataclasses.replace(MIXED, init=str(run), evaluate_every=0, optim=OptimConfig(peak_lr=0.0, warmup_steps=1))
    assert train(job(str(tmp_path / "other"), tmp_path / "run", config)).step == 10
    start, before = load_all(tmp_path / "run"), load_all(run)
    assert start.own["task.head.weight"].shape == (2, 24)
    torch.testing.assert_close(start.model.state_dict(), before.model.state_dict())


def test_a_run_of_the_same_classes_goes_on_with_its_head(mixed_alone, data, tmp_path):
    """As for larger images; where its shape or name is another, the head starts anew."""
    run = mixed_alone[0]
    still = OptimConfig(peak_lr=0.0, warmup_steps=1, average_decay=MIXED.optim.average_decay)
    config = dataclasses.replace(MIXED, init=str(run), evaluate_every=0, optim=still)
    swapped = Field("label", "label", ("bright", "dark", "red"))
    larger = dataclasses.replace(config, model=dataclasses.replace(config.model, image_size=24))
    assert train(job(data[0], tmp_path / "larger", larger)).step == 10
    before, after = load_all(run).own, load_all(tmp_path / "larger").own
    torch.testing.assert_close(after, before)
    plain = dataclasses.replace(config, task=dataclasses.replace(config.task, head="norm_mean"))
    for other in (starting_task(plain, SCHEMA), starting_task(config, Schema((Field("image", "image"), swapped)))):
        assert not torch.equal(other.head.weight, before["task.head.weight"].to(other.head.weight.dtype))


def test_a_wrong_class_as_high_as_the_right_one_and_a_nan_stand_before_it():
    nan = float("nan")
    logits = torch.tensor([[1.0, 2.0, 0.0], [2.0, 2.0, 0.0], [nan, 2.0, 0.0], [1.0, nan, 0.0], [nan] * 3])
    assert rank_of(logits, torch.ones(5, dtype=torch.long)).tolist() == [0, 1, 1, 2, 2]


def test_under_autocast_classes_are_compared_in_float32():
    """Two classes that are equal in bfloat16, whose features are the same."""
    task, batch = make_task().float(), make_batch()
    with torch.no_grad():
        task.head.weight[1] = task.head.weight[0] * (1 + 2.0**-12)
        task.head.bias.zero_()
        with torch.autocast("cpu", torch.bfloat16):
            rows, features, rough = (
                task.evaluation(SCHEMA).rows(batch),
                task.features(batch.image),
                task.logits(batch.image),
            )
        exact = features.float() @ task.head.weight.T
    assert torch.equal(rough[:, 0], rough[:, 1])
    assert torch.equal(rows["rank"], rank_of(exact, batch.label)) and torch.equal(rows["best"], exact.argmax(dim=1))
    assert not torch.equal(rows["rank"], rank_of(rough, batch.label))


def test_a_resumed_run_equals_an_uninterrupted_one(alone, data, tmp_path):
    begin_at(tmp_path, alone / "checkpoint-00000008")
    assert train(spec_of(data, tmp_path)).step == 10
    same_run(tmp_path, alone, FIGURES, 8)


def head_after(steps: int, data, run, config) -> torch.Tensor:
    """The head's weights, in float32, that a run of so many steps leaves in its checkpoint."""
    told = iter([Notice.NONE] * steps + [Notice.STOP])
    config = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, notice_every=1))
    assert train(spec_of(data, run, config), notice=lambda: next(told)).step == steps
    return load_all(run).own["task.head.weight"]


def test_the_average_is_the_average(data, tmp_path):
    """0.8 of the last average and 0.2 of the new weights, from the start on; `load_all` gives the average."""
    plain = dataclasses.replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, average_decay=0.0))
    wanted = Classification(_start(CONFIG), CONFIG, SCHEMA).head.weight.detach()
    for steps in (1, 2, 3):
        wanted = 0.8 * wanted + 0.2 * head_after(steps, data, tmp_path / f"plain{steps}", plain)
    found = head_after(3, data, tmp_path / "averaged", CONFIG)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(found, head_after(3, data, tmp_path / "again", plain), rtol=1e-5, atol=1e-7)


def _start(config) -> VLMo:
    model = VLMo(config.model)
    init_weights(model, config.seed)
    return model


def test_gradients_are_clipped_to_the_norm(data, tmp_path):
    task = make_task()
    gradients(Parallel(task), make_batch(), Workers((7,)), 0, 7)
    norm = float(total_norm(task))
    before = task.head.weight.grad.clone()
    clip(task, 2 * norm, norm)
    assert torch.equal(task.head.weight.grad, before)
    clip(task, norm / 4, norm)
    assert float(total_norm(task)) == pytest.approx(norm / 4)


def test_other_classes_are_refused(data, alone, tmp_path):
    other = Schema((Field("image", "image"), Field("label", "label", ("red", "dark", "bright"))))
    write_dataset(str(tmp_path / "other"), rows(0, 6), schema=other)
    outcome = train(spec_of((data[0], str(tmp_path / "other")), tmp_path / "run"))
    assert "other values of 'label'" in outcome.stopped and "prepare it with the same list" in outcome.stopped
    with pytest.raises(UserError, match="needs a 'label' column"):
        Classification(_start(CONFIG), CONFIG, Schema((Field("image", "image"), Field("label", "label"))))


@pytest.mark.ray
@pytest.mark.full
def test_scenes_from_folders_to_90_percent(ray_cluster, tmp_path):
    """The colour of the main shape: prepare, train, evaluate in the run and by the command's own path."""
    for split, count in (("train", 2400), ("eval", 200)):
        for i in range(count):
            shown = scene(1, i, split, 32)
            folder = tmp_path / split / shown.shapes[0].colour
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(shown.image).save(folder / f"{i}.png")
        counts = prepare("folders", str(tmp_path / split), str(tmp_path / f"{split}-set"))
        assert (counts.kept, counts.read) == (count, count)
    config = dataclasses.replace(recipe("classification_tiny"), evaluate_every=200)
    data = str(tmp_path / "train-set"), str(tmp_path / "eval-set")
    assert train(spec_of(data, tmp_path / "run", config)).step == 200
    [(_, inside)] = read_evaluations(Store(str(tmp_path / "run")))
    result = evaluate(str(tmp_path / "run"), data[1])
    assert set(result.scores) == {"top1", "top5"} and result.scores["top5"].chance == 5 / len(SHAPE_COLOURS)
    assert result["top1"] >= 0.9 and result.num_rows == 200
    assert result == inside
    with pytest.raises(UserError, match="classification needs weights that were trained for it"):
        evaluate(_start(SMALL), data[1], "classification")
