"""Forms of released models without a golden file at hand, against a plain re-implementation on released keys.

Absolute positions, VQA, NLVR2, retrieval fine-tuning and another image size, in values and gradients.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from official_reference import Reference, random_state_dict
from translated import from_official

from vlmo_ray.config import ClusterConfig
from vlmo_ray.data.batch import Batch
from vlmo_ray.data.schema import Field, Schema
from vlmo_ray.model.vlmo import VLMo
from vlmo_ray.objectives.gather import Workers
from vlmo_ray.recipes import recipe
from vlmo_ray.tasks import build_task
from vlmo_ray.train.parallel import parallelize
from vlmo_ray.train.step import gradients
from vlmo_ray.weights.official import our_name

CLOSE = {"atol": 1e-9, "rtol": 1e-9}


def both(losses, image_size=None, **sizes) -> tuple[VLMo, Reference]:
    """Our model and the reference on the same weights, in float64."""
    state = random_state_dict(losses=losses, **sizes)
    config, ours, report = from_official(state, image_size=image_size, num_heads=2)
    assert not report.missing and not report.dropped
    model = VLMo(dataclasses.replace(config, drop_path=0.0)).double()
    model.load_state_dict(ours)
    state = {name: value.double().requires_grad_() for name, value in state.items()}
    return model, Reference(state, num_heads=2, vl_start=2)


def inputs(size: int = 12):
    generator = torch.Generator().manual_seed(4)
    pixels = torch.randn(2, 3, 3, size, size, generator=generator, dtype=torch.float64)
    text = torch.randint(0, 23, (3, 6), generator=generator)
    mask = torch.arange(6) < torch.tensor([[6], [2], [4]])
    return pixels, text, mask


def test_pretraining_outputs_and_gradients():
    model, reference = both(("itc", "itm", "mlm"))
    (pixels, _), text, mask = inputs()
    image_only = model.encode(image=pixels, vl_branch=True)
    text_only = model.encode(text=text, text_mask=mask, vl_branch=True)
    pair = model.encode(image=pixels, text=text, text_mask=mask)
    everything = torch.ones(3, 10, dtype=torch.bool)
    expected_pair = reference.pair(pixels, text, mask)
    ours = {
        "image": model.itc.image(image_only.image[:, 0]),
        "image_vl": model.itc_vl.image(image_only.image_vl[:, 0]),
        "text": model.itc.text(text_only.text[:, 0]),
        "text_vl": model.itc_vl.text(text_only.text_vl[:, 0]),
        "itm": model.itm(model.pooler(pair.text[:, 0])),
        "mlm": model.mlm(pair.text[mask]),
        "pair_image": pair.image,
    }
    image_x, text_x = reference.image(pixels), reference.text(text)
    image_states = reference.encode(image_x, everything, 0, vl=True)
    expected = {
        "image": reference.projected("itc_image_proj", reference.encode(image_x, everything, 0)),
        "image_vl": reference.projected("itc_vl_image_proj", image_states),
        "text": reference.projected("itc_text_proj", reference.encode(text_x, mask, 6)),
        "text_vl": reference.projected("itc_vl_text_proj", reference.encode(text_x, mask, 6, vl=True)),
        "itm": reference.linear("itm_score.fc", reference.pooled(expected_pair)),
        "mlm": reference.words(expected_pair[:, :6][mask]),
        "pair_image": expected_pair[:, 6:],
    }
    for name in ours:
        torch.testing.assert_close(ours[name], expected[name], **CLOSE, msg=lambda text, name=name: name + text)

    generator = torch.Generator().manual_seed(5)
    weights = {name: torch.randn(x.shape, generator=generator, dtype=x.dtype) for name, x in ours.items()}
    sum((ours[name] * weights[name]).sum() for name in ours).backward()
    sum((expected[name] * weights[name]).sum() for name in ours).backward()
    parameters = dict(model.named_parameters())
    for name, value in reference.state.items():
        if value.grad is not None:
            torch.testing.assert_close(parameters[our_name(name)].grad, value.grad, atol=1e-8, rtol=1e-7)


def through(kind: str, model: VLMo, schema: Schema, text, mask, **columns) -> dict[str, float]:
    """The loss that the task of a recipe has of these rows, with its gradients; pixels as the tasks get them."""
    columns = {name: (x + 1) * 127.5 if name.startswith("image") else x for name, x in columns.items()}
    columns |= {"text_ids": text, "text_mask": mask}
    batch = Batch(columns, torch.ones(3, dtype=torch.bool), torch.arange(3), ["a", "b", "c"], [""] * 3)
    config = dataclasses.replace(recipe(f"{kind}_base"), model=model.config)
    task = build_task(model, config, schema)
    figures = gradients(parallelize(task, ClusterConfig(), 1, torch.device("cpu")), batch, Workers((3,)), 0, 3)
    return {name: float(value) for name, value in figures.items()}


def check_gradients(model: VLMo, reference: Reference, loss: torch.Tensor) -> None:
    loss.backward()
    parameters = dict(model.named_parameters())
    compared = [name for name, value in reference.state.items() if value.grad is not None and value.grad.any()]
    assert len(compared) > 30
    for name in compared:
        torch.testing.assert_close(
            parameters[our_name(name)].grad, reference.state[name].grad, atol=1e-8, rtol=1e-7, msg=name
        )


def test_vqa_through_its_task():
    model, reference = both(("vqa",))
    (pixels, _), text, mask = inputs()
    assert model.config.heads == ("vqa",) and model.config.num_answers == 7
    expected = reference.classified("vqa", reference.pooled(reference.pair(pixels, text, mask)))
    target = torch.rand(3, 7, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    answers = tuple(str(i) for i in range(7))
    schema = Schema((Field("image", "image"), Field("text", "text"), Field("answers", "answers", answers)))
    found = through("vqa", model, schema, text, mask, image=pixels, target=target)
    loss = F.binary_cross_entropy_with_logits(expected, target) * 7  # the mean of all logits, times their number
    assert found["answer_bce"] == pytest.approx(float(loss), rel=1e-9)
    check_gradients(model, reference, loss)


def test_nlvr2_through_its_task_puts_the_second_image_in_slot_two():
    model, reference = both(("nlvr2",))
    (left, right), text, mask = inputs()
    assert len(model.modality.weight) == 3
    expected = [reference.pooled(reference.pair(image, text, mask, s)) for image, s in ((left, 1), (right, 2))]
    expected = reference.classified("nlvr2", torch.cat(expected, dim=1))
    label = torch.tensor([0, 1, 1])
    fields = [Field(name, "image") for name in ("image", "image_2")]
    schema = Schema((*fields, Field("text", "text"), Field("label", "label", ("False", "True"))))
    found = through("nlvr2", model, schema, text, mask, image=left, image_2=right, label=label)
    loss = F.cross_entropy(expected, label)
    assert found["cross_entropy"] == pytest.approx(float(loss), rel=1e-9)
    check_gradients(model, reference, loss)


def test_retrieval_has_one_branch_and_carries_the_pooler():
    state = random_state_dict(losses=("irtr",))
    config, _, report = from_official(state, num_heads=2)
    assert config.heads == ("itc",)
    assert {"pooler.dense.weight", "pooler.dense.bias"} == set(report.carried)


@pytest.mark.parametrize("size", [16, 8])
def test_another_image_size_with_absolute_positions(size):
    model, reference = both(("vqa",), image_size=size)
    (pixels, _), text, mask = inputs(size)
    with torch.no_grad():
        old = reference.state["transformer.pos_embed"]
        grid = old[:, 1:].view(1, 3, 3, -1).permute(0, 3, 1, 2).float()
        new = F.interpolate(grid, size=(size // 4, size // 4), mode="bicubic", align_corners=False)
        new = new.permute(0, 2, 3, 1).reshape(1, -1, old.shape[-1]).double()
        reference.state["transformer.pos_embed"] = torch.cat([old[:, :1], new], dim=1)
    pair = model.encode(image=pixels, text=text, text_mask=mask)
    expected = reference.pair(pixels, text, mask)
    torch.testing.assert_close(pair.image, expected[:, 6:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pair.text[mask], expected[:, :6][mask], atol=1e-5, rtol=1e-5)
