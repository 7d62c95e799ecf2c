"""The `vlmo` commands in README.md and docs/ run, page by page, on small data in the place of what they name.

An address on S3 is one in the test's bucket. What a command reads and no command before it wrote, data sets, official
files and runs, is made up here. Training is that of the recipe and its settings, with two steps of a small model in
this process; the commands that take GPUs say so. Sweeps are left to `launch/test_tune.py`.
"""

import dataclasses
import json
import os
import pickle
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from official_reference import random_state_dict
from sources import put, tar_of
from test_docs import VLMO, recorded

from vlmo_ray import cli
from vlmo_ray.config import Config, OptimConfig, Phase
from vlmo_ray.data.mix import load_data
from vlmo_ray.data.prepare import prepare
from vlmo_ray.data.store import Store
from vlmo_ray.demo.scenes.records import captioned, segmented
from vlmo_ray.overrides import override
from vlmo_ray.recipes import RECIPES, recipe
from vlmo_ray.runs.load import load_all
from vlmo_ray.train.build import RunSpec
from vlmo_ray.train.loop import train

SCENES = list(captioned(1, 25, image_size=32))
IMAGES = [row["image"] for row in SCENES]
TEXTS = [row["captions"][0] for row in SCENES]
# the format that makes data of a task, and its options
FORMATS = {"vqa": "vqa", "nlvr2": "nlvr2", "entailment": "snli_ve", "segmentation": "ade20k", "grounding": "refcoco",
           "captioning": "karpathy", "classification": "folders", "zero_shot": "folders", "vision": "folders",
           "language": "text"}  # fmt: skip
OPTIONS = {"ade20k": {"classes": "8"}, "captioning": {"captions": "together"}, "vision": {"labels": "no"}}
LABELS = ("contradiction", "neutral", "entailment")


def small(config: Config, data: str) -> Config:
    """Two steps of a small model of a recipe."""
    schema = load_data(data, config.data.weights).manifests[0].schema
    answers = len(schema.field("answers").values) if "answers" in schema else config.model.num_answers
    model = dataclasses.replace(
        config.model, width=24, num_heads=2, image_size=32, patch_size=16, max_text_len=16, bias_text_len=16,
        num_answers=answers,
    )  # fmt: skip
    task = config.task
    if config.task.kind == "segmentation":
        task = dataclasses.replace(task, channels=8, auxiliary_channels=8)
    return dataclasses.replace(
        config, model=model, task=task, phases=(Phase(2, 4),), slice_size=2, micro_batch=4, checkpoint_every=2,
        evaluate_every=0, log_every=1, start_text_experts="", start_vl_experts="",
        data=dataclasses.replace(config.data, shuffle_steps=1), optim=OptimConfig(peak_lr=1e-3, warmup_steps=1),
    )  # fmt: skip


