"""VQA, NLVR2 and entailment: tasks on fused pairs.

The oracles are a plain step with autograd, one process where there are several, and scores counted row by row.
"""

import dataclasses
import functools
import json

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from conftest import make_image
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import SMALL, job, train_on

from vlmo_ray.config import Config, OptimConfig, Phase
from vlmo_ray.data.answers import AnswerList
from vlmo_ray.data.batch import Batch
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.schema import Field, Schema
from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError
from vlmo_ray.evaluate import evaluate
from vlmo_ray.model.vlmo import VLMo, init_weights
from vlmo_ray.objectives.gather import Workers
from vlmo_ray.overrides import override
from vlmo_ray.recipes import recipe
from vlmo_ray.recipes.entailment import EntailmentConfig
from vlmo_ray.recipes.nlvr2 import Nlvr2Config
from vlmo_ray.recipes.vqa import VqaConfig
from vlmo_ray.runs.evaluations import Result, read_evaluations, submission
from vlmo_ray.runs.load import Loaded, import_official, load_all
from vlmo_ray.runs.metrics import read_metrics
from vlmo_ray.tasks import build_task
from vlmo_ray.tasks.entailment import Entailment
from vlmo_ray.tasks.nlvr2 import Nlvr2, Nlvr2Accuracy
from vlmo_ray.tasks.vqa import Vqa, VqaAccuracy
from vlmo_ray.train.loop import train
from vlmo_ray.train.parallel import parallelize
from vlmo_ray.train.step import gradients
from vlmo_ray.weights.folder import export_official, save_model

ANSWERS = ("red", "blue", "2", "yes", "no")
TYPES = ("number", "other", "yes/no")
CLASSES = ("contradiction", "neutral", "entailment")
IMAGE, TEXT = Field("image", "image"), Field("text", "text")
SCHEMAS = {
    "vqa": Schema((IMAGE, TEXT, Field("answers", "answers", ANSWERS), Field("given_answers", "captions"),
                   Field("answer_type", "label", TYPES))),
    "nlvr2": Schema((IMAGE, Field("image_2", "image"), TEXT, Field("label", "label", ("False", "True")),
                     Field("sentence", "text"))),
    "entailment": Schema((IMAGE, TEXT, Field("label", "label", CLASSES))),
}  # fmt: skip
TASKS = {
    "vqa": (VqaConfig(), "vqa"),
    "nlvr2": (Nlvr2Config(head_lr_scale=3.0), "nlvr2"),
    "entailment": (EntailmentConfig(), "itm"),
}


def config_of(kind: str) -> Config:
    task, head = TASKS[kind]
    model = dataclasses.replace(
        SMALL.model, heads=("itc", head), num_answers=len(ANSWERS), vocab_size=30522, layer_scale=None
    )
    return dataclasses.replace(
        SMALL, name=kind, model=model, task=task, phases=(Phase(6, 8),), evaluate_every=6, precision="float64",
        optim=OptimConfig(peak_lr=3e-3, warmup_steps=1),
    )  # fmt: skip


