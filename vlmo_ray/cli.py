"""The `vlmo` command: parses, calls, prints."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from typing import Annotated, Literal, ParamSpec, TypeVar

import tyro
from tyro.conf import Positional, UseAppendAction, arg

from vlmo_ray.errors import UserError

P = ParamSpec("P")
T = TypeVar("T")
Settings = UseAppendAction[Annotated[tuple[str, ...], arg(name="set", metavar="A.B=C")]]
Space = UseAppendAction[Annotated[tuple[str, ...], arg(name="space", metavar="A.B=log:LOW..HIGH")]]
Trackers = UseAppendAction[Annotated[tuple[str, ...], arg(name="tracker", metavar="mlflow|trackio|wandb")]]
Options = UseAppendAction[Annotated[tuple[str, ...], arg(name="option", metavar="NAME=VALUE")]]


def recipes() -> None:
    """List the recipes."""
    from rich.console import Console
    from rich.table import Table

    from vlmo_ray.recipes import RECIPES

    out = Table("recipe", "what it is")
    for name, recipe in RECIPES.items():
        out.add_row(name, " ".join((recipe.__doc__ or "").split("\n\n")[0].split()))
    Console().print(out)


def show(recipe: Positional[str], settings: Settings = ()) -> None:
    """Print the resolved config of a recipe as JSON.

    Args:
        recipe: a name that `vlmo recipes` lists.
        settings: change a field, for example `--set optim.peak_lr=1e-4`; may be repeated.
    """
    from vlmo_ray.overrides import override, to_dict
    from vlmo_ray.recipes import recipe as named

    config = override(named(recipe), list(settings))
    from vlmo_ray.train.memory import memory_of, on_meta  # takes seconds, so only after the recipe was checked

    print(json.dumps(to_dict(config), indent=1))
    print(f"a step takes some {memory_of(on_meta(config), config)} (computed)", file=sys.stderr)


def plan(
    recipe: Positional[str],
    gpus: int,
    gpu: str = "H100",
    nodes: int = 0,
    spot: float = 0.0,
    price: float = 0.0,
    mfu: float = 0.0,
    settings: Settings = (),
    explain: bool = False,
    json_output: bool = False,
) -> None:
    """Say what a run would take on given GPUs: memory, time, traffic, data, days, cost. Computed, not measured.

    Args:
        recipe: a name that `vlmo recipes` lists.
        gpus: how many.
        gpu: H100, H200, A100 (40 GB) or V100 (32 GB).
        nodes: machines; 0: eight GPUs in each.
        spot: how often a node is lost without notice, per node and day.
        price: of a GPU-hour.
        mfu: what share of its peak a GPU reaches while it computes; 0: what is assumed for its kind.
        settings: change a field, for example `--set micro_batch=16`; may be repeated.
        explain: also print every assumption and formula, with its source.
        json_output: print one JSON object instead of a table.
    """
    from rich.console import Console

    from vlmo_ray.overrides import override
    from vlmo_ray.recipes import recipe as named

    config = override(named(recipe), list(settings))
    from vlmo_ray.train.plan import plan as run  # takes seconds, so only after the recipe was checked

    found = run(config, gpus, gpu, nodes, spot=spot, price=price, utilisation=mfu)
    if json_output:
        print(json.dumps(found.as_dict()))
        return
    Console().print(found.table())
    if explain:
        print(found.explained())


def prepare(
    format: Positional[str],
    source: Positional[str],
    out: Positional[str] = "",
    option: Options = (),
    index: bool = False,
    seed: int = 0,
    memory_mb: int = 1024,
    shard_mb: int = 256,
    rows_per_group: int = 256,
    verify: bool = False,
    forbid: tuple[Literal["crop", "flip", "color", "geometric"], ...] = (),
    scores: str = "",
    keep_above: float | None = None,
) -> None:
    """Turn records of a public format into shuffled shards with a manifest. A stopped command continues when repeated.

    Args:
        format: karpathy (JSON of COCO, Flickr8k/30k), webdataset (tars, also img2dataset's), parquet (layout of
            Hugging Face or img2dataset), table (CSV or TSV of path and caption), folders (one of images per class),
            vqa, nlvr2, snli_ve or refcoco (the official files of those tasks), ade20k (images and masks in its
            layout), text (plain text, JSON lines or Parquet without images).
        source: a file, folder or `s3://bucket/prefix` of that format.
        out: the folder or `s3://bucket/prefix` to write.
        option: an option of the format, `--option name=value`. karpathy: split, images, captions; parquet:
            image_column, text_column, columns; webdataset: columns; table: image_column, text_column, header, quoting,
            delimiter, images; folders: classes, labels; text: column, documents, length; vqa: split, images, answers,
            at_least; nlvr2, snli_ve: images; refcoco: split, by, images, dets; ade20k: split, classes, zero.
        index: rewrite nothing; only add a manifest beside the shards of the source (webdataset, parquet).
        seed: the seed of the shuffle.
        memory_mb: how many MB of records one task may hold.
        shard_mb: the size of the shards in MB.
        rows_per_group: rows of a Parquet row group, the unit of reading.
        verify: decode every image completely instead of reading its header.
        forbid: augmentations that would make records of this data set untrue.
        scores: a Parquet file with id and score, for example of `vlmo evaluate --task similarity`.
        keep_above: leave out, and count, records whose score is below this, or that have none.
    """
    from vlmo_ray.data.prepare import prepare as run

    counts = run(
        format,
        source,
        out or None,
        index=index,
        seed=seed,
        memory=memory_mb << 20,
        shard_bytes=shard_mb << 20,
        rows_per_group=rows_per_group,
        verify=verify,
        forbid=forbid,
        scores=scores,
        keep_above=keep_above,
        **_options(option),
    )
    print(counts)


def _options(texts: Options) -> dict[str, str]:
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--option {text!r} has no '='; write --option name=value, for example split=val")
        found[name] = value
    return found


def _json(text: str) -> object:
    """A number, a list or true as such, anything else as text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def train(
    recipe: Positional[str],
    data: str,
    storage: str = "runs",
    name: str = "",
    eval_data: str = "",
    settings: Settings = (),
    from_sweep: str = "",
    accept_changes: bool = False,
    trackers: Trackers = (),
    log_json: bool = False,
) -> None:
    """Train a recipe, for pre-training and fine-tuning. A run of the same name continues where it stopped.

    Args:
        recipe: a name that `vlmo recipes` lists.
        data: the data set that `vlmo prepare` wrote: `s3://bucket/prefix` or a folder; or several, with commas between
            them: a batch then has slices of each, by `data.weights`.
        storage: where runs are kept: `s3://bucket/prefix` or a folder that all nodes share.
        name: the name of the run; default: the recipe's.
        eval_data: the data set that is evaluated every `evaluate_every` steps.
        settings: change a field, for example `--set seed=2`; may be repeated.
        from_sweep: a sweep that `vlmo tune` made of this recipe: take the settings of its best trial.
        accept_changes: continue although data or settings differ from those of the run's newest checkpoint.
        trackers: an experiment tracker that gets the figures; may be repeated.
        log_json: print a JSON object for each event instead of a sentence.
    """
    from vlmo_ray.overrides import override
    from vlmo_ray.recipes import recipe as named

    config = named(recipe)
    if from_sweep:
        from vlmo_ray.launch.sweep import best_settings

        settings = (*best_settings(from_sweep, config), *settings)
    config = override(config, [*settings, *_reporting(trackers, log_json)])
    from vlmo_ray.launch.fit import fit  # takes seconds (torch and Ray), so only after the recipe was checked
    from vlmo_ray.runs.events import console, show

    with console("json" if config.log_json else "text"):
        run = fit(config, data, storage, name or None, accept_changes=accept_changes, eval_data=eval_data)
        show("done", f"done: {run.uri} holds the metrics, the checkpoints and the final weights (model/)", run=run.uri)


