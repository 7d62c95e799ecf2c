"""Released files in and out: every key accounted for, every bit given back, nothing silent, nothing run."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from official_reference import random_state_dict
from safetensors.torch import save_file
from translated import from_official

import vlmo_ray
from vlmo_ray.config import MODEL_SIZES
from vlmo_ray.errors import UserError
from vlmo_ray.model.vlmo import VLMo, init_weights
from vlmo_ray.recipes import RECIPES, recipe
from vlmo_ray.runs.load import load, load_all
from vlmo_ray.weights.folder import export_official, import_official, load_model, save_model
from vlmo_ray.weights.official import official_name, our_name
from vlmo_ray.weights.resize import resample_table

RELATIVE = {"width": 24, "num_heads": 2, "position": "relative"}


def wrapped(state: dict, wrapper: str) -> dict:
    if wrapper == "module":
        return {"module": {f"module.{name}": value for name, value in state.items()}, "epoch": 3}
    if wrapper == "state_dict":
        return {"epoch": 3, "global_step": 7, "state_dict": state}
    return {wrapper: state} if wrapper else state


def identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same type, shape and bits, NaN and the sign of 0 included."""
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("wrapper", ["", "state_dict", "module", "model"])
@pytest.mark.parametrize("position", ["relative", "absolute"])
def test_import_then_export_gives_every_bit_back(tmp_path, wrapper, position):
    width = 544 if position == "absolute" else 24  # absolute: the number of heads is known by width
    state = random_state_dict(width=width, position=position, depth=2, vl_start=1, buffers=True)
    half = {"transformer.norm.weight", "relative_position_bias_table", "pooler.dense.bias"}
    state = {n: v.half() if n in half else v for n, v in state.items()}
    state["transformer.norm.bias"] = state["transformer.norm.bias"].to(torch.bfloat16)
    state["transformer.norm.weight"][:2] = torch.tensor([float("nan"), -0.0])
    state["text_embeddings.word_embeddings.weight"] = state["text_embeddings.word_embeddings.weight"].T.clone().T
    torch.save(wrapped(state, wrapper), tmp_path / "in.pt")

    report = import_official(tmp_path / "in.pt", tmp_path / "folder")
    assert not report.missing and not report.dropped and report.wrapper == wrapper
    assert len(report.used) + len(report.carried) == len(state)
    export_official(tmp_path / "folder", tmp_path / "out.pt")

    out = torch.load(tmp_path / "out.pt", weights_only=True)
    assert list(out) == ([wrapper] if wrapper else list(state))
    out = out[wrapper] if wrapper else out
    prefix = "module." if wrapper == "module" else ""
    assert list(out) == [prefix + name for name in state]
    for name, value in state.items():
        assert identical(out[prefix + name], value.contiguous()), name


@pytest.mark.parametrize("losses", [("vqa",), ("nlvr2",), ("irtr",), ("textmlm",)])
def test_fine_tuned_and_text_stage_files_round_trip(tmp_path, losses):
    vl_start = 3 if losses == ("textmlm",) else 2
    state = random_state_dict(losses=losses, vl_start=vl_start, text_len=9, **RELATIVE)
    save_file(state, tmp_path / "in.safetensors")
    report = import_official(tmp_path / "in.safetensors", tmp_path / "folder")
    assert not report.missing
    model = load_model(tmp_path / "folder")
    assert model.config.max_text_len == 9 and model.config.num_heads == 2 and model.config.vl_start == vl_start
    export_official(tmp_path / "folder", tmp_path / "out.pt")
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    assert out.keys() == state.keys()
    assert all(identical(out[name], value) for name, value in state.items())


@pytest.mark.parametrize("name", ["base", "base_plus", "large"])
def test_the_configuration_of_released_sizes_is_read_off_the_shapes(name):
    config = MODEL_SIZES[name]
    with torch.device("meta"):
        ours = VLMo(config).state_dict()
    state = {official_name(key): value for key, value in ours.items()}
    state["text_embeddings.position_embeddings.weight"] = torch.empty(40, config.width, device="meta")
    inferred, converted, report = from_official(state)
    assert inferred == config
    assert converted.keys() == ours.keys() and not report.missing
    assert all(our_name(official_name(key)) == key for key in ours)


def test_unknown_keys_are_refused_by_name():
    state = random_state_dict(**RELATIVE)
    state["transformer.blocks.1.mlp_audio.fc1.weight"] = torch.zeros(3)
    state["transformer.blocks.1.norm1.wait"] = torch.zeros(3)
    with pytest.raises(UserError, match=r"mlp_audio\.fc1\.weight, transformer\.blocks\.1\.norm1\.wait"):
        from_official(state)
    with pytest.raises(UserError, match=r"not a VLMo state dict.*conv1"):
        from_official({"conv1.weight": torch.zeros(2)})
    with pytest.raises(UserError, match="epoch"):
        from_official({"epoch": 3})


