"""The documentation builds as a site without a warning, and has a page for every command with all its arguments."""

import importlib.util
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sphinx.cmd.build import main as sphinx

from vlmo_ray import cli

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def conf():
    spec = importlib.util.spec_from_file_location("docs_conf", ROOT / "docs" / "conf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_command_has_a_page_that_explains_every_argument(conf, tmp_path, monkeypatch):
    conf.write_commands(tmp_path)
    listed = []
    monkeypatch.setattr("tyro.extras.subcommand_cli_from_dict", lambda commands, **_: listed.append(commands))
    cli.main()
    assert list(conf.commands()) == list(listed[0])
    for name, function in listed[0].items():
        text = (tmp_path / f"{name}.md").read_text()
        assert text.startswith(f"# vlmo {name}\n")
        rows = re.findall(r"^\| `(.*?)` \| .*? \| (.*) \|$", text, re.MULTILINE)
        assert len(rows) == len(inspect.signature(function).parameters), name
        assert all(explained for _, explained in rows), (name, rows)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_site_builds_without_a_warning(tmp_path):
    """Every link, every name that the API page takes from the code."""
    source = tmp_path / "vlmo_ray" / "docs"
    shutil.copytree(ROOT / "docs", source, ignore=shutil.ignore_patterns("commands", "_build"))
    (tmp_path / "vlmo_ray" / "vlmo_ray").symlink_to(ROOT / "vlmo_ray")
    assert sphinx(["-q", "-W", "--keep-going", "-b", "html", str(source), str(tmp_path / "site")]) == 0
    pages = {str(path.relative_to(tmp_path / "site")) for path in (tmp_path / "site").rglob("*.html")}
    assert {"index.html", "own_data.html", "commands/train.html", "failures/storage_503.html", "api.html"} <= pages
    assert "position_bias" in (tmp_path / "site" / "api.html").read_text()


@pytest.mark.slow
@pytest.mark.full
def test_the_pictures_are_made_again(tmp_path):
    """Of a short run, and elsewhere; without Chromium only the console."""
    command = [sys.executable, str(ROOT / "docs" / "pictures.py"), "--steps", "12", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    made = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert "finished" in (tmp_path / "console.svg").read_text()
    if shutil.which("chromium"):
        kept = {path.name for path in (ROOT / "docs" / "pictures").iterdir()}
        assert set(made) == kept and min(made.values()) > 5000, made
