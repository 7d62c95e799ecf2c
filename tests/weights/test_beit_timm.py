"""BEiT as the start: the features of the image path are timm's own, and every key is accounted for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.models.beit import Beit
from translated import from_official

from vlmo_ray.model.vlmo import VLMo, init_weights
from vlmo_ray.weights.folder import import_official, load_model

BASE = {
    "img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 2, "init_values": 0.1,
    "use_rel_pos_bias": True, "use_abs_pos_emb": False, "num_classes": 5,
}  # fmt: skip
KINDS = {
    "a table a layer": {},  # beit_base_patch16_224 and beitv2_base_patch16_224 in timm, fine-tuned files
    "one table": {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},  # pre-trained files
    "a norm at the end": {"global_pool": "token"},
    "without LayerScale": {"init_values": None},
    "absolute": {"use_rel_pos_bias": False, "use_abs_pos_emb": True},
}
# what a pre-trained file has beside the encoder
MORE = {"mask_token": torch.zeros(1, 1, 48), "lm_head.weight": torch.zeros(7, 48), "lm_head.bias": torch.zeros(7)}


def beit(kind: str) -> Beit:
    torch.manual_seed(0)
    model = Beit(**(BASE | KINDS[kind])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_timm(kind):
    given, image = beit(kind), torch.randn(2, 3, 32, 32)
    told = {"num_heads": 2} if kind == "absolute" else {}
    config, state, report = from_official(given.state_dict() | MORE, max_text_len=6, **told)
    assert (config.position, config.num_heads, config.depth) == ("absolute" if told else "relative", 2, 3)
    model = VLMo(config)
    init_weights(model, 1)
    model.load_state_dict(state, strict=False)
    with torch.no_grad():
        model.modality.weight.zero_()  # BEiT has none
        wanted = given.forward_features(image)
        if "norm.weight" not in given.state_dict():  # timm averages first, and has its norm after that
            wanted = F.layer_norm(wanted, (48,), eps=1e-6)
        torch.testing.assert_close(model.encode(image=image).image, wanted, rtol=1e-4, atol=1e-4)
    own = {name for name in given.state_dict() if name.startswith(("fc_norm", "head"))}
    assert set(report.dropped) == own | set(MORE)
    assert not any(".image." in name or "attention" in name for name in report.missing)


def test_the_vision_stage_can_be_left_out(tmp_path):
    """An imported BEiT is what the language stage begins from."""
    torch.save({"model": beit("a table a layer").state_dict()}, tmp_path / "beit.pth")
    import_official(tmp_path / "beit.pth", tmp_path / "folder")
    found = load_model(tmp_path / "folder", allow_missing=True)
    wanted = beit("a table a layer").state_dict()["blocks.1.mlp.fc1.weight"]
    assert torch.equal(found.state_dict()["layers.1.experts.image.fc1.weight"], wanted)
