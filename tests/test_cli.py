"""Bad input at the command line: one clear line, exit code 1, nothing lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flywheel.schema import EPISODE_FILES
from tests.samples import sealed

ROOT = Path(__file__).parents[1]


def flywheel(*args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from flywheel.cli import main; main()", *args],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=120,
        check=False,
    )


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 1, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("flywheel: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in lines[0]


def test_a_missing_bundle_is_named() -> None:
    refused(flywheel("eval", "--policy", "nowhere", "--episodes", "1"), "nowhere", "policy.onnx")


def test_an_unknown_shift_lists_the_known_ones() -> None:
    refused(flywheel("eval", "--policy", "models/base", "--shift", "mars"), "mars", "factory")


def test_an_unknown_key_in_params_names_the_nearest(tmp_path: Path) -> None:
    params = (ROOT / "params.yaml").read_text().replace("  learning_rate:", "  learning_rat:")
    (tmp_path / "params.yaml").write_text(params)
    done = flywheel(
        "train", "--policy", "a", "--dataset", "b", "--out", "c", "--params", str(tmp_path / "params.yaml")
    )
    refused(done, "train.learning_rat", "train.learning_rate")


def test_a_store_that_is_not_up_says_how_to_start_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLYWHEEL_HOME", str(tmp_path))
    refused(flywheel("episodes", "ls"), "flywheel up")


def test_verify_names_the_truncated_file_and_leaves_it_there(tmp_path: Path) -> None:
    directory = sealed(tmp_path)
    assert flywheel("episodes", "verify", str(directory)).returncode == 0
    victim = directory / EPISODE_FILES[0]
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 2])
    refused(flywheel("episodes", "verify", str(directory)), EPISODE_FILES[0])
    assert victim.read_bytes() == whole[: len(whole) // 2]


def test_verify_prints_json(tmp_path: Path) -> None:
    done = flywheel("episodes", "verify", str(sealed(tmp_path)), "--json")
    assert json.loads(done.stdout) == []


def test_an_unknown_benchmark_lists_the_known_ones() -> None:
    refused(flywheel("bench", "speed"), "speed", "tracking", "faults")


def test_a_robot_needs_exactly_one_source_of_policies(tmp_path: Path) -> None:
    refused(flywheel("edge", "run"), "--policy", "--policies", "--trust")
    refused(flywheel("edge", "run", "--policy", "x", "--upload"), "--upload", "--record")
    nowhere = str(tmp_path / "root.json")
    refused(flywheel("edge", "run", "--policies", str(tmp_path / "p"), "--trust", nowhere), nowhere)


def test_the_unit_of_a_robot_is_printed(tmp_path: Path) -> None:
    done = flywheel("edge", "unit", "--policy", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"--policy {tmp_path} " in done.stdout


def test_what_a_benchmarks_libraries_and_processes_print_is_not_in_its_document() -> None:
    code = """
import subprocess, sys, types
from flywheel.cli import main
from flywheel.cli.bench import BENCHES

def noisy(full):
    print("from a library")
    subprocess.run(["echo", "from a process"], check=True)
    return {"bench": "noisy", "bars": {}}

sys.modules["noisy"] = types.SimpleNamespace(noisy=noisy)
BENCHES["noisy"] = "noisy:noisy"
sys.argv = ["flywheel", "bench", "noisy", "--json"]
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert json.loads(done.stdout) == {"bench": "noisy", "bars": {}}
    assert {"from a library", "from a process"} <= set(done.stderr.splitlines())