def record(kind: str, i: int) -> dict:
    row = {
        "id": f"dev-{i // 4}-{i % 2}-{i // 2 % 2}",
        "image_id": f"{i}",
        "image": make_image(i),
        "text": f"is it {i % 5} ?",
    }
    if kind == "vqa":
        given = [ANSWERS[(i + k) % 5 if k < i % 4 else i % 5] for k in range(9)] + ["a horse"]
        counts = {answer: given.count(answer) for answer in ANSWERS if answer in given}
        scored = [{"answer": answer, "score": min(1.0, 0.3 * n)} for answer, n in counts.items()]
        # one question in seven has no answer of the list
        own = {"answers": scored, "given_answers": given} if i % 7 else {"answers": [], "given_answers": ["dog"] * 10}
        return row | own | {"answer_type": i % 3}
    if kind == "nlvr2":
        return row | {"image_2": make_image(i + 100), "label": i % 3 % 2, "sentence": f"{i // 2}"}
    return row | {"label": i % 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("fused")
    for kind, schema in SCHEMAS.items():
        rows = (record(kind, i) for i in range(23))
        write_dataset(str(folder / kind), rows, rows_per_group=5, groups_per_shard=2, schema=schema)
    return str(folder)


def make_task(kind: str):
    config = config_of(kind)
    model = VLMo(config.model)
    init_weights(model, 3)
    return build_task(model, config, SCHEMAS[kind]).double()


def make_batch(kind: str, invalid=()) -> Batch:
    generator = torch.Generator().manual_seed(5)

    def images() -> torch.Tensor:
        return torch.randint(0, 256, (7, 3, 16, 16), generator=generator, dtype=torch.uint8)

    ids = torch.randint(1000, 1100, (7, 12), generator=generator)
    mask = torch.arange(12)[None] < torch.arange(4, 11)[:, None]
    columns = {"image": images(), "text_ids": ids, "text_mask": mask}
    if kind == "vqa":
        target = torch.rand(7, len(ANSWERS), generator=generator)
        target[4] = 0
        columns["target"] = target
    else:
        columns["label"] = torch.tensor([0, 1, 1, 0, 1, 0, 0])
        if kind == "nlvr2":
            columns["image_2"] = images()
    valid = torch.ones(7, dtype=torch.bool)
    valid[list(invalid)] = False
    return Batch(columns, valid, torch.arange(7), [str(i) for i in range(7)], [""] * 7)


def plain_loss(task, batch: Batch, step: int) -> torch.Tensor:
    """Row by row, with the model's public methods alone."""
    model = task.model

    def pair(i: int, image: torch.Tensor, name: str, slot: int) -> torch.Tensor:
        row = batch.rows(slice(i, i + 1))
        states = model.encode(
            image=image[i : i + 1] / 127.5 - 1.0, text=row.text_ids, text_mask=row.text_mask,
            noise=task.noise(name, row.position, step), image_slot=slot,
        ).text  # fmt: skip
        return model.pooler(states[:, 0])

    losses = []
    for i in range(len(batch)):
        if not batch.valid[i]:
            continue
        first = pair(i, batch.image.double(), "pair", 1)
        if isinstance(task, Vqa):
            target = batch.target[i].double()
            if target.sum() > 0:
                losses.append(F.binary_cross_entropy_with_logits(model.vqa(first)[0], target, reduction="sum"))
        elif isinstance(task, Nlvr2):
            second = pair(i, batch.image_2.double(), "pair_2", 2)
            losses.append(F.cross_entropy(model.nlvr2(torch.cat([first, second], dim=1)), batch.label[i : i + 1]))
        else:
            losses.append(F.cross_entropy(task.head(first), batch.label[i : i + 1]))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("micro_batch", [7, 2])
@pytest.mark.parametrize("kind", SCHEMAS)
def test_a_step_equals_the_plain_one(kind, micro_batch):
    batch, task, plain = make_batch(kind, invalid=(2,)), make_task(kind), make_task(kind)
    parallel = parallelize(task, SMALL.cluster, 1, torch.device("cpu"))
    figures = gradients(parallel, batch, Workers((7,)), 4, micro_batch)
    wanted = plain_loss(plain, batch, 4)
    wanted.backward()
    assert float(figures["loss"]) == pytest.approx(float(wanted), rel=1e-12)
    assert int(figures["masked_rows"]) == 1
    for (name, a), (_, b) in zip(task.named_parameters(), plain.named_parameters(), strict=True):
        used = b.grad is not None
        assert (a.grad is not None) == task.trainable(name), name
        # the plain loss reaches exactly what is trained
        assert used == task.trainable(name), name
        if used:
            torch.testing.assert_close(a.grad, b.grad, msg=name)


@pytest.mark.parametrize("kind", SCHEMAS)
def test_the_head_has_its_own_rate(kind):
    task = make_task(kind)
    head = {"vqa": "model.vqa.out.weight", "nlvr2": "model.nlvr2.out.weight", "entailment": "head.out.weight"}[kind]
    assert task.lr_scale(head) == task.settings.head_lr_scale
    assert task.lr_scale("model.pooler.dense.weight") == task.lr_scale("model.layers.0.attention.out.weight") == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", SCHEMAS)
def test_two_workers_equal_one(kind, data, tmp_path):
    def run(name: str, world: int, **changes):
        spec = job(f"{data}/{kind}", tmp_path / name, config_of(kind), **changes)
        spec = dataclasses.replace(spec, eval_data=f"{data}/{kind}")
        outcomes = [train(spec)] if world == 1 else train_on(world, spec)
        assert all(outcome.step == 6 and not outcome.stopped for outcome in outcomes), outcomes
        store = Store(str(tmp_path / name))
        [(_, result)] = read_evaluations(store)
        return read_metrics(store)[0], result

    alone, result = run("alone", 1)
    for metrics, other in (run("two", 2, micro_batch=2),):
        for name in ("loss", "accuracy", "grad_norm"):
            np.testing.assert_allclose([m[name] for m in metrics], [m[name] for m in alone], rtol=1e-9)
        assert other == result
    assert result.num_rows == 23 and result.scores["accuracy"].count == 23


def evaluated(evaluation, kind: str):
    """(evaluation rows of one batch of records with ids, the encoder's rows)."""
    from vlmo_ray.data.schema import Record

    encoder = evaluation.encoder()
    rows = []
    for i in range(23):
        stored = record(kind, i)
        rows.append(encoder(Record(stored["id"], stored["image_id"], stored), None))
    columns = {name: np.stack([row[name] for row in rows]) for name in encoder.columns}
    places = {"valid": np.ones(23, bool), "position": np.arange(23), "step": np.zeros(23)}
    ids = np.array([record(kind, i)["id"] for i in range(23)], dtype=object)
    batch = Batch.from_numpy(columns | places | {"id": ids, "problem": np.array([""] * 23)})
    with torch.inference_mode():
        found = {name: tensor.numpy() for name, tensor in evaluation.rows(batch).items()}
    return found | {"id": ids}


def test_vqa_scores_are_the_official_accuracy():
    evaluation = VqaAccuracy(make_task("vqa").model.float(), SCHEMAS["vqa"])
    found = evaluated(evaluation, "vqa")
    predicted = evaluation.predictions(found)
    known = AnswerList(ANSWERS)
    worth = []
    for i in range(23):
        given = record("vqa", i)["given_answers"]
        worth.append(known.accuracies(given)[ANSWERS.index(predicted["prediction"][i])])
    half = [{name: values[part] for name, values in found.items()} for part in (slice(0, 9), slice(9, 23))]
    scores = evaluation.score(iter(half))
    assert scores["accuracy"].value == pytest.approx(np.mean(worth)) and scores["accuracy"].count == 23
    for number, name in enumerate(TYPES):
        own = [w for i, w in enumerate(worth) if i % 3 == number]
        assert scores[f"accuracy ({name})"].value == pytest.approx(np.mean(own))
    assert predicted["truth"][7] == "" and predicted["truth"][1] == "blue"
    assert list(predicted) == ["id", "prediction", "score", "truth"]
    # a split without answers has predictions alone
    bare = VqaAccuracy(evaluation.model, Schema((IMAGE, TEXT)), ANSWERS)
    found = evaluated(bare, "vqa")
    assert bare.score(iter([found])) == {}
    np.testing.assert_array_equal(bare.predictions(found)["prediction"], predicted["prediction"])


def test_consistency_counts_sentences_whose_pairs_are_all_right():
    evaluation = Nlvr2Accuracy(make_task("nlvr2").model.float(), SCHEMAS["nlvr2"])
    found = evaluated(evaluation, "nlvr2")
    scores = evaluation.score(iter([found]))
    right = found["chosen"] == found["label"]
    sentences = [record("nlvr2", i)["sentence"] for i in range(23)]
    consistent = [all(right[i] for i in range(23) if sentences[i] == s) for s in set(sentences)]
    assert scores["accuracy"].value == pytest.approx(right.mean())
    assert scores["consistency"].value == pytest.approx(np.mean(consistent))
    assert scores["consistency"].count == len(set(sentences)) == 12
    labels = found["label"]
    assert scores["accuracy"].chance == pytest.approx(max(np.mean(labels), 1 - np.mean(labels)))


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 4)), min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_nlvr2_metrics_are_the_official_loops(rows):
    """The two loops of the official metrics.py, over (label, prediction, sentence)."""
    evaluation = make_nlvr2_accuracy()
    label, chosen, key = (np.array(column) for column in zip(*rows, strict=True))
    scores = evaluation.score(iter([{"label": label.astype(int), "chosen": chosen.astype(int), "sentence_key": key}]))
    total, sentences = 0, {}
    for truth, said, sentence in rows:
        total += truth == said
        sentences[sentence] = sentences.get(sentence, True) and truth == said
    assert scores["accuracy"].value == pytest.approx(total / len(rows))
    assert scores["consistency"].value == pytest.approx(sum(sentences.values()) / len(sentences))


