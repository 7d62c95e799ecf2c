"""The `vlmo` command: parses, calls, prints."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, UseAppendAction, arg

from vlmo_ray.errors import UserError

Settings = UseAppendAction[Annotated[tuple[str, ...], arg(name="set", metavar="A.B=C")]]


def recipes() -> None:
    """List the recipes."""
    from rich.console import Console
    from rich.table import Table

    from vlmo_ray.recipes import RECIPES

    out = Table("recipe", "what it is")
    for name, recipe in RECIPES.items():
        out.add_row(name, (recipe.__doc__ or "").split("\n")[0])
    Console().print(out)


def show(recipe: Positional[str], settings: Settings = ()) -> None:
    """Print the resolved config of a recipe as JSON.

    Args:
        recipe: a name that `vlmo recipes` lists.
        settings: change a field, for example `--set optim.peak_lr=1e-4`; may be repeated.
    """
    from vlmo_ray.config import override, to_dict
    from vlmo_ray.recipes import recipe as named

    print(json.dumps(to_dict(override(named(recipe), list(settings))), indent=1))


def pretrain(
    recipe: Positional[str],
    data: str,
    storage: str = "runs",
    name: str = "",
    settings: Settings = (),
) -> None:
    """Pre-train a recipe; a run of the same name goes on where it stopped.

    Args:
        recipe: a name that `vlmo recipes` lists.
        data: the data set, `s3://bucket/prefix` or a folder, as `vlmo prepare` writes it.
        storage: where runs are kept, `s3://bucket/prefix` or a folder that all nodes see.
        name: of the run; default: the recipe's.
        settings: change a field, for example `--set seed=2`; may be repeated.
    """
    from vlmo_ray.config import override
    from vlmo_ray.recipes import recipe as named

    config = override(named(recipe), list(settings))
    from vlmo_ray.train import launch  # torch and Ray, seconds: only once the recipe stands

    run = launch.pretrain(config, data, storage, name or None)
    print(f"done: {run.uri} holds the metrics, the checkpoints and the final weights (model/)")


def evaluate(
    model: Positional[str],
    data: str,
    task: Literal["retrieval"] = "retrieval",
    workers: int = 0,
    json_output: bool = False,
) -> None:
    """Evaluate weights on a data set.

    Args:
        model: a run, an imported folder or an official checkpoint.
        data: the data set, `s3://bucket/prefix` or a folder.
        task: what to measure.
        workers: how many encoders run at once; 0: one per GPU, or half the CPUs.
        json_output: print one JSON object instead of a table.
    """
    import dataclasses

    from rich.console import Console

    from vlmo_ray.convert import load_model
    from vlmo_ray.evaluate import retrieval, table
    from vlmo_ray.train.launch import ray_session

    assert task == "retrieval"
    weights = load_model(model)
    with ray_session():
        result = retrieval(weights, data, num_workers=workers or None)
    if json_output:
        print(json.dumps(dataclasses.asdict(result)))
    else:
        Console().print(table(result, f"zero-shot retrieval on {data}"))
        for problem in result.problems:
            print(f"left out: {problem}")


def import_(official: Positional[str], out: Positional[str]) -> None:
    """Turn an official checkpoint into a folder of this program, nothing lost.

    Args:
        official: a released .pt, .ckpt or .safetensors file.
        out: the folder to write.
    """
    from vlmo_ray.convert import import_official

    print(import_official(official, out))


def export(run: Positional[str], out: Positional[str]) -> None:
    """Write the weights of a run or an imported folder under the official keys.

    Args:
        run: a run or an imported folder.
        out: the .pt file to write.
    """
    from vlmo_ray.convert import export_official

    export_official(run, out)
    print(f"wrote {out}")


def main() -> None:
    """Entry point; exit code 2 and one sentence for what the user can mend."""
    commands = {
        "recipes": recipes,
        "show": show,
        "prepare": prepare,
        "pretrain": pretrain,
        "evaluate": evaluate,
        "import": import_,
        "export": export,
    }
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="vlmo", description=__doc__)
    except UserError as error:
        print(f"vlmo: {error}", file=sys.stderr)
        sys.exit(2)
