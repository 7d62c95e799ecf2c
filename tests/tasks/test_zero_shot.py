"""Zero-shot classification against one image and one sentence after the other."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import make_image
from small_run import SMALL

from vlmo_ray.data.batch import Batch
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.reader import Reader, Sources, whole_chunk
from vlmo_ray.data.schema import PAIRS, Field, Schema
from vlmo_ray.data.text import Tokenizer
from vlmo_ray.errors import UserError
from vlmo_ray.model.vlmo import VLMo, init_weights
from vlmo_ray.runs.load import Loaded
from vlmo_ray.tasks import build_evaluation

CLASSES = ("a_b", "c", "d", "e", "f", "g")
SCHEMA = Schema((Field("image", "image"), Field("label", "label", CLASSES)))
TEMPLATES = ["{} .", "x {} ?", "{}"]


@pytest.fixture(scope="module")
def model():
    found = VLMo(dataclasses.replace(SMALL.model, vocab_size=30522))
    init_weights(found, 3)
    return found.eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("classes"))
    rows = ({"id": str(i), "image_id": str(i), "image": make_image(i), "label": i % 6} for i in range(20))
    return uri, write_dataset(uri, rows, rows_per_group=6, schema=SCHEMA)


def slow_ranks(model, image: torch.Tensor, label: torch.Tensor, names) -> list[int]:
    tokenizer, classes = Tokenizer(SMALL.model.max_text_len), []
    for name in names:
        vectors = []
        for template in TEMPLATES:
            ids, mask, _ = tokenizer.encode(template.format(name))
            ids, mask = torch.tensor(ids).long()[None], torch.tensor(mask)[None]
            vector = model.itc.text(model.encode(text=ids, text_mask=mask).text[:, 0])[0]
            vectors.append(vector / vector.norm())
        mean = sum(vectors) / len(vectors)
        classes.append(mean / mean.norm())
    ranks = []
    for one, right in zip(image, label.tolist(), strict=True):
        vector = model.itc.image(model.encode(image=one[None] / 127.5 - 1).image[:, 0])[0]
        cosines = [float(vector @ text) for text in classes]
        ranks.append(sum(cosines[i] >= cosines[right] for i in range(len(names)) if i != right))
    return ranks


@torch.no_grad()
@pytest.mark.parametrize("names", [(), ["one", "two", "three", "four", "five", "six"], "file"])
def test_an_ensemble_of_prompts_equals_one_after_the_other(model, data, tmp_path, names):
    called = [name.replace("_", " ") for name in CLASSES]
    if names:
        called = ["one", "two", "three", "four", "five", "six"]
    if names == "file":
        (tmp_path / "names.txt").write_text("\n".join(called) + "\n")
        names = str(tmp_path / "names.txt")
    evaluation = build_evaluation("zero_shot", model, SCHEMA, templates=TEMPLATES, names=names)
    sources = Sources((data[1],))
    reader, blocks, ranks = Reader(sources.places, evaluation.encoder()), [], []
    for index in range(sources.num_chunks):
        batch = Batch.from_numpy(reader(whole_chunk(sources, index)))
        blocks.append({name: tensor.numpy() for name, tensor in evaluation.rows(batch).items()})
        ranks += slow_ranks(model, batch.image, batch.label, called)
    assert np.concatenate([block["rank"] for block in blocks]).tolist() == ranks
    scores = evaluation.score(blocks)
    assert scores["top1"].value == np.mean(np.array(ranks) < 1) and scores["top1"].chance == 1 / 6
    assert scores["top5"].value == np.mean(np.array(ranks) < 5) and scores["top5"].count == 20


@pytest.mark.ray
@pytest.mark.slow
def test_the_command(ray_cluster, vlmo, model, data, monkeypatch):
    monkeypatch.setattr("vlmo_ray.runs.load.load_all", lambda path: Loaded(model))
    done = vlmo("evaluate", "made-up", "--data", data[0], "--task", "zero_shot", "--json-output",
                "--option", f"templates={json.dumps(TEMPLATES)}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout.splitlines()[-1])["scores"]
    assert scores["top1"]["count"] == 20


@pytest.mark.parametrize(
    "schema, options, words",
    [
        (PAIRS, {}, "needs a 'label' column"),
        (SCHEMA, {"templates": ["a photo"]}, r"templates=\['a photo'\]: write texts with one \{\}"),
        (SCHEMA, {"templates": []}, "write texts with one"),
        (SCHEMA, {"names": ["a", "b"]}, "has 2 names for the 6 classes"),
        (SCHEMA, {"names": [1, 2, 3, 4, 5, 6]}, "is not a list of texts"),
        (SCHEMA, {"names": 5}, "names=5 is not a list of texts"),
        (SCHEMA, {"templates": [5]}, "is not a list of texts"),
        (SCHEMA, {"name": ["a"]}, "'name' is not an option of zero_shot; it has templates, names"),
    ],
)
def test_mistakes_are_sentences(model, schema, options, words):
    with pytest.raises(UserError, match=words):
        build_evaluation("zero_shot", model, schema, **options)
