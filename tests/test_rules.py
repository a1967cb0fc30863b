"""The rules of dependency, and what may lie in the files that others build from."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ON_REQUEST = {"ray", "rerun"}  # extras that nobody gets who does not ask for them
LOCKS = ("requirements.lock", "requirements-edge.lock")


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    lint = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    return subprocess.run(
        [*lint, "--no-cache"],
        cwd=root,
        env={"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_rules_of_dependency_hold() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        ("flywheel/edge/mode.py", "import torch", "The edge and the robots run without torch"),
        ("flywheel/edge/safety.py", "import socket", "The control law, the envelope and the mode machine"),
        ("flywheel/store.py", "from airflow.sdk import dag", "Only dags imports airflow"),
        ("flywheel/stats.py", "import lerobot", "Only what learns"),
        ("flywheel/config.py", "import flywheel.store", "Layers"),
        ("flywheel/label/__init__.py", "import flywheel.gate", "Layers"),
    ],
)
def test_broken_rule_is_noticed(tmp_path: Path, module: str, line: str, broken: str) -> None:
    for part in ("flywheel", "dags"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / module).open("a") as f:
        f.write(f"\n{line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1
    assert re.search(rf"{broken}.* BROKEN", done.stdout), done.stdout


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_pins_every_package_and_names_no_registry(lock: str) -> None:
    lines = (ROOT / lock).read_text().splitlines()
    assert [x for x in lines if not re.fullmatch(r"[a-z0-9][a-z0-9-]*==[0-9][0-9a-z.]*", x)] == []


def test_edge_lock_is_a_part_of_the_whole_without_the_heavy_packages() -> None:
    whole, edge = (set((ROOT / lock).read_text().splitlines()) for lock in LOCKS)
    assert edge <= whole
    names = {x.split("==")[0] for x in edge}
    assert names.isdisjoint({"torch", "lerobot", "apache-airflow", "apache-airflow-core", "dvc", "fastapi"})


def test_every_declared_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert set(extras) >= ON_REQUEST
    wanted = (v for k, v in extras.items() if k not in ON_REQUEST)
    declared = [*project["dependencies"], *chain.from_iterable(wanted)]
    pinned = {x.split("==")[0] for x in (ROOT / "requirements.lock").read_text().splitlines()}
    names = {re.split(r"[\[<>=]", d)[0].lower() for d in declared}
    assert names <= pinned
