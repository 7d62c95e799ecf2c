"""Segmentation: UperNet's size, a step against a plain one, windows and scores against slow definitions."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_run import SMALL, begin_at, encoded, job, same_run, train_on

from vlmo_ray.config import MODEL_SIZES, DataConfig, OptimConfig, Phase, check
from vlmo_ray.data.batch import Batch
from vlmo_ray.data.encoders import Draw
from vlmo_ray.data.encoders.segments import WholeSegments
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.schema import IGNORED, Field, Record, Schema
from vlmo_ray.demo.scenes.records import png
from vlmo_ray.errors import RecordError, UserError
from vlmo_ray.model.upernet import UperNet
from vlmo_ray.model.vlmo import VLMo, init_weights
from vlmo_ray.objectives.gather import Workers
from vlmo_ray.recipes.segmentation import SegmentationConfig
from vlmo_ray.tasks.segmentation import Segmentation, areas, iou_scores, starts
from vlmo_ray.tasks.task import in_image_pass
from vlmo_ray.train.loop import train
from vlmo_ray.train.parallel import parallelize
from vlmo_ray.train.step import gradients

NAMES = ("sky", "road", "tree")
SCHEMA = Schema((Field("image", "image"), Field("mask", "mask", NAMES)))
CONFIG = dataclasses.replace(
    SMALL,
    name="segments",
    model=dataclasses.replace(SMALL.model, heads=(), depth=4, vl_start=3, image_size=24, layer_scale=None),
    task=SegmentationConfig(layers=(0, 1, 2, 3), channels=8, auxiliary_channels=4, layer_decay=0.5),
    phases=(Phase(6, 8),),
    data=DataConfig(shuffle_steps=3, randaugment_ops=0),
    optim=OptimConfig(peak_lr=3e-3, warmup_steps=1),
    checkpoint_every=4,
    evaluate_every=6,
    precision="float64",
)
FIGURES = ("loss", "pixel_accuracy", "grad_norm")


def picture(i: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(i)
    mask = draw.integers(0, 3, (height // 8 + 1, width // 8 + 1), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    mask = mask[:height, :width]
    image = (60 + 60 * mask[..., None] + draw.integers(0, 40, (height, width, 3))).astype(np.uint8)
    mask = np.where(draw.random(mask.shape) < 0.1, IGNORED, mask).astype(np.uint8)
    return image, mask


def rows(count: int):
    for i in range(count):
        image, mask = picture(i, 24 + i % 5, 30 + 7 * (i % 3))
        yield {"id": f"{i}", "image_id": f"{i}", "image": png(image), "mask": png(mask)}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("segments") / "data")
    write_dataset(folder, rows(23), rows_per_group=5, groups_per_shard=2, schema=SCHEMA)
    return folder


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("alone")
    assert train(spec_of(data, run)).step == 6
    return run


def spec_of(data: str, run, **changes):
    return dataclasses.replace(job(data, run, CONFIG, **changes), eval_data=data)


def make_task(**settings) -> Segmentation:
    config = dataclasses.replace(CONFIG, task=dataclasses.replace(CONFIG.task, **settings))
    model = VLMo(config.model)
    init_weights(model, 3)
    return Segmentation(model, config, SCHEMA).double()


def make_batch(invalid=()) -> Batch:
    generator = torch.Generator().manual_seed(5)
    image = torch.randint(0, 256, (7, 3, 24, 24), generator=generator, dtype=torch.uint8)
    mask = torch.randint(0, 3, (7, 24, 24), generator=generator, dtype=torch.uint8)
    mask[torch.rand(7, 24, 24, generator=generator) < 0.3] = IGNORED
    mask[4] = IGNORED  # an image without a class
    valid = torch.ones(7, dtype=torch.bool)
    valid[list(invalid)] = False
    return Batch({"image": image, "mask": mask}, valid, torch.arange(7), [str(i) for i in range(7)], [""] * 7)


def test_base_with_upernet_has_the_published_number_of_parameters():
    """163 M: BEiT-Base as segmentation model, of which the image path of VLMo-Base is one."""
    with torch.device("meta"):
        model = VLMo(dataclasses.replace(MODEL_SIZES["base"], heads=(), image_size=512))
        head = UperNet(768, 768, 150)
    image = sum(p.numel() for name, p in model.named_parameters() if in_image_pass(f"model.{name}"))
    assert round((image + sum(p.numel() for p in head.parameters())) / 1e6) == 163


@pytest.mark.parametrize("micro_batch", [7, 3])
def test_a_step_equals_the_plain_one(micro_batch):
    """Row by row: the sums over pixels with a class, divided by their number in the whole batch; dropout by row."""
    batch, task, plain = make_batch(invalid=(2,)), make_task(), make_task()
    parallel = parallelize(task, SMALL.cluster, 1, torch.device("cpu"))
    figures = gradients(parallel, batch, Workers((7,)), 4, micro_batch)
    total, count, right = torch.zeros((), dtype=torch.float64), 0, 0
    for i in range(7):
        row = batch.rows(slice(i, i + 1))
        if i in (2, 4):
            continue
        draws = plain.noise("head", row.position, 4)
        found = plain.segment(row.image.double() / 127.5 - 1.0, plain.noise("image", row.position, 4), draws)
        for weight, logits in zip((1.0, 0.4), found, strict=True):
            whole = F.interpolate(logits, (24, 24), mode="bilinear", align_corners=False)[0]
            counted = row.mask[0] != IGNORED
            labels = row.mask[0][counted].long()
            total = total + weight * F.cross_entropy(whole[:, counted].T, labels, reduction="sum")
            if weight == 1.0:
                count, right = count + len(labels), right + int((whole[:, counted].argmax(0) == labels).sum())
    wanted = total / count
    wanted.backward()
    assert float(figures["loss"]) == pytest.approx(float(wanted.detach()), rel=1e-12)
    assert float(figures["pixel_accuracy"]) == pytest.approx(right / count)
    for (name, a), (_, b) in zip(task.named_parameters(), plain.named_parameters(), strict=True):
        assert (a.grad is not None) == (task.trainable(name) or name.startswith("head.")) == (b.grad is not None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name)
    assert task.lr_scale("head.classes.weight") == 1.0
    assert task.lr_scale("model.layers.2.attention.out.weight") == 0.25


def test_a_batch_without_a_class_costs_nothing():
    task = make_task()
    parallel = parallelize(task, SMALL.cluster, 1, torch.device("cpu"))
    figures = gradients(parallel, make_batch(invalid=(0, 1, 2, 3, 5, 6)), Workers((7,)), 4, 7)
    assert float(figures["loss"]) == 0 and not any(p.grad.any() for p in task.parameters() if p.grad is not None)


@pytest.mark.slow
def test_two_workers_equal_one(alone, data, tmp_path):
    assert [o.step for o in train_on(2, spec_of(data, tmp_path, micro_batch=2))] == [6, 6]
    same_run(tmp_path, alone, FIGURES)


def test_a_resumed_run_equals_an_uninterrupted_one(alone, data, tmp_path):
    begin_at(tmp_path, alone / "checkpoint-00000004")
    assert train(spec_of(data, tmp_path)).step == 6
    same_run(tmp_path, alone, FIGURES, 4)


def test_windows_cover_an_image_and_end_with_it():
    assert starts(512, 512) == [0]
    assert starts(683, 512) == [0, 171]  # one more window, shifted inwards
    assert starts(1024, 512) == [0, 341, 512]
    for length in range(24, 100):
        covered = {place + offset for place in starts(length, 24) for offset in range(24)}
        assert covered == set(range(length))


def evaluated(task, count: int):
    evaluation = task.evaluation(SCHEMA)
    return evaluation, encoded(evaluation.encoder(), rows(count))


@torch.inference_mode()
def test_logits_of_windows_are_averaged_at_every_pixel():
    task = make_task()
    evaluation, batch = evaluated(task, 5)
    counts = evaluation.rows(batch)["areas"]
    for i in range(5):
        _, mask = picture(i, 24 + i % 5, 30 + 7 * (i % 3))
        shape = batch.image_shape[i].tolist()
        assert min(shape) == 24 and mask.shape == tuple(batch.mask_shape[i].tolist())
        shown = batch.image[i, : 3 * shape[0] * shape[1]].view(1, 3, *shape).double() / 127.5 - 1.0
        total, seen = torch.zeros(3, *shape, dtype=torch.float64), torch.zeros(shape)
        for y in starts(shape[0], 24):
            for x in starts(shape[1], 24):
                logits = task.segment(shown[:, :, y : y + 24, x : x + 24])[0]
                part = F.interpolate(logits.float(), (24, 24), mode="bilinear", align_corners=False)[0]
                for row in range(24):
                    for column in range(24):
                        total[:, y + row, x + column] += part[:, row, column]
                        seen[y + row, x + column] += 1
        whole = F.interpolate((total / seen)[None].float(), mask.shape, mode="bilinear", align_corners=False)
        chosen = whole[0].argmax(dim=0).numpy()
        for number in range(3):
            labelled, predicted = mask == number, (chosen == number) & (mask != IGNORED)
            wanted = [(labelled & predicted).sum(), predicted.sum(), labelled.sum()]
            assert counts[i, :, number].tolist() == wanted


@torch.inference_mode()
def test_several_scales_and_the_mirror_image_are_averaged():
    plain, several = make_task(), make_task(scales=(0.5, 1.0, 1.5), flipped=True)
    evaluation, batch = evaluated(several, 3)
    counts = evaluation.rows(batch)["areas"]
    one = evaluated(plain, 3)[0]
    size = 24
    for i in range(3):
        shape, mask_shape = (batch.columns[f"{name}_shape"][i].tolist() for name in ("image", "mask"))
        shown = batch.image[i, : 3 * shape[0] * shape[1]].view(1, 3, *shape).double() / 127.5 - 1.0
        parts = []
        for share in (1.0, 1.0, 1.5):  # half the size would be less than a window
            scaled = shown
            if share > 1:
                sides = [max(size, round(share * side)) for side in shape]
                scaled = F.interpolate(shown, sides, mode="bilinear", align_corners=False, antialias=True)
            for mirrored in (False, True):
                logits = one._slide(scaled.flip(3) if mirrored else scaled)
                logits = F.interpolate(logits, mask_shape, mode="bilinear", align_corners=False)
                parts.append((logits.flip(3) if mirrored else logits).softmax(dim=1))
        chosen = torch.stack(parts).mean(dim=0)[0].argmax(dim=0)
        mask = batch.mask[i, : mask_shape[0] * mask_shape[1]].view(mask_shape)
        assert torch.equal(counts[i], areas(chosen, mask, 3))


def test_iou_is_that_of_another_definition():
    """A slow one, over the pixels of the whole set."""
    draw = np.random.default_rng(3)
    masks = [draw.integers(0, 4, (5, 7 + i)) for i in range(4)]  # the last two of six classes are not labelled
    found = [np.where(draw.random(m.shape) < 0.6, m, draw.integers(0, 5, m.shape)) for m in masks]
    masks = [np.where(draw.random(m.shape) < 0.2, IGNORED, m).astype(np.uint8) for m in masks]
    total = sum(areas(torch.tensor(f), torch.tensor(m), 6).numpy() for f, m in zip(found, masks, strict=True))
    scores = iou_scores(total)
    label, predicted = (np.concatenate([x.ravel() for x in some]) for some in (masks, found))
    label, predicted = label[label != IGNORED], predicted[label != IGNORED]
    ious, accuracies = [], []
    for number in range(6):
        a, b = {i for i, c in enumerate(label) if c == number}, {i for i, c in enumerate(predicted) if c == number}
        ious += [len(a & b) / len(a | b)] if a | b else []
        accuracies += [len(a & b) / len(a)] if a else []
    assert len(ious) == 5 and len(accuracies) == 4
    assert scores["miou"].value == pytest.approx(np.mean(ious)) and scores["miou"].count == len(label)
    assert scores["mean_accuracy"].value == pytest.approx(np.mean(accuracies))
    assert scores["pixel_accuracy"].value == pytest.approx(np.mean(label == predicted))
    most = np.bincount(label).max() / len(label)
    assert scores["miou"].chance == pytest.approx(most / 4) and scores["pixel_accuracy"].chance == pytest.approx(most)
    with pytest.raises(UserError, match="no pixel of the data set has a class"):
        iou_scores(np.zeros((3, 6), np.int64))


def test_iou_is_that_of_torchmetrics():
    """MulticlassJaccardIndex(5, ignore_index=255) of torchmetrics 1.9.0 on these arrays."""
    draw = np.random.default_rng(7)
    label = draw.integers(0, 5, 400)
    label[draw.random(400) < 0.15] = IGNORED
    found = np.where(draw.random(400) < 0.6, label % 5, draw.integers(0, 5, 400))
    total = areas(torch.tensor(found), torch.tensor(label), 5).numpy()
    assert iou_scores(total)["miou"].value == pytest.approx(0.5486, abs=5e-5)


def test_what_cannot_be_evaluated_is_a_bad_record():
    encoder = WholeSegments(24, NAMES, CONFIG.data)
    image, mask = picture(0, 24, 100)
    with pytest.raises(RecordError, match="more than 4 times"):
        encoder(Record("1", "1", {"image": png(image), "mask": png(mask)}), None)
    large = np.zeros((2000, 1200), np.uint8)
    with pytest.raises(RecordError, match="more than 2097152 pixels"):
        encoder(Record("1", "1", {"image": png(large), "mask": png(large)}), None)
    with pytest.raises(RecordError, match="another aspect ratio than the image"):
        encoder(Record("1", "1", {"image": png(image[:, :30]), "mask": png(mask[:, :30].T)}), None)
    for height, width in ((48, 60), (47, 60), (24, 31)):  # of masks for images that were made smaller
        encoder(Record("1", "1", {"image": png(image[:, :30]), "mask": png(np.zeros((height, width), np.uint8))}), None)
    strange = png(np.full((24, 30), 3, np.uint8))
    for whole in (encoder, make_task().encoder()):
        with pytest.raises(RecordError, match="none of 3 classes"):
            whole(Record("1", "1", {"image": png(image[:, :30]), "mask": strange}), Draw(1, 0, 0))
    for changes, message in (
        ({"layers": (0, 1, 2)}, "must name four"), ({"layers": (0, 2, 1, 3)}, "must rise"),
        ({"layers": (0, 1, 2, 4)}, "0 to 3"), ({"scales": ()}, "above 0"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            check(dataclasses.replace(CONFIG, task=dataclasses.replace(CONFIG.task, **changes)))
    deeper = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, depth=5))
    with pytest.raises(UserError, match="must end with the last layer"):
        check(deeper)
    sharded = dataclasses.replace(CONFIG, cluster=dataclasses.replace(CONFIG.cluster, strategy="fsdp"))
    with pytest.raises(UserError, match="segmentation cannot be evaluated inside a run"):
        check(sharded)
    with pytest.raises(UserError, match="needs a 'mask' column"):
        Segmentation(VLMo(CONFIG.model), CONFIG, Schema((Field("image", "image"), Field("mask", "mask"))))