@functools.cache
def make_nlvr2_accuracy() -> Nlvr2Accuracy:
    return Nlvr2Accuracy(make_task("nlvr2").model.float(), SCHEMAS["nlvr2"])


@pytest.mark.ray
@pytest.mark.full
@pytest.mark.parametrize("kind", SCHEMAS)
def test_weights_as_released_have_the_same_scores_on_any_number_of_workers(kind, ray_cluster, data, tmp_path):
    """Entailment has no released form: there the weights are those of a task of ours."""
    task = make_task(kind).float()
    if kind == "entailment":
        own = {f"task.{name}": value for name, value in task.state_dict().items() if not name.startswith("model.")}
        weights = Loaded(task.model, config_of(kind), SCHEMAS[kind], own)
    else:
        save_model(task.model, tmp_path / "ours")
        export_official(tmp_path / "ours", tmp_path / "released.pt")
        import_official(str(tmp_path / "released.pt"), str(tmp_path / "imported"))
        weights = load_all(tmp_path / "imported")
    results = [evaluate(weights, f"{data}/{kind}", num_workers=n) for n in (1, 2, 3)]
    assert results[0] == results[1] == results[2]
    found = evaluated(task.evaluation(SCHEMAS[kind]), kind)
    wanted = task.evaluation(SCHEMAS[kind]).score(iter([found]))
    assert results[0].scores == wanted and results[0].num_rows == 23


