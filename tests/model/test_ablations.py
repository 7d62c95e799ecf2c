"""The models of the paper's ablations: against the full model where that can be made to do the same."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors
from small_run import SMALL, job, train_on
from test_vlmo import TINY, build, inputs

from vlmo_ray.config import check
from vlmo_ray.data.schema import PAIRS
from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError
from vlmo_ray.model.vlmo import VLMo, copy_experts, init_weights
from vlmo_ray.recipes.pretraining import PretrainingConfig
from vlmo_ray.runs.metrics import read_metrics
from vlmo_ray.train.build import starting_task
from vlmo_ray.train.loop import train
from vlmo_ray.weights.folder import export_official, load_model, save_model
from vlmo_ray.weights.resize import fit_state


def outputs(model: VLMo) -> dict[str, torch.Tensor]:
    image, text, mask = inputs()
    alone, words = model.encode(image=image), model.encode(text=text, text_mask=mask)
    pair = model.encode(image=image, text=text, text_mask=mask)
    real = mask[:, :, None]
    return {"image": alone.image, "text": words.text * real, "pair text": pair.text * real, "pair image": pair.image}


def assert_equal(found, wanted):
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10, msg=name)


def test_one_network_is_all_experts_alike():
    one = build(dataclasses.replace(TINY, heads=(), experts="one"))
    assert {name for name, _ in one.layers[0].experts.named_children()} == {"all"}
    several = VLMo(dataclasses.replace(TINY, heads=())).double()
    state = one.state_dict()
    wanted = {}
    for name in several.state_dict():
        kind = next((k for k in ("text", "image", "vl") if f".experts.{k}." in name), "")
        wanted[name] = state[name.replace(f".experts.{kind}.", ".experts.all.") if kind else name]
    several.load_state_dict(wanted)
    assert_equal(outputs(one), outputs(several))


@pytest.mark.parametrize("position", ["relative", "absolute"])
def test_with_attention_apart_a_pair_is_two_unimodal_passes_below(position):
    config = dataclasses.replace(TINY, heads=(), attention="separate", vl_start=TINY.depth, position=position)
    found = outputs(build(config))
    assert_equal({"image": found["pair image"], "text": found["pair text"]}, {k: found[k] for k in ("image", "text")})
    fused = outputs(build(dataclasses.replace(config, vl_start=2)))
    assert not torch.allclose(fused["pair text"], fused["text"])


def test_attention_apart_with_equal_weights_is_shared_attention_for_one_modality():
    apart = build(dataclasses.replace(TINY, heads=(), attention="separate"))
    copy_experts(apart, "text", "image")
    shared = build(dataclasses.replace(TINY, heads=()))
    shared.load_state_dict({name: apart.state_dict()[name] for name in shared.state_dict()})
    found, wanted = outputs(apart), outputs(shared)
    assert_equal({k: found[k] for k in ("image", "text")}, {k: wanted[k] for k in ("image", "text")})
    assert not torch.allclose(found["pair text"], wanted["pair text"])  # there they meet two layers later


def test_without_vision_language_experts_a_pair_keeps_its_route():
    found = build(dataclasses.replace(TINY, heads=(), vl_start=TINY.depth))
    assert not any(".experts.vl." in name for name, _ in found.named_parameters())
    image, text, mask = inputs()
    changed = found.encode(image=image, text=text, text_mask=mask).text
    found.layers[-1].experts["image"].fc2.weight.data.zero_()
    torch.testing.assert_close(found.encode(image=image, text=text, text_mask=mask).text, changed)


@pytest.mark.parametrize("kind, source", [("vl", "image"), ("vl", "text"), ("text", "image")])
def test_experts_start_as_a_copy(tmp_path, kind, source):
    given = VLMo(SMALL.model)
    init_weights(given, 5)
    save_model(given, tmp_path)
    config = dataclasses.replace(SMALL, init=str(tmp_path), **{f"start_{kind}_experts": source})
    model, plain = starting_task(config, PAIRS).model, given.state_dict()
    for name, value in model.state_dict().items():
        wanted = name.replace(f".experts.{kind}.", f".experts.{source}.")
        assert torch.equal(value, plain[wanted]), name
    assert any(f".experts.{kind}." in name for name in plain)


CHANGES = {
    "one": {"experts": "one"},
    "apart": {"attention": "separate"},
    "none": {"vl_start": SMALL.model.depth},
    "everywhere": {"vl_start": 0},
}


def config_of(name: str):
    model = dataclasses.replace(SMALL.model, **CHANGES[name])
    task = PretrainingConfig(vl_contrast=name in ("apart", "everywhere"))
    return check(dataclasses.replace(SMALL, model=model, task=task, precision="float64", phases=SMALL.phases[:1]))


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_they_train_alike_on_one_and_two_workers(scenes, tmp_path, name):
    config = config_of(name)
    assert train(job(scenes, tmp_path / "one", config)).step == 6
    cluster = dataclasses.replace(config.cluster, strategy="fsdp" if name == "apart" else "ddp")
    outcomes = train_on(2, job(scenes, tmp_path / "two", config, cluster=cluster, micro_batch=2))
    assert [outcome.step for outcome in outcomes] == [6, 6], outcomes
    found, wanted = (
        [[m["loss"], m["grad_norm"]] for m in read_metrics(Store(str(tmp_path / r)))[0]] for r in ("two", "one")
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-9)
    states = [load_tensors(Store(str(tmp_path / r)).read("model/model.safetensors")) for r in ("two", "one")]
    torch.testing.assert_close(*states, rtol=1e-9, atol=1e-12)


def test_what_does_not_fit_is_refused(tmp_path):
    one = VLMo(dataclasses.replace(SMALL.model, experts="one", heads=()))
    save_model(one, tmp_path / "one")
    assert load_model(tmp_path / "one").config.experts == "one"
    with pytest.raises(UserError, match=r"has no place for layers\.0\.experts\.all"):
        export_official(tmp_path / "one", tmp_path / "out.pt")
    with pytest.raises(UserError, match="experts 'one', the model asked for has 'modality'"):
        fit_state(one.state_dict(), one.config, SMALL.model)
    for changes in ({"experts": "one"}, {"vl_start": SMALL.model.depth}):
        with pytest.raises(UserError, match="needs vision-language experts"):
            check(dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, **changes)))
    model = dataclasses.replace(SMALL.model, experts="one")
    with pytest.raises(UserError, match=r"need model\.experts='modality'"):
        check(dataclasses.replace(config_of("one"), model=model, start_vl_experts="image"))
    with pytest.raises(UserError, match="exclude each other"):
        check(dataclasses.replace(SMALL, model=dataclasses.replace(model, attention="separate")))