class World:
    """What the commands of a page find."""

    def __init__(self, bucket: str):
        self.bucket = bucket

    def here(self, word: str) -> str:
        return word.replace("s3://", f"{self.bucket}/")

    def exists(self, uri: str) -> bool:
        if not uri.startswith("s3://"):
            return Path(uri).exists()
        folder, _, name = uri.rstrip("/").rpartition("/")
        return Store(folder).exists(name) or bool(Store(uri).list())

    def fit(self, config: Config, data: str, storage: str, name: str | None, **_) -> Store:
        """In the place of `vlmo_ray.launch.fit.fit`."""
        run = f"{storage}/{name or config.name}"
        config = small(config, data)
        assert train(RunSpec(config, data, run, load_data(data, ()).fingerprint, in_process_data=True)).step == 2
        return Store(run)

    def scores(self, word: str) -> str:
        """The address of an evaluation, with the name that it has here."""
        folder, _, name = word.rpartition("/")
        if not re.fullmatch(r"\d{8}-\w{8}-\w+\.parquet", name):
            return word
        [found] = [name for name in Store(folder).list() if name.endswith(".parquet")]
        return f"{folder}/{found}"

    def run(self, uri: str) -> None:
        """A run of the recipe that it is called by."""
        if self.exists(uri):
            return
        storage, _, name = uri.rpartition("/")
        config = recipe(name if name in RECIPES else "tiny")
        data = f"{self.bucket}/made-{config.task.kind}"
        self.data(data, config.task.kind)
        self.fit(dataclasses.replace(config, init=""), data, storage, name)

    def data(self, uri: str, kind: str) -> None:
        """A data set of a task."""
        if self.exists(uri):
            return
        format = FORMATS.get(kind, "karpathy")
        source = f"made/{kind}/{'dataset_made.json' if format == 'karpathy' else 'train.json'}"
        source = source if format in ("karpathy", "nlvr2", "snli_ve") else f"made/{kind}"
        options = OPTIONS.get(kind, OPTIONS.get(format, {}))
        self.source(format, source, options)
        prepare(format, source, uri, rows_per_group=4, **options)

    def source(self, format: str, uri: str, options: dict[str, str]) -> None:
        """Files of a format, with what its options name."""
        if not self.exists(uri):
            getattr(self, format)(uri, options)

    def karpathy(self, uri: str, options: dict[str, str]) -> None:
        splits = ("train", "train", "restval", "val", "test")
        entries = [
            {"filename": f"{i}.jpg", "filepath": "val2014", "split": splits[i % 5], "imgid": i,
             "sentences": [{"sentid": 5 * i + k, "raw": text} for k, text in enumerate(row["captions"])]}
            for i, row in enumerate(SCENES)
        ]  # fmt: skip
        put(os.path.dirname(uri) or ".", {os.path.basename(uri): json.dumps({"images": entries}).encode()})
        images = options.get("images", os.path.join(os.path.dirname(uri), "images"))
        put(images, {f"{i}.jpg": image for i, image in enumerate(IMAGES)})

    def webdataset(self, uri: str, options: dict[str, str]) -> None:
        rows = enumerate(zip(IMAGES, TEXTS, strict=True))
        members = [(f"{i}.{end}", data) for i, (image, text) in rows
                   for end, data in (("jpg", image), ("txt", text.encode()))]  # fmt: skip
        put(uri, {f"{i:05d}.tar": tar_of(members[8 * i : 8 * i + 8]) for i in range(6)})

    def parquet(self, uri: str, options: dict[str, str]) -> None:
        images = [{"bytes": image, "path": None} for image in IMAGES]
        file = pa.BufferOutputStream()
        pq.write_table(pa.table({"image": images, options.get("text_column", "text"): TEXTS}), file)
        put(uri, {"train.parquet": file.getvalue().to_pybytes()})

    def table(self, uri: str, options: dict[str, str]) -> None:
        end = "\t" if uri.endswith(".tsv") else ","
        rows = [f'{i}.jpg{end}"{text}"' for i, text in enumerate(TEXTS)]
        Path(uri).write_text("\n".join([f"file{end}caption", *rows]))
        put(options["images"], {f"{i}.jpg": image for i, image in enumerate(IMAGES)})

    def folders(self, uri: str, options: dict[str, str]) -> None:
        put(uri, {f"{'cat' if i % 2 else 'dog'}/{i}.jpg": image for i, image in enumerate(IMAGES)})

    def text(self, uri: str, options: dict[str, str]) -> None:
        put(uri, {"a.txt": "\n".join(TEXTS * 20).encode()})

    def vqa(self, uri: str, options: dict[str, str]) -> None:
        for split in ("train2014", "val2014", "test2015"):
            asked = [{"question_id": i, "image_id": i, "question": "what is it?"} for i in range(len(IMAGES))]
            given = [{"answer": "red", "answer_confidence": "yes", "answer_id": k + 1} for k in range(10)]
            told = [
                {"question_id": i, "image_id": i, "multiple_choice_answer": "red", "answers": given,
                 "answer_type": "other", "question_type": "what"} for i in range(len(IMAGES))
            ]  # fmt: skip
            files = {f"v2_OpenEnded_mscoco_{split}_questions.json": {"questions": asked}}
            if split != "test2015":
                files[f"v2_mscoco_{split}_annotations.json"] = {"annotations": told}
            put(uri, {name: json.dumps(file).encode() for name, file in files.items()})
            put(f"{uri}/{split}", {f"COCO_{split}_{i:012d}.jpg": image for i, image in enumerate(IMAGES)})

    def nlvr2(self, uri: str, options: dict[str, str]) -> None:
        split = Path(uri).stem
        told = [{"identifier": f"{split}-{i}-0-0", "sentence": text, "label": str(i % 2 == 0), "directory": i}
                for i, text in enumerate(TEXTS)]  # fmt: skip
        put(os.path.dirname(uri), {os.path.basename(uri): "\n".join(map(json.dumps, told)).encode()})
        images = options.get("images", os.path.join(os.path.dirname(uri), "images"))
        for k in (0, 1):
            put(images, {f"{split}/{i}/{split}-{i}-0-img{k}.png": image for i, image in enumerate(IMAGES)})

    def snli_ve(self, uri: str, options: dict[str, str]) -> None:
        told = [{"Flickr30K_ID": str(i), "pairID": f"p{i}", "sentence1": "", "sentence2": text,
                 "gold_label": LABELS[i % 3]} for i, text in enumerate(TEXTS)]  # fmt: skip
        put(os.path.dirname(uri) or ".", {os.path.basename(uri): "\n".join(map(json.dumps, told)).encode()})
        images = options.get("images", os.path.join(os.path.dirname(uri), "flickr30k-images"))
        put(images, {f"{i}.jpg": image for i, image in enumerate(IMAGES)})

    def ade20k(self, uri: str, options: dict[str, str]) -> None:
        for split in ("training", "validation") if options.get("split", "training") else ("",):
            for i, row in enumerate(segmented(1, len(IMAGES), image_size=32)):
                put(uri, {os.path.join("images", split, f"{i}.jpg"): row["image"],
                          os.path.join("annotations", split, f"{i}.png"): row["mask"]})  # fmt: skip
        if os.path.dirname(options["classes"]):
            comma, header = options["classes"].endswith(".csv"), ["Idx", "Ratio", "Train", "Val", "Stuff", "Name"]
            rows = [header, *([str(i), "0.1", "1", "1", "0", f"class {i}"] for i in range(1, 9))]
            Path(options["classes"]).write_text("\n".join(("," if comma else "\t").join(row) for row in rows))

    def refcoco(self, uri: str, options: dict[str, str]) -> None:
        splits = ("train", "train", "val", "testA")
        refs = [{"ref_id": i, "ann_id": i, "image_id": i, "split": splits[i % 4],
                 "sentences": [{"sent_id": i, "sent": text}]} for i, text in enumerate(TEXTS)]  # fmt: skip
        instances = {"images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(len(IMAGES))],
                     "annotations": [{"id": i, "bbox": [2, 2, 9, 9]} for i in range(len(IMAGES))]}  # fmt: skip
        put(uri, {"refs(unc).p": pickle.dumps(refs, protocol=2), "instances.json": json.dumps(instances).encode()})
        images = options.get("images") or os.path.join(os.path.dirname(uri), "train2014")
        put(images, {f"{i}.jpg": image for i, image in enumerate(IMAGES)})

    def needs(self, command: str, given: dict) -> None:
        """Makes what a command reads."""
        if command == "prepare":
            options = dict(text.split("=", 1) for text in given["option"])
            if not given["scores"]:
                self.source(given["format"], given["source"], options)
            if "answers" in options and not self.exists(options["answers"]):
                Path(options["answers"]).write_text(json.dumps(["red"]))
            if "dets" in options:
                Path(options["dets"]).write_text(json.dumps({str(i): [[0, 0, 9, 9]] for i in range(len(IMAGES))}))
        if command == "train":
            config = override(recipe(given["recipe"]), list(given["settings"]))
            for uri in given["data"].split(","):
                self.data(uri, config.task.kind)
            if given["eval_data"]:
                self.data(given["eval_data"], config.task.kind)
            if config.init:
                self.run(config.init)
        if command == "evaluate":
            self.run(given["model"])
            trained = load_all(given["model"]).config
            self.data(given["data"], given["task"] or (trained.task.kind if trained else "retrieval"))
            for text in given["option"]:
                if text.startswith("names="):
                    put(os.path.dirname(text[6:]), {os.path.basename(text[6:]): b"a cat\na dog\n"})
        if command in ("embed", "export"):
            self.run(given["model"] if command == "embed" else given["run"])
        if command in ("embed", "doctor", "report") and given["data"]:
            self.data(given["data"], "pairs")
        if command == "report":
            for run in given["runs"]:
                self.run(run)
        if command in ("runs", "doctor") and given["storage"]:
            self.run(f"{given['storage']}/tiny")
        if command == "search":
            if not self.exists(given["index"]):
                raise AssertionError(f"no command before made {given['index']}")
            if given["query"].endswith(".jpg"):
                Path(given["query"]).write_bytes(IMAGES[0])
        if command == "import_":
            torch.save(random_state_dict(position="relative", vocab=30_522, text_len=16, width=64), given["official"])


PAGES = sorted({page for page, _ in VLMO})


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page, ray_cluster, bucket, vlmo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    world = World(bucket)
    monkeypatch.setattr("vlmo_ray.launch.fit.fit", world.fit)
    served = []
    monkeypatch.setattr(cli, "_serve", lambda *given: served.append(given))
    commands = [words for other, words in VLMO if other == page]
    for words in commands:
        words = [world.here(word) for word in words]
        if words[0] == "tune" or "--from-sweep" in words:
            continue
        with monkeypatch.context() as patch:
            called = recorded(patch)
            vlmo(*words)
        [(command, given)] = called
        world.needs(command, given)
        words = [world.scores(word) for word in words]
        done = vlmo(*words)
        fine = (0, 1) if command == "doctor" else (0,)  # 1: this machine lacks something
        assert done.returncode in fine, f"{' '.join(words)}: {done.stderr}{done.stdout}"
    assert len(served) == sum("--serve" in words for words in commands)