def test_what_does_not_fit_is_refused():
    model = VLMo(config_of("vqa").model)
    with pytest.raises(UserError, match="num_answers=2"):
        VqaAccuracy(model, Schema((IMAGE, TEXT, Field("answers", "answers", ("a", "b")))))
    with pytest.raises(UserError, match="no 'nlvr2' head"):
        Nlvr2Accuracy(model, SCHEMAS["nlvr2"])
    with pytest.raises(UserError, match=r"model\.heads=itc,mlm has none of itm, vqa, nlvr2"):
        override(recipe("entailment_tiny"), ["model.heads=itc,mlm"])
    with pytest.raises(UserError, match="the id '7a' is not the number of a question"):
        make_task("vqa").evaluation(SCHEMAS["vqa"]).submission(["7a"], ["red"])
    with pytest.raises(UserError, match="'answers' column"):
        Vqa(model, config_of("vqa"), Schema((IMAGE, TEXT)))
    with pytest.raises(UserError, match="'label' column"):
        Entailment(model, config_of("entailment"), Schema((IMAGE, TEXT)))
    with pytest.raises(UserError, match="'image_2'"):
        Nlvr2Accuracy(VLMo(config_of("nlvr2").model), SCHEMAS["entailment"])


def result_of(kind: str, data: str, **changes) -> Result:
    ids = changes.pop("ids", ["7", "12", "3"])
    words = {"vqa": ["red", "2", "yes"], "nlvr2": ["True", "False", "True"], "entailment": ["neutral"] * 3}[kind]
    table = pa.table({"id": ids, "prediction": words, "score": [0.5] * 3})
    evaluation = make_task(kind).evaluation(SCHEMAS[kind])
    return dataclasses.replace(Result({}, data, 3, predictions=table, submission=evaluation.submission), **changes)


