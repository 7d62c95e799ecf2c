"""The whole model: parameter counts, who computes what, padding, drop path, precision, initialisation."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from vlmo_ray.config import MODEL_SIZES, ModelConfig
from vlmo_ray.errors import UserError
from vlmo_ray.model.vlmo import VLMo, init_weights
from vlmo_ray.rng import Noise

TINY = ModelConfig(
    width=24, depth=3, num_heads=2, vl_start=2, image_size=8, patch_size=4, vocab_size=19, max_text_len=6,
    bias_text_len=9, drop_path=0.4,
)  # fmt: skip
ABSOLUTE = dataclasses.replace(TINY, position="absolute", layer_scale=None)
BOTH = pytest.mark.parametrize("config", [TINY, ABSOLUTE], ids=["relative", "absolute"])


def build(config: ModelConfig, seed: int = 0) -> VLMo:
    """A model in float64 with nothing at its initial zero or one, so that everything shows in the outputs."""
    model = VLMo(config).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.3)
    return model


def inputs(batch: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    image = torch.rand(batch, 3, 8, 8, generator=generator, dtype=torch.float64) * 2 - 1
    text = torch.randint(0, 19, (batch, 6), generator=generator)
    lengths = 2 + torch.arange(batch) % 5
    return image, text, torch.arange(6) < lengths[:, None]


def noise(positions: torch.Tensor, name: str = "pass") -> Noise:
    return Noise(seed=1, step=2, name=name, positions=positions)


@pytest.mark.parametrize(("name", "millions"), [("base", 175), ("base_plus", 167), ("large", 562)])
def test_parameter_counts_without_heads(name, millions):
    with torch.device("meta"):
        model = VLMo(dataclasses.replace(MODEL_SIZES[name], heads=()))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.6)


def trained(model: VLMo, loss: torch.Tensor) -> set[str]:
    """Names of the parameters with a gradient that is not zero."""
    model.zero_grad()
    loss.backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@BOTH
def test_each_pass_trains_its_experts_and_all_that_is_shared(config):
    model = build(dataclasses.replace(config, heads=()))
    image, text, mask = inputs()

    def weigh(*tokens):
        generator = torch.Generator().manual_seed(9)
        return sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in tokens)

    names = [name for name, _ in model.named_parameters()]
    shared = {n for n in names if n.startswith(("layers", "norm", "relative", "modality"))}
    shared -= {n for n in names if ".experts." in n}
    of_text = {n for n in names if n.startswith("text_embed")}
    of_image = {n for n in names if n.startswith("image_embed")}

    def experts(*which: str) -> set[str]:  # of layers 0, 1 and 2
        starts = [f"layers.{layer}.experts.{name}." for layer, some in enumerate(which) for name in some.split()]
        return {n for n in names if n.startswith(tuple(starts))}

    out = model.encode(image=image)
    assert trained(model, weigh(out.image)) == shared | of_image | experts("image", "image", "image")
    out = model.encode(text=text, text_mask=mask)
    assert trained(model, weigh(out.text)) == shared | of_text | experts("text", "text", "text")
    out = model.encode(image=image, text=text, text_mask=mask)
    assert trained(model, weigh(out.text, out.image)) == (
        shared | of_text | of_image | experts("text image", "text image", "vl")
    )
    out = model.encode(image=image, vl_branch=True)
    assert trained(model, weigh(out.image_vl)) == shared | of_image | experts("image", "image", "vl")
    out = model.encode(text=text, text_mask=mask, vl_branch=True)
    assert trained(model, weigh(out.text_vl)) == shared | of_text | experts("text", "text", "vl")


def test_the_six_passes_train_every_parameter():
    model = build(dataclasses.replace(TINY, heads=("itc", "itc_vl", "itm", "mlm", "vqa", "nlvr2")))
    image, text, mask = inputs()
    bias = model.position_bias(text.shape[1])
    one = model.encode(image=image, bias=bias, vl_branch=True)
    two = model.encode(text=text, text_mask=mask, bias=bias, vl_branch=True)
    pair = model.encode(image=image, text=text, text_mask=mask, bias=bias)
    other = model.encode(image=image, text=text, text_mask=mask, bias=bias, image_slot=2)
    pooled = model.pooler(pair.text[:, 0])
    loss = 0
    for head, i, t in ((model.itc, one.image, two.text), (model.itc_vl, one.image_vl, two.text_vl)):
        similarity = head.log_scale.exp() * head.image(i[:, 0]) @ head.text(t[:, 0]).T
        loss = loss - similarity.log_softmax(1).diagonal().mean()
    loss = loss + model.itm(pooled)[:, 1].mean() + model.mlm(pair.text[mask])[:, 3].mean()
    loss = loss + model.vqa(pooled)[:, 5].mean()
    loss = loss + model.nlvr2(torch.cat([pooled, model.pooler(other.text[:, 0])], dim=1))[:, 0].mean()
    assert trained(model, loss) == {name for name, _ in model.named_parameters()}


@BOTH
def test_padding_changes_nothing(config):
    model = build(config)
    image, text, mask = inputs(batch=5)
    padded_pair = model.encode(image=image, text=text, text_mask=mask)
    padded_text = model.encode(text=text, text_mask=mask, vl_branch=True)
    for row in range(5):
        n = int(mask[row].sum())
        alone = model.encode(image=image[row, None], text=text[row, None, :n])
        torch.testing.assert_close(padded_pair.text[row, :n], alone.text[0], atol=1e-11, rtol=1e-11)
        torch.testing.assert_close(padded_pair.image[row], alone.image[0], atol=1e-11, rtol=1e-11)
        alone = model.encode(text=text[row, None, :n], vl_branch=True)
        torch.testing.assert_close(padded_text.text[row, :n], alone.text[0], atol=1e-11, rtol=1e-11)
        torch.testing.assert_close(padded_text.text_vl[row, :n], alone.text_vl[0], atol=1e-11, rtol=1e-11)
    scrambled = torch.where(mask, text, (text + 7) % 19)
    again = model.encode(image=image, text=scrambled, text_mask=mask)
    assert torch.equal(again.image, padded_pair.image)
    assert torch.equal(again.text[mask], padded_pair.text[mask])


READ = [
    TINY,
    ABSOLUTE,
    dataclasses.replace(TINY, experts="one"),
    dataclasses.replace(TINY, attention="separate"),
    dataclasses.replace(TINY, attention="separate", vl_start=3),
    dataclasses.replace(TINY, vl_start=3),
]


@pytest.mark.parametrize("config", READ, ids=["relative", "absolute", "one", "separate", "separate below", "no VL"])
def test_what_is_read_does_not_depend_on_what_is_not(config):
    """Values and gradients of the first tokens, with drop path, as if all had been computed."""
    model, (image, text, mask) = build(config), inputs()
    passes = {"image": (1, 3, 5), "text": (1, 4, 6), "pair": (1, 4, 6)}
    for kind, counts in passes.items():
        given = {} if kind == "text" else {"image": image}
        given |= {} if kind == "image" else {"text": text, "text_mask": mask}
        for count in counts:
            grads = []
            for read in (None, count):
                found = model.encode(**given, read=read, noise=noise(torch.arange(5)), vl_branch=kind != "pair")
                states = [getattr(found, name) for name in ("text", "text_vl") if kind != "image"]
                states += [getattr(found, name) for name in ("image", "image_vl") if kind == "image"]
                states = torch.stack([x[:, :count] for x in states if x is not None])
                model.zero_grad()
                (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
                grads.append((states, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
            (whole, wanted), (some, own) = grads
            assert some.shape == whole.shape and torch.allclose(some, whole, rtol=1e-10, atol=1e-12)
            assert wanted.keys() == own.keys()
            for name, value in wanted.items():
                assert torch.allclose(own[name], value, rtol=1e-9, atol=1e-10), (kind, count, name)


@pytest.mark.parametrize("read", [None, 1, 4])
def test_the_last_layer_computes_only_what_is_read(read):
    model, (image, text, mask) = build(TINY), inputs()
    asked, expert = [], []
    last = model.layers[-1]
    last.attention.out.register_forward_pre_hook(lambda _, given: asked.append(given[0].shape[1]))
    last.experts["vl"].register_forward_pre_hook(lambda _, given: expert.append(given[0].shape[1]))
    model.layers[0].attention.out.register_forward_pre_hook(lambda _, given: asked.append(given[0].shape[1]))
    model.encode(image=image, text=text, text_mask=mask, read=read)
    assert asked == [6 + 5, read or 6 + 5] and expert == [read or 6 + 5]


def test_one_bias_serves_all_passes():
    model = build(TINY)
    image, text, mask = inputs()
    bias = model.position_bias(text.shape[1])
    assert bias.shape == (3, 2, 6 + 5, 6 + 5)
    assert torch.equal(bias, model.position_bias())
    for arguments in ({"image": image}, {"text": text, "text_mask": mask}, {"image": image, "text": text}):
        own, shared = model.encode(**arguments), model.encode(**arguments, bias=bias)
        for field in ("text", "image"):
            if getattr(own, field) is not None:
                assert torch.equal(getattr(own, field), getattr(shared, field))
    tokens = model.embed_image(image, image_slot=1)
    assert torch.equal(model.encode(image=tokens).image, model.encode(image=image).image)
    assert build(ABSOLUTE).position_bias() is None


@BOTH
def test_vl_branch_reruns_the_top_layers_from_below(config):
    model = build(config)
    image, text, _ = inputs()
    out = model.encode(image=image, vl_branch=True)
    bias = model.position_bias(0)
    x = model.embed_image(image)
    for index, layer in enumerate(model.layers):
        x = layer(x, "image" if index < 2 else "vl", bias=None if bias is None else bias[index])
    torch.testing.assert_close(out.image_vl, model.norm(x), atol=1e-12, rtol=1e-12)
    assert not torch.allclose(out.image_vl, out.image)
    assert model.encode(image=image).image_vl is None
    assert model.encode(text=text, vl_branch=True).image_vl is None


def test_without_vl_layers_the_text_stage_still_runs():
    model = build(dataclasses.replace(TINY, vl_start=3, heads=("mlm",)))
    image, text, mask = inputs()
    out = model.encode(text=text, text_mask=mask, vl_branch=True)
    assert torch.equal(out.text, out.text_vl)
    assert model.encode(image=image, text=text, text_mask=mask).text.shape == out.text.shape


@BOTH
def test_noise_of_a_sample_does_not_depend_on_the_batch(config):
    model = build(config)
    image, text, mask = inputs(7)
    positions = torch.tensor([11, 4, 900, 3, 8, 1, 0])
    some = torch.tensor([4, 1])
    for arguments in (
        {"image": image, "vl_branch": True},
        {"text": text, "text_mask": mask, "vl_branch": True},
        {"image": image, "text": text, "text_mask": mask},
    ):
        few = {name: value[some] if torch.is_tensor(value) else value for name, value in arguments.items()}
        whole = model.encode(**arguments, noise=noise(positions))
        part = model.encode(**few, noise=noise(positions[some]))
        plain = model.encode(**arguments)
        for field in ("text", "image", "text_vl", "image_vl"):
            if (value := getattr(whole, field)) is not None:
                torch.testing.assert_close(getattr(part, field), value[some], atol=1e-12, rtol=1e-12)
                assert not torch.allclose(value, getattr(plain, field))
                again = getattr(model.encode(**arguments, noise=noise(positions, "other")), field)
                assert not torch.allclose(value, again)


def test_drop_path_rates_grow_from_zero_and_branches_draw_apart():
    model = build(TINY)
    keep = model._keep(noise(torch.arange(4000)), "drop_path")  # [B,L,3]
    dropped = (keep == 0).double().mean(dim=0)
    expected = torch.tensor([0.0, 0.2, 0.4], dtype=torch.float64)[:, None].expand(3, 3)
    torch.testing.assert_close(dropped, expected, atol=0.03, rtol=0)
    torch.testing.assert_close(keep.mean(dim=0), torch.ones(3, 3, dtype=torch.float64), atol=0.06, rtol=0)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert ((keep[:, 2, a] == 0) != (keep[:, 2, b] == 0)).any()
    redrawn = model._keep(noise(torch.arange(4000)), "drop_path_vl")
    assert (redrawn[:, 2] != keep[:, 2]).any()


def test_a_dropped_pair_layer_drops_text_and_image_apart():
    model = build(TINY)
    layer = model.layers[1]
    x = torch.randn(2, 11, 24, dtype=torch.float64)
    keep = torch.tensor([[0.0, 0.0, 2.0], [0.0, 2.0, 0.0]], dtype=torch.float64)
    out = layer(x, "pair", num_text=6, keep=keep)
    assert torch.equal(out[0, :6], x[0, :6]) and torch.equal(out[1, 6:], x[1, 6:])
    vision = layer.experts["image"](x[0, 6:]) * layer.expert_scale
    torch.testing.assert_close(out[0, 6:], x[0, 6:] + 2 * vision, atol=1e-12, rtol=1e-12)


@BOTH
def test_float32_and_bfloat16_stay_near_float64(config):
    model = build(config)
    image, text, mask = inputs()
    arguments = {"text": text, "text_mask": mask, "noise": noise(torch.arange(5))}
    exact = model.encode(image=image, **arguments)
    assert exact.text.dtype == torch.float64
    model = model.float()
    single = model.encode(image=image.float(), **arguments)
    torch.testing.assert_close(single.text.double(), exact.text, atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model.encode(image=image.float(), **arguments)
        features = model.itc.image(half.image[:, 0])
    assert features.dtype == torch.float32
    error = (half.text.double() - exact.text)[mask].abs().mean() / exact.text[mask].abs().mean()
    assert error < 0.05
    torch.testing.assert_close(features.norm(dim=1), torch.ones(5))


def test_init_follows_its_table_and_ignores_other_heads():
    small, big = VLMo(TINY), VLMo(dataclasses.replace(TINY, heads=("vqa", "nlvr2", "itc")))
    init_weights(small, seed=5)
    init_weights(big, seed=5)
    theirs = dict(big.named_parameters())
    for name, parameter in small.named_parameters():
        if name in theirs and name != "modality.weight":
            assert torch.equal(parameter, theirs[name]), name
        if "norm." in name:
            assert (parameter == (1.0 if name.endswith("weight") else 0.0)).all(), name
        elif name.endswith(("bias", "table")):
            assert not parameter.any(), name
        elif name.endswith(("attention_scale", "expert_scale")):
            assert (parameter == torch.tensor(TINY.layer_scale)).all()
        elif name.endswith("log_scale"):
            assert parameter.item() == pytest.approx(2.6593, abs=1e-4)
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.5), name
    assert torch.equal(big.modality.weight[2], big.modality.weight[1])
    init_weights(small, seed=6)
    assert not torch.equal(small.layers[0].attention.qkv.weight, big.layers[0].attention.qkv.weight)


def test_any_multiple_of_the_patch_is_an_image_size():
    for size in (4, 12, 28):
        model = VLMo(dataclasses.replace(TINY, image_size=size))
        assert model.encode(image=torch.zeros(1, 3, size, size)).image.shape == (1, 1 + (size // 4) ** 2, 24)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"image_size": 10}, "multiple of model.patch_size"),
        ({"num_heads": 5}, "num_heads=5"),
        ({"vl_start": 4}, "vl_start"),
        ({"heads": ("itc", "itcc")}, "itcc"),
        ({"max_text_len": 10}, "bias_text_len"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"position": "rotary"}, "rotary"),
    ],
)
def test_impossible_configurations_are_refused(change, word):
    with pytest.raises(UserError, match=word):
        VLMo(dataclasses.replace(TINY, **change))
