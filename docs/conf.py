"""The documentation as a site, by Sphinx: `make docs`. A page for each command is made from its own help."""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path

HERE = Path(__file__).parent
CLI = HERE.parent / "vlmo_ray" / "cli.py"
sys.path.insert(0, str(HERE.parent))

project, author = "vlmo_ray", "the authors of vlmo_ray"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_show_copyright = html_show_sphinx = False
myst_heading_anchors = 3
# docstrings write `code` with single backticks, and types as they are annotated
default_role = "code"
autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_mock_imports = ["faiss"]
napoleon_numpy_docstring = False


def commands() -> dict[str, ast.FunctionDef]:
    """Name -> function of each command, in the order of `vlmo --help`."""
    tree = ast.parse(CLI.read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    [names] = [
        [name.id for name in node.value.elts if isinstance(name, ast.Name)]
        for node in ast.walk(functions["main"])
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
    ]
    return {name.rstrip("_"): functions[name] for name in names}


def page(name: str, function: ast.FunctionDef) -> str:
    """What the command does, and its arguments with their defaults, in Markdown."""
    said, _, listed = inspect.cleandoc(ast.get_docstring(function) or "").partition("\nArgs:\n")
    explained: dict[str, str] = {}
    key = ""
    for line in listed.splitlines():
        if line.startswith("    ") and not line.startswith("     "):
            key, _, explained[key] = line.strip().partition(": ")
        elif line.strip():
            explained[key] += " " + line.strip()
    arguments = function.args
    defaults = [None] * (len(arguments.args) - len(arguments.defaults)) + list(arguments.defaults)
    rows = []
    for argument, default in zip(arguments.args, defaults, strict=True):
        kind = ast.unparse(argument.annotation) if argument.annotation else ""
        option = argument.arg.upper() if kind.startswith("Positional") else f"--{argument.arg.replace('_', '-')}"
        option = {"--settings": "--set", "--trackers": "--tracker"}.get(option, option)
        shown = "" if default is None or ast.unparse(default) in ("''", "()", "None") else f"`{ast.unparse(default)}`"
        rows.append(f"| `{option}` | {shown} | {explained.get(argument.arg, '').replace('|', chr(92) + '|')} |")
    table = "\n".join(["| argument | default | |", "|---|---|---|", *rows]) if rows else ""
    return f"# vlmo {name}\n\n{said.strip()}\n\n{table}".rstrip() + "\n"


def write_commands(folder: Path) -> None:
    """The pages, and their table of contents; what has not changed is left alone, so that it is not built again."""
    pages = {name: page(name, function) for name, function in commands().items()}
    pages["index"] = "# Commands\n\n```{toctree}\n" + "\n".join(pages) + "\n```\n"
    folder.mkdir(exist_ok=True)
    for name, text in pages.items():
        file = folder / f"{name}.md"
        if not file.is_file() or file.read_text() != text:
            file.write_text(text)


def setup(app) -> None:
    app.connect("builder-inited", lambda app: write_commands(Path(app.srcdir) / "commands"))
