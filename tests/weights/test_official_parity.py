"""The model against outputs of the official program, on every file of `VLMO_GOLDEN_DIR`.

Each file holds a small random model under released keys, inputs, and what the official program computed from
them. What is compared is decided by the file's metadata and keys alone; an output that this test does not
know fails it. Tolerance 1e-4, or 2e-3 behind a resampled relative bias table.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from translated import from_official

from vlmo_ray.data.batch import Batch
from vlmo_ray.model.vlmo import VLMo
from vlmo_ray.tasks.nlvr2 import logits_of as nlvr2_logits
from vlmo_ray.tasks.task import pooled as task_pooled

FOLDER = Path(os.environ.get("VLMO_GOLDEN_DIR") or Path(__file__).parents[3] / "shared" / "golden")
FILES = sorted(FOLDER.glob("*.safetensors")) if FOLDER.is_dir() else []


def read(path: Path) -> tuple[dict, dict[str, dict[str, torch.Tensor]]]:
    """(metadata config, tensors by group `state_dict`, `inputs`, `outputs`)."""
    groups: dict[str, dict[str, torch.Tensor]] = {"state_dict": {}, "inputs": {}, "outputs": {}}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        for key in file.keys():  # noqa: SIM118 - the file is no mapping
            group, name = key.split("/", 1)
            groups[group][name] = file.get_tensor(key)
    config = json.loads(metadata["config"])
    if "target_image_size" in metadata:
        config.setdefault("target_image_size", int(metadata["target_image_size"]))
    return config, groups


def outputs_of(model: VLMo, config: dict, carried: dict, inputs: dict) -> dict:
    """Every output that the model's heads and the inputs allow, by the names of the golden files.

    The values are functions, so that only what a file holds is computed.
    """
    text, mask = inputs["text_ids"], inputs["text_masks"].bool()
    first = inputs.get("image", inputs.get("image_0"))
    second = inputs.get("image_1", first)
    bias = model.position_bias(text.shape[1])

    @functools.cache
    def image_only():
        return model.encode(image=first, bias=bias, vl_branch=True)

    @functools.cache
    def text_only():
        return model.encode(text=text, text_mask=mask, bias=bias, vl_branch=True)

    @functools.cache
    def pair():
        return model.encode(image=first, text=text, text_mask=mask, bias=bias)

    def pooled(encoding):
        cls = encoding.text[:, 0]
        if model.pooler is not None:
            return model.pooler(cls)
        return torch.tanh(F.linear(cls, carried["pooler.dense.weight"], carried["pooler.dense.bias"]))

    def contrast(head, image, text):
        logits = head.log_scale.exp() * head.image(image[:, 0]) @ head.text(text[:, 0]).T
        target = torch.arange(len(logits))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    def itc_loss():
        main = contrast(model.itc, image_only().image, text_only().text)
        return (main + contrast(model.itc_vl, image_only().image_vl, text_only().text_vl)) / 2

    def masked_states():
        image = None if "textmlm" in config["losses"] else first
        return model.encode(image=image, text=inputs["text_ids_mlm"], text_mask=mask, bias=bias).text

    def mlm_loss():
        labels = inputs["text_labels_mlm"]
        return F.cross_entropy(model.mlm(masked_states()[labels != -100]), labels[labels != -100])

    def batch():
        """As the tasks get it: pixels from 0 to 255."""
        rows = len(text)
        columns = {"image": (first + 1) * 127.5, "image_2": (second + 1) * 127.5, "text_ids": text, "text_mask": mask}
        names = [str(i) for i in range(rows)]
        return Batch(columns, torch.ones(rows, dtype=torch.bool), torch.arange(rows), names, [""] * rows)

    return {
        "image_embed": lambda: model.itc.image(image_only().image[:, 0]),
        "text_embed": lambda: model.itc.text(text_only().text[:, 0]),
        "image_embed_vl": lambda: model.itc_vl.image(image_only().image_vl[:, 0]),
        "text_embed_vl": lambda: model.itc_vl.text(text_only().text_vl[:, 0]),
        "image_tokens": lambda: image_only().image,
        "text_tokens": lambda: text_only().text,
        "fusion_text_tokens": lambda: pair().text,
        "fusion_image_tokens": lambda: pair().image,
        "fusion_cls": lambda: pooled(pair()),
        "itc_loss": itc_loss,
        "itm_logits": lambda: model.itm(pooled(pair())),
        "mlm_logits": lambda: model.mlm(masked_states()),
        "mlm_loss": mlm_loss,
        "vqa_logits": lambda: model.vqa(task_pooled(model, batch())),
        "nlvr2_logits": lambda: nlvr2_logits(model, batch()),
        "relative_position_bias_table": lambda: model.relative.table,
    }


@pytest.mark.skipif(not FILES, reason=f"no golden files in {FOLDER}")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@torch.no_grad()
def test_matches_the_official_program(path: Path):
    golden, groups = read(path)
    target_size = golden.get("target_image_size")
    config, state, report = from_official(
        groups["state_dict"],
        image_size=target_size,
        max_text_len=golden["max_text_len"],
        num_heads=golden["num_heads"],
        bias_text_len=golden["max_text_len_of_initckpt"],
    )
    assert not report.missing and not report.dropped
    assert config.width == golden["embed_dim"]
    for name in ("depth", "num_heads", "position", "patch_size", "vocab_size", "max_text_len"):
        assert getattr(config, name) == golden[name], name
    assert config.image_size == (target_size or golden["image_size"])
    assert (config.layer_scale is None) == (golden["layer_scale"] is None)
    if "textmlm" not in golden["losses"]:  # text-only pre-training has no vision-language experts
        assert config.vl_start == golden["vl_start"]

    model = VLMo(config)
    model.load_state_dict(state)
    computed = outputs_of(model, golden, report.carried, groups["inputs"])
    tolerance = 2e-3 if target_size and config.position == "relative" else 1e-4
    unknown = groups["outputs"].keys() - computed.keys()
    assert not unknown, f"the file has outputs that this test does not compute: {unknown}"
    real = groups["inputs"]["text_masks"].bool()
    for name, expected in groups["outputs"].items():
        actual = computed[name]()
        if name in ("text_tokens", "fusion_text_tokens", "mlm_logits"):
            actual, expected = actual[real], expected[real]
        torch.testing.assert_close(
            actual, expected, atol=tolerance, rtol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