def _reporting(trackers: Trackers, log_json: bool) -> list[str]:
    return [f"trackers={json.dumps(trackers)}"] * bool(trackers) + ["log_json=true"] * log_json


def tune(
    recipe: Positional[str],
    data: str,
    storage: str = "runs",
    name: str = "",
    space: Space = (),
    eval_data: str = "",
    settings: Settings = (),
    trials: int = 16,
    at_once: int = 1,
    metric: str = "",
    mode: Literal["", "min", "max"] = "",
    prune: bool = True,
    seed: int = 0,
    trackers: Trackers = (),
    log_json: bool = False,
) -> None:
    """Search settings of a recipe by many short runs. A sweep of the same name continues where it stopped.

    Args:
        recipe: a name that `vlmo recipes` lists.
        data: the data set to train on: `s3://bucket/prefix` or a folder.
        storage: where the sweep and its runs are kept: `s3://bucket/prefix` or a folder that all nodes share.
        name: the name of the sweep; default: the recipe's and "-sweep".
        space: what to search, `field=log:LOW..HIGH`, `field=LOW..HIGH` or `field=A,B`; may be repeated. Default: what
            the recipe declares.
        eval_data: the data set that is evaluated every `evaluate_every` steps (default: nine times a trial), and in
            the end with the best run.
        settings: change a field in all trials, for example `--set seed=2`; may be repeated.
        trials: how many; of a space of choices alone, each combination once.
        at_once: how many run at the same time.
        metric: of the evaluation; default: its first one. Without eval_data, of training; default: loss.
        mode: what is better; default: min for `loss`, max for an accuracy and an evaluation's first metric.
        prune: stop trials that are behind (ASHA): at every rung the best third goes on.
        seed: of the draws.
        trackers: an experiment tracker that gets the figures of every trial; may be repeated.
        log_json: print a JSON object for each event instead of a sentence.
    """
    from vlmo_ray.overrides import override
    from vlmo_ray.recipes import recipe as named

    config = override(named(recipe), [*settings, *_reporting(trackers, log_json)])
    from vlmo_ray.launch.tune import tune as run  # takes seconds, so only after the recipe was checked
    from vlmo_ray.runs.events import console, show

    sweep = run(
        config,
        data,
        storage,
        space,
        name=name,
        eval_data=eval_data,
        settings=settings,
        trials=trials,
        at_once=at_once,
        metric=metric,
        mode=mode,
        prune=prune,
        seed=seed,
    )
    uri = sweep.store.uri
    with console("json" if config.log_json else "text"):
        show("done", f"done: {uri} holds sweep.json, sweep.png and the runs", sweep=uri)
        if sweep.best is None:
            raise UserError("no trial finished; the table says why")
        best = sweep.store.address(sweep.best.name)
        if eval_data:
            evaluate(best, eval_data, json_output=config.log_json)
        show("best", f"the best run: {best}", run=best)
        show("hint", f"its settings for another run: vlmo train {recipe} --from-sweep {uri} ...")