def test_submissions_have_the_form_that_servers_take(tmp_path):
    vqa = json.loads(submission(result_of("vqa", str(tmp_path))))
    assert vqa == [
        {"question_id": 7, "answer": "red"},
        {"question_id": 12, "answer": "2"},
        {"question_id": 3, "answer": "yes"},
    ]
    ids = ["dev-1-0-0", "dev-1-0-1", "dev-2-0-0"]
    lines = submission(result_of("nlvr2", str(tmp_path), ids=ids)).decode()
    assert lines == "dev-1-0-0,True\ndev-1-0-1,False\ndev-2-0-0,True\n"


def test_half_a_submission_is_refused(tmp_path):
    data = str(tmp_path)
    with pytest.raises(UserError, match="1 rows are missing in the file, the first: shard#3: no image"):
        submission(result_of("vqa", data, problems=("shard#3: no image",)))
    with pytest.raises(UserError, match="has '7' and 0 other ids twice"):
        submission(result_of("vqa", data, ids=["7", "12", "7"]))
    with pytest.raises(UserError, match="no form of submission"):
        submission(result_of("entailment", data))
    with pytest.raises(UserError, match="no predictions"):
        submission(result_of("vqa", data, predictions=None))
    counts = {"read": 5, "kept": 3, "dropped": {"the image is missing": 2}}
    (tmp_path / "prepare.json").write_text(json.dumps({"counts": counts}))
    with pytest.raises(UserError, match=r"lacks 2 records that were dropped .* \(2: the image is missing\)"):
        submission(result_of("vqa", data))
    (tmp_path / "prepare.json").write_text(json.dumps({"counts": counts | {"read": 3, "dropped": {}}}))
    assert len(json.loads(submission(result_of("vqa", data)))) == 3


def test_a_model_that_sits_at_the_majority_class_is_told():
    evaluation = make_task("nlvr2").evaluation(SCHEMAS["nlvr2"])
    rows = {"label": np.arange(100) % 2, "sentence_key": np.arange(100) // 2}
    for chosen, words in ((np.ones(100), "judged True"), (np.zeros(100), "judged False"), (rows["label"], "")):
        scores = evaluation.score([rows | {"chosen": chosen.astype(int)}])
        remark = evaluation.remark(scores)
        assert words in remark and bool(words) == bool(remark)


def test_weights_with_another_head_or_list_are_refused_with_both_named(data, tmp_path):
    answers = Field("answers", "answers", ("red", "left", "2", "yes", "no"))
    other = Schema((IMAGE, TEXT, answers, *SCHEMAS["vqa"].fields[3:]))
    trained = config_of("vqa")
    first = train(job(f"{data}/vqa", tmp_path / "first", dataclasses.replace(trained, evaluate_every=0)))
    assert first.step == 6
    rows = ({**record("vqa", i), "answers": [{"answer": "left", "score": 1.0}]} for i in range(23))
    write_dataset(str(tmp_path / "other"), rows, schema=other)
    start = dataclasses.replace(trained, evaluate_every=0, init=str(tmp_path / "first"))
    outcome = train(job(str(tmp_path / "other"), tmp_path / "second", start))
    assert "another list of answers" in outcome.stopped and "'blue'" in outcome.stopped and "'left'" in outcome.stopped
