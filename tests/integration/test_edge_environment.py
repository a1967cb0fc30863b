"""A robot's environment: only what requirements-edge.lock names, and the edge can be imported in it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

from flywheel.schema import bundle_digest
from tests.robots import write_bundle

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "lerobot", "transformers", "airflow", "dvc", "dvclive", "fastapi")

pytestmark = [pytest.mark.integration, pytest.mark.slow]

PROBE = """
import importlib, importlib.util, json, pkgutil, sys
import flywheel.edge, flywheel.robot
names = [
    m.name
    for p in (flywheel.edge, flywheel.robot)
    for m in pkgutil.iter_modules(p.__path__, p.__name__ + ".")
]
for name in names:
    importlib.import_module(name)
heavy = sys.argv[1:]
print(json.dumps({
    "modules": names,
    "installed": [h for h in heavy if importlib.util.find_spec(h) is not None],
    "from": flywheel.__file__,
}))
"""

# One inference, lockstep ticks, a failure, and the episode of it: all that a robot does before it uploads.
RUN = """
import json, sys
from pathlib import Path
import numpy as np
import robots
from flywheel.config import RecorderSettings
from flywheel.edge.lockstep import Lockstep
from flywheel.edge.policy import Policy
from flywheel.edge.recorder import Identity, Recorder
from flywheel.episode import read, verify

here = Path(sys.argv[1])
policy = Policy.load(here / "bundle")
image = {"eye": np.full((robots.SIDE, robots.SIDE, 3), 255, np.uint8)}
actions = policy.infer(image, np.zeros(3, np.float32), "move left").actions
robot = robots.Tiny(255)
lock = Lockstep(robot, robot, policy, record=True)
identity = Identity("lab", "tiny", "lockstep", 1_760_000_000_000_000_000, "test")
lock.recorder = recorder = Recorder(lock.rings, RecorderSettings(), here / "episodes", identity, seed=0)
lock.events.add(lock.now_ns, "task", "start", {"instruction": "move left"})
result = lock.run(2.0, "move left")
lock.events.add(lock.now_ns, "task", "end", {"outcome": "timeout", "by": "policy"})
lock.run(1.0, "move left")
sealed = recorder.finish(lock.now_ns)
episode = read(here / "episodes" / sealed[0].episode_id)
print(json.dumps({
    "actions": actions.shape,
    "finite": bool(np.isfinite(actions).all()),
    "ticks": result.ticks,
    "at": robot.q.tolist(),
    "episodes": len(sealed),
    "problems": [str(p) for p in verify(here / "episodes" / sealed[0].episode_id)],
    "rows": [episode.control.num_rows, episode.frames.num_rows],
    "digest": episode.manifest.policy_digest,
    "loaded": sorted(m for m in sys.modules if m.split(".")[0] in sys.argv[2:]),
}))
"""


def install(pin: str, site: Path) -> None:
    """Put one pinned package into another environment, by links to the very files that pip put into ours."""
    name, wanted = pin.split("==")
    package = distribution(name)
    assert package.version == wanted, f"{name} {package.version} is installed, {wanted} is pinned"
    for file in package.files or ():
        if ".." in file.parts:  # programs, which the edge does not need
            continue
        target = site / file
        target.parent.mkdir(parents=True, exist_ok=True)
        source = Path(str(package.locate_file(file)))
        if source.exists() and source.suffix != ".pyc" and not target.exists():
            try:
                os.link(source, target)
            except OSError:  # another file system
                shutil.copy2(source, target)


@pytest.fixture(scope="module")
def edge_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a fresh environment with the edge's packages and the project's wheel."""
    tmp = tmp_path_factory.mktemp("edge")
    source = tmp / "source"
    source.mkdir()
    for part in ("flywheel", "dags"):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / file).exists():
            shutil.copy(ROOT / file, source)
    pip = ("-m", "pip", "--disable-pip-version-check", "-qq")

    def run(python: Path | str, *args: str) -> None:
        done = subprocess.run([str(python), *args], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    run(sys.executable, *pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp), str(source))
    run(sys.executable, "-m", "venv", str(tmp / "venv"))
    python = tmp / "venv" / "bin" / "python"
    site = next((tmp / "venv" / "lib").glob("python3*/site-packages"))
    for pin in (ROOT / "requirements-edge.lock").read_text().split():
        install(pin, site)
    run(python, *pip, "install", "--no-deps", *map(str, tmp.glob("flywheel-*.whl")))
    run(python, "-m", "pip", "check")
    return python


def test_lock_holds_all_that_the_edge_imports_and_nothing_heavy(edge_python: Path, tmp_path: Path) -> None:
    """``pip check`` has found every declared requirement of the wheel; every module imports."""
    done = subprocess.run(
        [edge_python, "-W", "error", "-c", PROBE, *HEAVY],
        cwd=tmp_path,  # not the checkout: what is imported must be what was installed
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["installed"] == []
    assert found["from"].startswith(str(edge_python.parents[1]))
    assert {"flywheel.edge.runtime", "flywheel.edge.updater", "flywheel.robot.twin"} <= set(found["modules"])


def test_a_robot_infers_moves_and_seals_an_episode_without_anything_heavy(
    edge_python: Path, tmp_path: Path
) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    shutil.copy(ROOT / "tests" / "robots.py", tmp_path / "robots.py")
    done = subprocess.run(
        [edge_python, "-W", "error", "-c", RUN, str(tmp_path), *HEAVY],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ran = json.loads(done.stdout)
    assert ran["loaded"] == []
    assert ran["actions"] == [16, 3]
    assert ran["finite"]
    assert ran["ticks"] == 2000
    assert ran["at"] == pytest.approx([1.0, -0.8], abs=0.05)
    assert ran["episodes"] == 1
    assert ran["problems"] == []
    assert min(ran["rows"]) > 10
    assert ran["digest"] == bundle_digest(bundle)
