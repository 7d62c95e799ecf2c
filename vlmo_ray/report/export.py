"""A trained model for other programs: a folder for huggingface_hub with a card made from its run, or timm's BEiT."""

from __future__ import annotations

import json
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from tokenizers.processors import TemplateProcessing

from vlmo_ray.data.store import Store, open_store
from vlmo_ray.data.text import CLS_ID, SEP_ID, Tokenizer, vocabulary
from vlmo_ray.model.vlmo import VLMo
from vlmo_ray.report.facts import Facts, read_facts
from vlmo_ray.report.page import verdict
from vlmo_ray.runs.evaluations import cell
from vlmo_ray.runs.load import described, load
from vlmo_ray.runs.scratch import scratch
from vlmo_ray.weights.timm import export_timm as write_timm


def export_hub(path: str, out: str) -> list[str]:
    """Writes the model at `path` (a run, a checkpoint, a folder) as a folder with configuration, weights, tokenizer and
    card; returns the names of the files. A run also gives the card its data, figures and audit."""
    model = load(path)
    facts = _facts(path)
    with scratch() as folder:
        (folder / "README.md").write_text(card(model, facts, Path(out).name))
        model.save_pretrained(folder)
        save_tokenizer(model.config.max_text_len, folder)
        return _upload(folder, out)


def _facts(path: str) -> Facts | None:
    """Of the run that the weights at `path` are of; None if they came without one."""
    parent, _, name = path.rstrip("/").rpartition("/")
    for place in [path, *[parent] * (name == "model" or name.startswith("checkpoint-"))]:
        if place and (place.startswith("s3://") or Path(place).is_dir()) and described(Store(place)):
            return read_facts(place)
    return None


def export_timm(path: str, out: str) -> list[str]:
    """Writes the image path of the model at `path` as a folder for `timm.create_model("local-dir:OUT")`."""
    with scratch() as folder:
        write_timm(load(path), folder)
        return _upload(folder, out)


def _upload(folder: Path, out: str) -> list[str]:
    target: Store = open_store(out, create=True)
    files = sorted(folder.iterdir(), key=lambda file: file.name == "model.json")  # without it there is no model
    for file in files:
        target.upload(file, file.name)
    return [file.name for file in files]


def save_tokenizer(max_text_len: int, folder: Path) -> None:
    """`tokenizer.json` for `tokenizers.Tokenizer.from_file`, `vocab.txt`, and what transformers reads beside them."""
    words = Tokenizer(max_text_len).words_alone()
    special = [("[CLS]", CLS_ID), ("[SEP]", SEP_ID)]
    words.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    words.enable_truncation(max_text_len)
    words.save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").write_text("\n".join(vocabulary()) + "\n")
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_text_len, "do_lower_case": True,
            "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]",
            "mask_token": "[MASK]"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(told, indent=1) + "\n")


def card(model: VLMo, facts: Facts | None, name: str) -> str:
    """The model card, in Markdown."""
    environment = Environment(
        loader=PackageLoader("vlmo_ray.report", ""), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["cell"] = cell
    return environment.get_template("card.md").render(
        name=name,
        config=model.config,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        facts=facts,
        verdict=verdict(facts) if facts and facts.config.audit else "",
    )