def evaluate(
    model: Positional[str],
    data: str,
    task: str = "",
    option: Options = (),
    submission: str = "",
    workers: int = 0,
    device: Literal["auto", "cpu", "gpu"] = "auto",
    json_output: bool = False,
) -> None:
    """Evaluate weights on a data set. A run keeps the result beside its metrics.

    Args:
        model: a run, one of its checkpoints, or an imported folder.
        data: the data set: `s3://bucket/prefix` or a folder.
        task: what to measure; default: what the weights were trained for, or retrieval.
        option: an option of the evaluation, `--option name=value`. retrieval: subset, folds; matching:
            top; zero_shot: templates, names; grounding: layer.
        submission: also write the file for the benchmark's server, of VQA (EvalAI's JSON), NLVR2 (CSV) and captioning
            (COCO's JSON); may be on `s3://`. Refused if a row of the data set is missing.
        workers: the number of actors; 0: one per GPU, or half the CPUs.
        device: of the actors; auto: GPUs if the cluster has any now. gpu asks for them where nodes are added on demand.
        json_output: print one JSON object instead of a table.
    """
    from rich.console import Console

    from vlmo_ray.data.store import store_and_name
    from vlmo_ray.evaluate import evaluate as run
    from vlmo_ray.runs.evaluations import as_dict, keep_in_run, table
    from vlmo_ray.runs.evaluations import submission as file_of
    from vlmo_ray.runs.load import load_all
    from vlmo_ray.session import ray_session

    options = {name: _json(value) for name, value in _options(option).items()}
    target = store_and_name(submission) if submission else None
    weights = load_all(model)  # before Ray, whose start takes seconds
    with ray_session():
        result = run(weights, data, task, num_workers=workers or None, device=device, **options)
    keep_in_run(model, result, weights.step)
    if target:
        store, name = target
        store.write(name, file_of(result))
    if json_output:
        print(json.dumps(as_dict(result)))
    else:
        Console().print(table(result, f"{task or 'evaluation'} on {data}"))
        for problem in result.problems:
            print(f"left out: {problem}")
        if result.remark:
            print(result.remark)


