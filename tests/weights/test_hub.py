"""Folders for huggingface_hub and timm: the same weights, the same features, the same tokens."""

import copy
import dataclasses
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from small_run import SMALL, job
from tokenizers import Tokenizer as RustTokenizer

import vlmo_ray
from vlmo_ray.data.text import Tokenizer
from vlmo_ray.errors import UserError
from vlmo_ray.model import hub
from vlmo_ray.model.vlmo import VLMo, init_weights
from vlmo_ray.report.export import save_tokenizer
from vlmo_ray.train.loop import train
from vlmo_ray.weights.folder import import_official, load_model
from vlmo_ray.weights.timm import export_timm

DOCS = Path(__file__).parents[2] / "docs" / "weights.md"


def build(**changes) -> VLMo:
    model = VLMo(dataclasses.replace(SMALL.model, depth=3, **changes)).eval()
    init_weights(model, 1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def equal(a: VLMo, b: VLMo) -> bool:
    states = a.state_dict(), b.state_dict()
    return list(states[0]) == list(states[1]) and all(torch.equal(states[0][n], states[1][n]) for n in states[0])


@pytest.mark.parametrize("changes", [{}, {"position": "absolute", "layer_scale": None}, {"init_logit_bias": -10.0}])
def test_a_folder_gives_the_model_back(changes, tmp_path):
    model = build(**changes)
    model.save_pretrained(tmp_path)
    for found in (vlmo_ray.VLMo.from_pretrained(tmp_path), VLMo.from_pretrained(str(tmp_path)), load_model(tmp_path)):
        assert found.config == model.config and equal(found, model)
    assert equal(copy.deepcopy(model), model) and equal(pickle.loads(pickle.dumps(model)), model)


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match=r"holds no model: it has no config.json"):
        VLMo.from_pretrained(tmp_path)
    build().save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | {"format": "bert"}))
    with pytest.raises(UserError, match="is not of a model of this program"):
        VLMo.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="nobody/no-model is neither a folder nor a model of the hub that can be read"):
        hub.read("nobody/no-model", local_files_only=True)
    with pytest.raises(AttributeError, match="no attribute 'VLM'"):
        vlmo_ray.VLM  # noqa: B018


TIMM = {
    "relative": {},
    "absolute": {"position": "absolute"},
    "without LayerScale": {"layer_scale": None},
    "one network": {"experts": "one", "heads": ("itc", "itm", "mlm")},
    "attention of its own": {"attention": "separate"},
}


@pytest.mark.parametrize("kind", TIMM)
def test_timm_gives_the_same_features(kind, tmp_path):
    model = build(**TIMM[kind])
    export_timm(model, tmp_path)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    image = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        wanted = model.encode(image=image).image
        torch.testing.assert_close(theirs.forward_features(image), wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(theirs(image), wanted[:, 0], rtol=1e-4, atol=1e-4)
    data = timm.data.resolve_model_data_config(theirs)
    assert data["input_size"] == (3, 16, 16) and list(data["mean"]) == list(data["std"]) == [0.5] * 3
    told = {"num_heads": 2} if kind == "absolute" else {}
    import_official(tmp_path / "model.safetensors", tmp_path / "back", **told)
    back = load_model(tmp_path / "back", allow_missing=True)
    with torch.no_grad():
        back.modality.weight.zero_()  # BEiT has none: it is in the patches by now
        torch.testing.assert_close(back.encode(image=image).image, wanted, rtol=1e-4, atol=1e-4)


def test_the_tokenizer_of_others_gives_the_same_tokens(tmp_path):
    save_tokenizer(12, tmp_path)
    theirs, ours = RustTokenizer.from_file(str(tmp_path / "tokenizer.json")), Tokenizer(12)
    for text in ("Two dalmatians run.", "Été à la plage!", "a [MASK] of words " * 9, "x", "\u4e2d\u6587 text", "don't"):
        ids, mask, _ = ours.encode(text)
        assert theirs.encode(text).ids == ids[mask].tolist(), text
    assert len((tmp_path / "vocab.txt").read_text().splitlines()) == 30522


@pytest.fixture(scope="module")
def run(scenes, tmp_path_factory) -> str:
    where = str(tmp_path_factory.mktemp("hub") / "some-run")
    spec = job(scenes, where, SMALL, evaluate_every=10, seed=4)
    assert train(dataclasses.replace(spec, eval_data=scenes)).step == 10
    return where


def test_of_a_run(run, tmp_path, vlmo):
    out = str(tmp_path / "folder")
    done = vlmo("export", run, out, "--format", "hub")
    assert done.returncode == 0 and "model.safetensors" in done.stdout and done.stdout.endswith(f"into {out}\n")
    assert equal(VLMo.from_pretrained(out), vlmo_ray.load(run)) and equal(vlmo_ray.load(out), vlmo_ray.load(run))
    card = Path(out, "README.md").read_text()
    assert "Recipe `small`, 10 of 10 steps, 96 rows seen, seed 4." in card
    vlmo("export", f"{run}/model", str(tmp_path / "model"), "--format", "hub")
    assert "10 of 10 steps, 96 rows seen" in (tmp_path / "model" / "README.md").read_text()
    assert re.search(r"\| .*, step 10 \| text_retrieval_r@1 \| [\d.]+% \| 1.7% \| 60 \|", card)
    assert "## Limits" in card and "library_name: vlmo-ray" in card and "zero-shot-image-classification" in card
    assert vlmo("export", out, str(tmp_path / "again"), "--format", "hub").returncode == 0
    assert "The weights came without a run" in (tmp_path / "again" / "README.md").read_text()
    assert vlmo("export", run, str(tmp_path / "beit"), "--format", "timm").returncode == 0
    assert (tmp_path / "beit" / "config.json").is_file()


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch, capsys):
    """Zero-shot classification, by a model that knows the words."""
    model = build(vocab_size=30522)
    model.save_pretrained(tmp_path / "hub" / "pretrain_base")
    save_tokenizer(model.config.max_text_len, tmp_path / "hub" / "pretrain_base")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    exec(compile(code, str(DOCS), "exec"), {})
    shares = re.findall(r"0\.\d+|1\.0", capsys.readouterr().out)
    assert sum(map(float, shares)) == pytest.approx(1.0, abs=1e-5) and len(shares) == 3