def test_wrong_shapes_are_refused_by_name():
    state = random_state_dict(**RELATIVE)
    state["transformer.blocks.1.attn.proj.weight"] = torch.zeros(24, 25)
    with pytest.raises(UserError, match=r"layers\.1\.attention\.out\.weight"):
        from_official(state)
    state = random_state_dict(**RELATIVE)
    state["relative_position_bias_table"] = state["relative_position_bias_table"][:-1]
    with pytest.raises(UserError, match="bias_text_len"):
        from_official(state)
    with pytest.raises(UserError, match="num_heads"):
        from_official(random_state_dict(width=36, position="absolute"))


def test_missing_parameters_are_reported_and_not_loaded_silently(tmp_path):
    state = random_state_dict(**RELATIVE)
    gone = ["itm_score.fc.bias", "transformer.blocks.2.mlp_vl.fc1.weight"]
    for name in gone:
        del state[name]
    _, ours, report = from_official(state)
    assert set(report.missing) == {our_name(name) for name in gone} and not set(report.missing) & set(ours)
    assert "2 missing: " in str(report)
    save_file(state, tmp_path / "in.safetensors")
    with pytest.raises(UserError, match=r"lacks 2 parameters.*itm\.bias"):
        load_model(tmp_path / "in.safetensors")
    model = load_model(tmp_path / "in.safetensors", allow_missing=True, seed=3)
    fresh = VLMo(model.config)
    init_weights(fresh, seed=3)
    name = "layers.2.experts.vl.fc1.weight"
    assert torch.equal(model.state_dict()[name], fresh.state_dict()[name])
    assert set(import_official(tmp_path / "in.safetensors", tmp_path / "folder").missing) == set(report.missing)


def test_a_text_stage_starts_vision_language_pretraining():
    state = random_state_dict(losses=("textmlm",), vl_start=3, text_len=9, **RELATIVE)
    config, _, report = from_official(state, heads=("itc", "mlm"), max_text_len=6)
    assert config.vl_start == 3 and config.max_text_len == 6  # the file has no vision-language experts
    assert {name.split(".")[0] for name in report.missing} == {"itc"}


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_files_that_would_run_code_are_refused(tmp_path):
    torch.save({"state_dict": random_state_dict(**RELATIVE), "hook": Evil(tmp_path / "ran")}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="run code"):
        import_official(tmp_path / "evil.pt", tmp_path / "out")
    with pytest.raises(UserError, match=r"is a pickle; convert it: vlmo import .*evil\.pt OUT"):
        load_model(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_unreadable_files_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="no file"):
        load_model(tmp_path / "nothing.pt")
    torch.save(random_state_dict(**RELATIVE), tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:5000])
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("cut.pt", "cut.safetensors", "empty.pt"):
        with pytest.raises(UserError, match=name):
            import_official(tmp_path / name, tmp_path / "out")
    with pytest.raises(UserError, match=r"cut\.safetensors"):
        load_model(tmp_path / "cut.safetensors")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(UserError, match="list"):
        import_official(tmp_path / "list.pt", tmp_path / "out")
    with pytest.raises(UserError, match=r"model\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_refused_by_name(tmp_path, value):
    model = VLMo(recipe("tiny").model)
    init_weights(model, 1)
    with torch.no_grad():
        model.layers[1].attention.out.weight[0, 3] = value
    save_model(model, tmp_path)
    for way in (load, load_all):
        with pytest.raises(UserError, match=rf"{tmp_path} has NaN or infinite values in 1 of its tensors: layers\.1"):
            way(tmp_path)


def test_loads_at_another_image_size_with_other_heads(tmp_path):
    state = random_state_dict(buffers=True, **RELATIVE)
    torch.save({"model": state}, tmp_path / "in.pt")
    import_official(tmp_path / "in.pt", tmp_path / "folder")
    expected = resample_table(state["relative_position_bias_table"], 3, 5, 196)
    save_file(state, tmp_path / "in.safetensors")
    for path in (tmp_path / "in.safetensors", tmp_path / "folder"):
        model = load_model(path, image_size=20, heads=("itc", "mlm"))
        assert torch.equal(model.relative.table, expected)
        assert model.config.image_size == 20 and model.itm is None
        assert model.encode(image=torch.zeros(1, 3, 20, 20)).image.shape == (1, 26, 24)
    with pytest.raises(UserError, match="not a multiple"):
        load_model(tmp_path / "folder", image_size=21)


def test_a_model_of_ours_is_saved_loaded_and_exported_with_index_buffers(tmp_path):
    config = from_official(random_state_dict(**RELATIVE))[0]
    model = VLMo(config)
    init_weights(model, seed=2)
    save_model(model, tmp_path / "run" / "model")
    loaded = vlmo_ray.load(tmp_path / "run" / "model")
    assert loaded.config == config
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())

    export_official(tmp_path / "run" / "model", tmp_path / "out.pt")
    out = torch.load(tmp_path / "out.pt", weights_only=True)["model"]
    assert out["relative_position_index"].shape == (10, 10)
    assert out["text_imag_relative_position_index"].shape == (16, 16)
    assert torch.equal(out["text_imag_relative_position_index"][6:, 6:].long(), out["relative_position_index"])
    assert torch.equal(out["text_embeddings.position_ids"], torch.arange(6)[None])
    import_official(tmp_path / "out.pt", tmp_path / "again")
    again = vlmo_ray.load(tmp_path / "again")
    assert again.config == config
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_folders_of_another_version_are_refused(tmp_path):
    save_model(VLMo(from_official(random_state_dict(**RELATIVE))[0]), tmp_path)
    description = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(description | {"version": 99}))
    with pytest.raises(UserError, match="99"):
        load_model(tmp_path)