def import_(official: Positional[str], out: Positional[str]) -> None:
    """Convert an official checkpoint to a folder of this program, without loss.

    Args:
        official: a released .pt, .ckpt or .safetensors file.
        out: the folder or `s3://bucket/prefix` to write.
    """
    from vlmo_ray.runs.load import import_official

    print(import_official(official, out))


def export(run: Positional[str], out: Positional[str], format: Literal["official", "hub", "timm"] = "official") -> None:
    """Write the weights of a run or an imported folder for other programs.

    Args:
        run: a run or an imported folder.
        out: the .pt file to write, for hub and timm the folder; may be on `s3://`.
        format: official: the released program's file. hub: a folder with weights, tokenizer and a model card made from
            the run, for huggingface_hub. timm: the image path as timm's BEiT.
    """
    if format == "official":
        from vlmo_ray.runs.load import export as write_official

        write_official(run, out)
        print(f"wrote {out}")
        return
    from vlmo_ray.report.export import export_hub, export_timm

    files = (export_hub if format == "hub" else export_timm)(run, out)
    print(f"wrote {', '.join(files)} into {out}")


def audit(run: Positional[str], data: str, json_output: bool = False) -> None:
    """Check that a run consumed every pair once an epoch; exit code 1 if not. Lists the exceptions and masked pairs.

    Args:
        run: a run that was trained with `--set audit=true`.
        data: what it was trained on, as `vlmo train` was given it.
        json_output: print one JSON object instead of a table.
    """
    import dataclasses

    from rich.console import Console

    from vlmo_ray.runs import audit as audits

    found = audits.audit(run, data)
    if json_output:
        print(json.dumps(dataclasses.asdict(found) | {"clean": found.clean}))
    else:
        console = Console(soft_wrap=True)
        console.print(audits.table(found))
        for sentence in found.sentences():
            console.print(sentence, highlight=False, markup=False)
    if not found.clean:
        sys.exit(1)


def report(
    runs: Positional[tuple[str, ...]],
    out: str = "",
    data: str = "",
    rows: int = 200,
    pictures: bool = True,
    audit: bool = False,
) -> None:
    """Write one HTML page about a run, also while it lasts; about several, laid over one another.

    Args:
        runs: folders or `s3://bucket/prefix`, of which the first is looked at in detail.
        out: the file to write, also on `s3://`; default: report.html in the first run.
        data: a data set of pairs for the pictures; default: the one that the run is evaluated on.
        rows: how many pairs of it, from the first on.
        pictures: whether to run the model for pictures of retrieval, negatives and attention.
        audit: check what the run consumed, however long that takes.
    """
    from vlmo_ray.report.page import report as write

    print(f"wrote {write(runs, out, data, rows, pictures, audit)}; it opens in any browser")


def embed(
    model: Positional[str],
    data: str,
    out: str,
    what: Literal["image", "text"] = "image",
    workers: int = 0,
    device: Literal["auto", "cpu", "gpu"] = "auto",
) -> None:
    """Write a vector for every image or text of a data set. The same command goes on where it stopped.

    Args:
        model: a run, one of its checkpoints, or an imported folder.
        data: the data set: `s3://bucket/prefix` or a folder.
        out: where the vectors go: `s3://bucket/prefix` or a folder that all nodes share.
        what: of which column.
        workers: the number of actors; 0: one per GPU, or one for two CPUs.
        device: of the actors; auto: GPUs if the cluster has any now. gpu asks for them where nodes are added on demand.
    """
    from vlmo_ray.search.embed import embed as run

    done = run(model, data, out, what, num_workers=workers or None, device=device)
    bad = f", {done.unreadable:,} of their rows without a vector (column problem)" if done.unreadable else ""
    print(f"{out}: {done.rows:,} rows; now {done.shards:,} shards in {done.seconds:.0f} s{bad}")


