"""The paper's ablations (Tables 4 to 7), small: each row pre-trained and fine-tuned alike, with several seeds.

A trial of Ray Tune is one row with one seed, on one CPU. It trains the stages that the row asks for, then on
pairs, then the fusion task, each as a run in the storage that goes on where it stopped; trials that have a result are
not repeated.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import statistics
import tempfile
from dataclasses import dataclass

from ray import tune
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student

from vlmo_ray.config import Config, check
from vlmo_ray.data.mix import addresses, load_data
from vlmo_ray.data.store import Store, open_store
from vlmo_ray.errors import UserError
from vlmo_ray.overrides import override
from vlmo_ray.recipes import recipe
from vlmo_ray.runs.evaluations import read_evaluations
from vlmo_ray.runs.events import console
from vlmo_ray.session import ray_session
from vlmo_ray.train.build import RunSpec
from vlmo_ray.train.loop import train

_ASKED, _RESULT = "asked.json", "result.json"


@dataclass(frozen=True)
class Row:
    """What a row changes in the stage of pairs, and which stages come before it."""

    name: str
    settings: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()  # of vision and language


ROWS = (
    Row("everything"),
    Row("images", ("start_text_experts=image", "start_vl_experts=image"), ("vision",)),
    Row("images and texts", (), ("vision", "language")),
    Row("one network", ("model.experts=one", "task.vl_contrast=false")),
    Row("no VL experts", ("model.vl_start={depth}", "task.vl_contrast=false")),
    Row("contrast", ("task.itm=0", "task.mlm=0")),
    Row("contrast, matching", ("task.mlm=0",)),
    Row("contrast, words", ("task.itm=0",)),
    Row("local negatives", ("task.negatives=local",)),
    Row("attention apart", ("model.attention=separate",)),
    # not of the paper: what saves time and changes the objective
    Row("masked matching", ("task.masked_matching=true",)),
    Row("matching for half", ("task.itm_share=0.5",)),
    Row("half of the patches", ("task.patch_dropout=0.5", "task.unmasked_steps={tail}")),
)
# (table of the paper, or none; what it found better, or should be; and than what)
CLAIMS = (
    ("4", "images", "everything"),  # which starts at random
    ("4", "images and texts", "images"),
    ("5", "everything", "one network"),
    ("5", "everything", "no VL experts"),
    ("5", "everything", "contrast"),
    ("5", "contrast, matching", "contrast"),
    ("5", "everything", "contrast, matching"),
    ("5", "everything", "contrast, words"),
    ("6", "everything", "local negatives"),
    ("7", "everything", "attention apart"),
    ("", "everything", "masked matching"),
    ("", "everything", "matching for half"),
    ("", "everything", "half of the patches"),
)


@dataclass(frozen=True)
class Budget:
    """What every row gets; addresses of data sets, and steps."""

    pairs: str
    eval_pairs: str
    task_data: str
    task_eval: str
    images: str
    texts: str
    storage: str
    steps: int
    stage_steps: int
    task_steps: int


def ablate(
    pairs: str,
    eval_pairs: str,
    task_data: str,
    task_eval: str,
    storage: str,
    *,
    images: str = "",
    texts: str = "",
    steps: int = 400,
    stage_steps: int = 200,
    task_steps: int = 300,
    seeds: int = 3,
    rows: tuple[str, ...] = (),
    at_once: int = 2,
) -> dict[str, list[dict[str, float]]]:
    """Trains all rows and prints two tables: the means with their spread, and whether the paper's directions hold.

    Args:
        pairs: the data set of pairs, for the model of the recipe `demo`.
        eval_pairs: pairs for retrieval.
        task_data: a data set of VQA, which every row is fine-tuned on.
        task_eval: the same, to evaluate.
        storage: where runs and results are kept.
        images: the data set of the vision stage; default: that of pairs.
        texts: the data set of the language stage; default: that of pairs.
        steps: on pairs.
        stage_steps: of each stage before.
        task_steps: of fine-tuning.
        seeds: how many of each row, from 1 on.
        rows: only these; default: all.
        at_once: how many trials at the same time.
    """
    known = [row.name for row in ROWS]
    if unknown := sorted(set(rows) - set(known)):
        raise UserError(f"there is no row {unknown[0]!r}; known: {', '.join(known)}")
    if seeds < 1 or min(steps, stage_steps, task_steps) < 1:
        raise UserError("seeds and steps must be at least 1")
    images, texts = images or pairs, texts or pairs
    pairs, eval_pairs, task_data, task_eval, images, texts = (
        ",".join(Store(address).uri for address in addresses(uri))  # trials have another working directory
        for uri in (pairs, eval_pairs, task_data, task_eval, images, texts)
    )
    used = [load_data(data).fingerprint for data in (pairs, eval_pairs, task_data, task_eval, images, texts)]
    place = open_store(storage, create=True)
    asked = {"steps": steps, "stage_steps": stage_steps, "task_steps": task_steps, "data": used}
    before = json.loads(place.read(_ASKED)) if place.exists(_ASKED) else asked
    if before != asked:
        different = ", ".join(name for name in asked if before[name] != asked[name])
        raise UserError(
            f"{place.uri} has ablations with other {different}; rows would not compare: give another storage"
        )
    place.write(_ASKED, json.dumps(asked).encode())
    storage = place.uri
    budget = Budget(pairs, eval_pairs, task_data, task_eval, images, texts, storage, steps, stage_steps, task_steps)
    wanted = [row for row in ROWS if row.name in (rows or known)]
    with ray_session(), tempfile.TemporaryDirectory(prefix="vlmo-ablate-") as scratch:
        os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
        trial = tune.with_resources(tune.with_parameters(_trial, budget=budget), {"cpu": 1})
        space = {"row": tune.grid_search([row.name for row in wanted])}
        space["seed"] = tune.grid_search(list(range(1, seeds + 1)))
        found = tune.Tuner(
            trial,
            param_space=space,
            tune_config=tune.TuneConfig(max_concurrent_trials=at_once, metric="fusion", mode="max"),
            run_config=tune.RunConfig(name="ablate", storage_path=scratch, verbose=0),
        ).fit()
    if found.errors:
        raise UserError(
            f"{len(found.errors)} trials failed, and are tried again by the same command: {found.errors[0]}"
        )
    results = {row.name: [_read(budget, row.name, seed) for seed in range(1, seeds + 1)] for row in wanted}
    Store(budget.storage).write("ablations.json", json.dumps(results, indent=1).encode())
    for shown in (means(results), verdicts(results)):
        Console().print(shown)
    return results


def _trial(given: dict, budget: Budget) -> None:
    row = next(row for row in ROWS if row.name == given["row"])
    if not Store(_place(budget, row.name, given["seed"])).exists(_RESULT):
        with console("none"):  # of many trials at once nobody could read it
            result = run_row(row, given["seed"], budget)
        Store(_place(budget, row.name, given["seed"])).write(_RESULT, json.dumps(result).encode())
    tune.report(_read(budget, row.name, given["seed"]))


def run_row(row: Row, seed: int, budget: Budget) -> dict[str, float]:
    """Trains one row with one seed in this process; its figures, shares from 0 to 1."""
    place = _place(budget, row.name, seed)
    base = recipe("demo")
    depth, tail = base.model.depth, budget.steps // 10
    pairs = override(base, [setting.format(depth=depth, tail=tail) for setting in row.settings])
    init = ""
    for stage in row.stages:
        config = recipe(f"{stage}_tiny")
        model = dataclasses.replace(pairs.model, heads=config.model.heads)
        config = _cut(dataclasses.replace(config, model=model, init=init), budget.stage_steps, seed)
        _run(config, budget.images if stage == "vision" else budget.texts, f"{place}/{stage}")
        init = f"{place}/{stage}"
    pairs = dataclasses.replace(pairs, model=dataclasses.replace(pairs.model, heads=pairs.task.heads))  # pyright: ignore[reportAttributeAccessIssue]
    config = _cut(dataclasses.replace(pairs, init=init, evaluate_every=budget.steps), budget.steps, seed)
    retrieval = _run(config, budget.pairs, f"{place}/pairs", budget.eval_pairs)
    tuned = recipe("vqa_tiny")
    answers = len(load_data(budget.task_data).schema.field("answers").values)
    model = dataclasses.replace(pairs.model, heads=tuned.model.heads, num_answers=answers)
    tuned = dataclasses.replace(tuned, model=model, init=f"{place}/pairs", evaluate_every=budget.task_steps)
    fusion = _run(_cut(tuned, budget.task_steps, seed), budget.task_data, f"{place}/task", budget.task_eval)
    names = ("text_retrieval_r@1", "image_retrieval_r@1")
    return {name: retrieval[name] for name in names} | {"fusion": fusion["accuracy"]}


def _cut(config: Config, steps: int, seed: int) -> Config:
    """Exactly `steps` steps, with a warm-up of at most a tenth."""
    phases = (dataclasses.replace(config.phases[0], steps=steps),)
    optim = dataclasses.replace(config.optim, warmup_steps=min(config.optim.warmup_steps, steps // 10))
    every = min(config.checkpoint_every, steps)
    return check(dataclasses.replace(config, phases=phases, optim=optim, seed=seed, checkpoint_every=every))


def _run(config: Config, data: str, run: str, eval_data: str = "") -> dict[str, float]:
    """Trains to the end, from where it stopped; the metrics of the last evaluation."""
    fingerprint = load_data(data, config.data.weights).fingerprint
    outcome = train(RunSpec(config, data, run, fingerprint, eval_data, in_process_data=True))
    if outcome.stopped:
        raise UserError(f"{run}: {outcome.stopped}")
    found = read_evaluations(Store(run))
    return {name: score.value for name, score in found[-1][1].scores.items()} if found else {}


def _place(budget: Budget, row: str, seed: int) -> str:
    return f"{budget.storage}/{re.sub('[^a-z]+', '-', row.lower())}-{seed}"


def _read(budget: Budget, row: str, seed: int) -> dict[str, float]:
    return json.loads(Store(_place(budget, row, seed)).read(_RESULT))


def _values(results: dict[str, list[dict[str, float]]], row: str, metric: str) -> list[float]:
    """Of each seed. "retrieval" is the mean of R@1 both ways."""
    if metric == "retrieval":
        return [(r["text_retrieval_r@1"] + r["image_retrieval_r@1"]) / 2 for r in results[row]]
    return [r[metric] for r in results[row]]


def means(results: dict[str, list[dict[str, float]]]) -> Table:
    """Mean and standard deviation over the seeds."""
    out = Table("row", title="means and standard deviations over the seeds", title_justify="left")
    for head in ("retrieval R@1", "fusion"):
        out.add_column(head, justify="right")
    for row in results:
        cells = []
        for metric in ("retrieval", "fusion"):
            values = _values(results, row, metric)
            spread = statistics.stdev(values) if len(values) > 1 else math.nan
            cells.append(f"{statistics.mean(values):.1%} +- {spread:.1%}")
        out.add_row(row, *cells)
    return out


def verdict(better: list[float], worse: list[float]) -> str:
    """Whether `better` is above `worse`: by Student's t at 95 % of the differences of equal seeds, which see the same
    rows in the same order."""
    if len(better) < 2:
        return "one seed says nothing"
    differences = [a - b for a, b in zip(better, worse, strict=True)]
    mean, count = statistics.mean(differences), len(differences)
    error = statistics.stdev(differences) / math.sqrt(count)
    if abs(mean) <= float(student.ppf(0.975, count - 1)) * error:
        return f"within the spread ({mean:+.1%})"
    return f"{'holds' if mean > 0 else 'reversed'} ({mean:+.1%})"


def verdicts(results: dict[str, list[dict[str, float]]]) -> Table:
    """Of each claim of the paper whose two rows are there."""
    out = Table("table", "better", "than", "retrieval", "fusion", title="the paper's directions", title_justify="left")
    for table, better, worse in CLAIMS:
        if better in results and worse in results:
            found = [verdict(*(_values(results, row, m) for row in (better, worse))) for m in ("retrieval", "fusion")]
            out.add_row(table, better, worse, *found)
    return out