@pytest.mark.parametrize("shared", [False, True])
def test_beit_becomes_vision_experts_and_reports_the_rest(tmp_path, shared):
    full = random_state_dict(**RELATIVE, losses=())
    tables = full["relative_position_bias_table"][: 5 * 5 + 3]
    beit = {}
    for name, value in full.items():
        if not name.startswith("transformer.") or any(s in name for s in ("_text", "_vl", "transformer.norm")):
            continue
        beit[name.removeprefix("transformer.").replace("_imag", "")] = value
    for layer in range(3):
        beit[f"blocks.{layer}.attn.relative_position_index"] = torch.zeros(10, 10, dtype=torch.long)
        if not shared:
            beit[f"blocks.{layer}.attn.relative_position_bias_table"] = tables[:, 2 * layer : 2 * layer + 2]
    if shared:
        beit["rel_pos_bias.relative_position_bias_table"] = tables[:, :2]
    beit |= {"fc_norm.weight": torch.ones(24), "fc_norm.bias": torch.zeros(24), "head.weight": torch.zeros(9, 24)}

    config, state, report = from_official({"model": beit}, max_text_len=6)
    assert (config.vl_start, config.depth, config.image_size, config.num_heads) == (3, 3, 12, 2)
    assert config.heads == () and config.max_text_len == 6
    assert torch.equal(state["layers.1.experts.image.fc1.weight"], beit["blocks.1.mlp.fc1.weight"])
    expected = torch.cat([tables[:, :2]] * 3, dim=1) if shared else tables
    assert torch.equal(state["relative.table"][:28], expected)
    assert not state["relative.table"][28:].any()
    assert {"fc_norm.weight", "head.weight"} <= set(report.dropped)
    missing = set(report.missing)
    assert {"norm.weight", "text_embed.word.weight", "layers.0.experts.text.fc1.weight"} <= missing
    assert not any(".image." in name or ".attention." in name for name in missing)
    torch.save({"model": beit}, tmp_path / "beit.pt")
    import_official(tmp_path / "beit.pt", tmp_path / "folder")
    assert load_model(tmp_path / "folder", allow_missing=True).config.image_size == 12


def test_the_package_imports_without_torch():
    code = "import sys, vlmo_ray; assert callable(vlmo_ray.load); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_exported_of_a_recipe_can_be_imported(tmp_path, name):
    """Its heads, positions, text lengths and number of attention heads, at a small width."""
    config = recipe(name).model
    config = dataclasses.replace(
        config, width=4 * config.num_heads, depth=3, vl_start=2, vocab_size=1100, image_size=2 * config.patch_size
    )
    model = VLMo(config)
    init_weights(model, 0)
    save_model(model, tmp_path / "ours")
    export_official(tmp_path / "ours", tmp_path / "out.pt")
    import_official(tmp_path / "out.pt", tmp_path / "again")
    found = load_model(tmp_path / "again")
    same = ("width", "depth", "num_heads", "vl_start", "position", "image_size", "bias_text_len", "heads")
    assert [getattr(found.config, field) for field in same] == [getattr(config, field) for field in same]
    torch.testing.assert_close(found.state_dict(), model.state_dict(), rtol=0, atol=0)
    export_official(tmp_path / "again", tmp_path / "twice.pt")
    import_official(tmp_path / "twice.pt", tmp_path / "third")
    torch.testing.assert_close(load_model(tmp_path / "third").state_dict(), model.state_dict(), rtol=0, atol=0)
