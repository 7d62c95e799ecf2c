"""Evaluation on Ray and inside a run: the oracle is the model called directly, row by row, on one process."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import write_unchecked
from small_run import SMALL

from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.demo.scenes.records import declared, retrieval_records
from vlmo_ray.evaluate import evaluate
from vlmo_ray.model.vlmo import VLMo, init_weights
from vlmo_ray.tasks.metrics import recall_at_k

pytestmark = [pytest.mark.ray, pytest.mark.slow]


class Asked(Exception):
    """What the actors asked of the cluster."""


@pytest.mark.parametrize(
    ("cluster", "device", "cpus", "gpus", "actors"),
    [
        ({"CPU": 8.0}, "auto", 1.0, 0, 4),
        ({"CPU": 1.0}, "auto", 0.5, 0, 1),
        ({"CPU": 8.0, "GPU": 3.0}, "auto", 0, 1, 3),
        ({"CPU": 8.0, "GPU": 3.0}, "cpu", 1.0, 0, 4),
        ({}, "auto", 1.0, 0, 1),  # nodes are added on demand: not by an actor that asks for nothing
        ({}, "gpu", 0, 1, 1),
    ],
)
def test_actors_ask_for_what_the_cluster_has_or_can_add(
    cluster, device, cpus, gpus, actors, ray_cluster, tmp_path, monkeypatch
):
    import ray

    class Rows:
        def map_batches(self, *_, compute, num_cpus, num_gpus, **__):
            raise Asked(num_cpus, num_gpus, compute.min_size)

    data = str(tmp_path / "data")
    write_dataset(data, declared(retrieval_records(3, 5, image_size=16)))
    monkeypatch.setattr(ray, "cluster_resources", lambda: cluster)
    monkeypatch.setattr("vlmo_ray.evaluate.eval_dataset", lambda *_: Rows())
    with pytest.raises(Asked) as found:
        evaluate(VLMo(dataclasses.replace(SMALL.model, vocab_size=30522)), data, device=device)
    assert found.value.args == (cpus, gpus, actors)


def test_retrieval_does_not_depend_on_the_number_of_workers(ray_cluster, tmp_path):
    data = str(tmp_path / "unseen")
    rows = list(retrieval_records(3, 50, image_size=16))
    extra = [rows[0] | {"id": "second caption", "text": "something else"}, rows[1] | {"id": "bad", "text": " "}]
    write_unchecked(data, list(declared(rows + extra)), rows_per_group=8)
    model = VLMo(dataclasses.replace(SMALL.model, vocab_size=30522, max_text_len=20, bias_text_len=20))
    init_weights(model, 0)
    held_out = [row["image_id"] for row in rows if row["held_out"]]
    results = [evaluate(model, data, num_workers=n, subset=held_out) for n in (1, 2)]
    assert results[0] == results[1]
    result = results[0]
    assert result.task == f"retrieval subset={held_out!r}"  # not what the weights were trained for
    counts = {name: score.count for name, score in result.scores.items()}
    assert counts["text_retrieval_r@1"] == 50 and counts["image_retrieval_r@1"] == 51 and result.num_rows == 51
    assert counts["subset_text_retrieval_r@5"] == len(set(held_out)) > 0
    [problem] = result.problems
    assert "#6:3" in problem  # the last row of the last of 7 chunks, by its address

    from vlmo_ray.config import DataConfig
    from vlmo_ray.data.decode import decode_eval
    from vlmo_ray.data.text import Tokenizer

    names = sorted({row["image_id"] for row in rows})
    first = {row["image_id"]: row["image"] for row in rows}
    texts = [(row["text"], names.index(row["image_id"])) for row in rows + extra[:1]]
    tokens = [Tokenizer(20).encode(text)[:2] for text, _ in texts]
    with torch.inference_mode():
        pixels = torch.from_numpy(np.stack([decode_eval(first[name], 16, DataConfig()) for name in names])) / 127.5 - 1
        ids, mask = (torch.from_numpy(np.stack(column)) for column in zip(*tokens, strict=True))
        image = model.itc.image(model.encode(image=pixels).image[:, 0]).numpy()
        text = model.itc.text(model.encode(text=ids.long(), text_mask=mask).text[:, 0]).numpy()
    wanted = recall_at_k(image, text, np.array([i for _, i in texts]))
    assert {name: result[name] for name in wanted} == wanted