def search(
    index: Positional[str],
    query: Positional[str] = "",
    top: int = 10,
    sheet: str = "",
    model: str = "",
    fast: bool = False,
    build_faiss: bool = False,
    json_output: bool = False,
    serve: bool = False,
    host: str = "127.0.0.1",
    port: int = 8000,
) -> None:
    """Find what is most similar to a text or an image file among the vectors that `vlmo embed` wrote.

    With --serve, a page for that, until Ctrl-C; the variable VLMO_SEARCH_TOKEN holds the token that it asks for.

    Args:
        index: what `vlmo embed --out` was given.
        query: a text in quotes, or the name of an image file, also on `s3://`.
        top: how many results.
        sheet: also write the results as a page of pictures, to this HTML file; may be on `s3://`.
        model: where the model is by now, if not where it was.
        fast: ask faiss, which may miss some of the best; for millions of vectors.
        build_faiss: first make the index of faiss.
        json_output: print one JSON object for each result instead of a table.
        serve: start a page on Ray Serve instead.
        host: the address that the page listens on; 0.0.0.0 lets other machines in, and then takes a token.
        port: the port of the page.
    """
    import dataclasses

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from vlmo_ray.data.store import store_and_name
    from vlmo_ray.search.index import Index, Queries
    from vlmo_ray.search.sheet import sheet as page

    if top < 1:
        raise UserError(f"--top {top} must be at least 1")
    target = store_and_name(sheet) if sheet else None
    found = Index(index)
    if build_faiss:
        print(f"wrote {found.build_fast()}", file=sys.stderr)
    if serve:
        _serve(index, model, fast, host, port)
        return
    if not query:
        raise UserError('ask something: vlmo search INDEX "two dogs", vlmo search INDEX photo.jpg, or --serve')
    queries = Queries(found, model)
    asked, picture = queries.of(query)
    [results] = (found.search_fast if fast or build_faiss else found.search)(asked, top)
    if target:
        store, name = target
        store.write(name, page(found, query, results, picture).encode())
    if json_output:
        for result in results:
            print(json.dumps(dataclasses.asdict(result)))
        return
    out = Table("score", "id", "address")
    for result in results:
        out.add_row(f"{result.score:.3f}", Text(result.id), Text(result.address))
    Console().print(out)


def _serve(index: str, model: str, fast: bool, host: str, port: int) -> None:
    import os
    import threading

    from vlmo_ray.search.serve import end, serve
    from vlmo_ray.session import ray_session

    with ray_session():
        address = serve(
            index, model=model, token=os.environ.get("VLMO_SEARCH_TOKEN", ""), fast=fast, host=host, port=port
        )
        try:
            print(f"search at {address}; Ctrl-C ends it", flush=True)
            threading.Event().wait()
        finally:
            end()


def runs(storage: Positional[str], json_output: bool = False) -> None:
    """List the runs of a storage: state, step, time left, last figures.

    Args:
        storage: where runs are kept, as `vlmo train` was given it.
        json_output: print one JSON object for each run instead of a table.
    """
    from rich.console import Console

    from vlmo_ray.report import overview

    found, problems = overview.read_runs(storage)
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    if not found:
        raise UserError(f"{storage} holds no run; give what `vlmo train --storage` was given")
    if json_output:
        for facts in found:
            print(json.dumps(overview.as_dict(facts)))
    else:
        Console().print(overview.table(found))


def doctor(data: str = "", storage: str = "") -> None:
    """Say what this machine, or the cluster of RAY_ADDRESS, lacks, each with its remedy; exit code 1 if anything does.

    Args:
        data: a data set: whether it can be read, and how fast.
        storage: where runs are to be kept: rights and rates, with an object that is removed again.
    """
    from vlmo_ray.doctor import examine, lines

    found = examine(data, storage)
    print("\n".join(lines(found)))
    if any(finding.level == "bad" for finding in found):
        sys.exit(1)


def report_mistakes(command: Callable[P, T]) -> Callable[P, T]:
    """A mistake that the user can fix gives one sentence and exit code 2."""

    @functools.wraps(command)
    def reporting(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return command(*args, **kwargs)
        except UserError as error:
            print(f"vlmo: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)

    return reporting


@report_mistakes
def main() -> None:
    """Entry point."""
    functions = (
        recipes,
        show,
        plan,
        prepare,
        train,
        tune,
        evaluate,
        report,
        runs,
        doctor,
        embed,
        search,
        import_,
        export,
        audit,
    )
    commands = {function.__name__.rstrip("_"): function for function in functions}
    tyro.extras.subcommand_cli_from_dict(commands, prog="vlmo", description="VLMo on a Ray cluster.")
