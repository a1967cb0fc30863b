"""The state of a checkout that a turn takes along, and processes that end when they are told to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flywheel import workspace
from flywheel.config import Deployment
from flywheel.errors import ConfigError, StageError
from flywheel.workspace import Workspace, snapshot, source_checkout, supervise


def git(root: Path, *args: str) -> str:
    done = subprocess.run(["git", *args], cwd=root, check=True, capture_output=True, text=True)
    return done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    (root / "flywheel").mkdir(parents=True)
    (root / ".dvc").mkdir()
    for name in ("flywheel/config.py", "params.yaml", ".dvc/config", "kept", "edited", "gone", "tool.sh"):
        (root / name).write_text(f"{name}\n")
    (root / ".gitignore").write_text("/ignored\n")
    git(root, "init", "--quiet")
    git(root, "add", "--all")
    git(root, "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "--quiet", "-m", "one")
    return root


def files(root: Path) -> dict[str, tuple[bytes, bool]]:
    """Content and executable bit of everything but git's own."""
    return {
        str(p.relative_to(root)): (p.read_bytes(), os.access(p, os.X_OK))
        for p in root.rglob("*")
        if p.is_file() and ".git" not in p.parts
    }


def test_a_workspace_has_the_checkouts_uncommitted_state_and_leaves_the_checkout_alone(
    checkout: Path, tmp_path: Path
) -> None:
    (checkout / "edited").write_text("otherwise, and with no newline at the end")
    (checkout / "gone").unlink()
    (checkout / "new dir").mkdir()
    (checkout / "new dir" / "wéights.bin").write_bytes(bytes(range(256)) * 40)
    (checkout / "tool.sh").chmod(0o755)
    (checkout / "staged").write_text("staged\n")
    git(checkout, "add", "staged")
    (checkout / "ignored").write_text("secret")
    before = git(checkout, "status", "--porcelain"), git(checkout, "count-objects")

    source = snapshot(checkout)
    deployment = Deployment(
        home=tmp_path / "home", store_url="s3://b", endpoint=None, embedded=False, site="s", robot="r"
    )
    workspace = Workspace("turn-a", deployment)
    with workspace.lock():
        assert workspace.clone(checkout, source)
        assert not workspace.clone(checkout, source)

    assert (git(checkout, "status", "--porcelain"), git(checkout, "count-objects")) == before
    found, wanted = files(workspace.root), files(checkout)
    config = found.pop(".dvc/config.local")[0].decode()
    wanted.pop("ignored")
    assert found == wanted
    assert "url = s3://b/dvc" in config
    assert workspace.git("rev-parse", "HEAD") == source.commit
    assert snapshot(workspace.root).commit == source.commit


def test_a_clean_checkout_has_no_patch(checkout: Path) -> None:
    assert snapshot(checkout).patch == b""


def test_a_file_that_goes_away_while_it_is_looked_at_does_not_end_the_turn(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A developer's `dvc exp run` writes and removes files there, and git takes that for an error."""
    (checkout / "new.py").write_text("new")
    (checkout / "gone.py").write_text("gone")
    git, failures, pauses = workspace._git, 3, list[float]()

    def meanwhile(root: Path, *args: str, **options: Any) -> Any:
        nonlocal failures
        done = git(root, *args, **options)
        if args[0] == "ls-files":
            (checkout / "gone.py").unlink()
        if args[0] == "add" and failures:
            failures -= 1
            raise StageError("git add: fatal: unable to stat 'gone.py': No such file or directory")
        return done

    monkeypatch.setattr("flywheel.workspace._git", meanwhile)
    monkeypatch.setattr("flywheel.workspace.time.sleep", pauses.append)
    found = snapshot(checkout)
    assert len(pauses) == 3
    assert b"new.py" in found.patch
    assert b"gone.py" not in found.patch
    failures = 1000
    (checkout / "gone.py").write_text("gone")
    with pytest.raises(StageError, match="unable to stat"):
        snapshot(checkout)


def test_variables_of_a_git_hook_do_not_lead_to_another_repository(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    monkeypatch.setenv("GIT_INDEX_FILE", "/nowhere/index")
    assert len(snapshot(checkout).commit) == 40


def test_a_checkout_inside_of_another_repository_is_refused(checkout: Path) -> None:
    with pytest.raises(ConfigError, match="repository of its own"):
        snapshot(checkout / "flywheel")


def test_the_checkout_is_the_one_that_is_named(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert source_checkout({"FLYWHEEL_CHECKOUT": str(checkout)}) == checkout
    monkeypatch.chdir(checkout / "flywheel")
    assert source_checkout({}) == checkout
    with pytest.raises(ConfigError, match="FLYWHEEL_CHECKOUT"):
        source_checkout({"FLYWHEEL_CHECKOUT": "/"})


def test_a_commit_that_the_machine_lacks_is_named_and_leaves_no_workspace(
    checkout: Path, tmp_path: Path
) -> None:
    deployment = Deployment(
        home=tmp_path / "home", store_url="s3://b", endpoint=None, embedded=False, site="s", robot="r"
    )
    source = snapshot(checkout)
    workspace = Workspace("turn-a", deployment)
    with pytest.raises(StageError, match="0000000"):
        workspace.clone(checkout, type(source)("0" * 40, b""))
    assert list((tmp_path / "home" / "runs").iterdir()) == []


# ── processes ────────────────────────────────────────────────────────────────────────────────────────


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def signalled_once(ready: Path, *signals: int) -> Callable[[], None]:
    """Sends this process the signals once the child says that it is there."""

    def run() -> None:
        while not ready.exists() or not ready.read_text().endswith("\n"):
            time.sleep(0.01)
        for s in signals:
            os.kill(os.getpid(), s)

    return run


# What DVC does: it starts a stage as a child and does not pass signals on.
PARENT = """
import pathlib, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[2], sys.argv[1]])
sys.exit(child.wait())
"""
OBEDIENT = """
import os, pathlib, signal, sys, time
def ended(*_):
    pathlib.Path(sys.argv[1] + ".saved").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, ended)
pathlib.Path(sys.argv[1]).write_text(f"{os.getpid()}\\n")
time.sleep(60)
"""
STUBBORN = OBEDIENT.replace("ended)", "signal.SIG_IGN)")


@pytest.mark.parametrize("signals", [(signal.SIGTERM,), (signal.SIGTERM, signal.SIGTERM), (signal.SIGINT,)])
def test_a_signal_reaches_the_grandchild_which_may_save_before_it_ends(
    signals: tuple[int, ...], tmp_path: Path
) -> None:
    ready = tmp_path / "ready"
    sender = threading.Thread(target=signalled_once(ready, *signals))
    sender.start()
    command = [sys.executable, "-c", PARENT, str(ready), OBEDIENT]
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    assert supervise(command, tmp_path, os.environ) == 128 + signals[0]
    sender.join()
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert Path(f"{ready}.saved").exists()
    assert not alive(int(ready.read_text()))


def test_what_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    sender = threading.Thread(target=signalled_once(ready, signal.SIGTERM))
    sender.start()
    command = [sys.executable, "-c", PARENT, str(ready), STUBBORN]
    assert supervise(command, tmp_path, os.environ, grace_s=0.5) == 128 + signal.SIGTERM
    sender.join()
    assert not alive(int(ready.read_text()))


@pytest.mark.parametrize(("code", "expected"), [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", 137)])
def test_an_exit_code_is_passed_on(code: str, expected: int, tmp_path: Path) -> None:
    assert supervise(["sh", "-c", code], tmp_path, os.environ) == expected


def test_what_a_killed_run_left_behind_is_ended_before_the_next(tmp_path: Path) -> None:
    deployment = Deployment(
        home=tmp_path, store_url="s3://b", endpoint=None, embedded=False, site="s", robot="r"
    )
    workspace = Workspace("turn-left", deployment)
    elsewhere = deployment.model_copy(update={"home": tmp_path / "elsewhere"})

    def running(env: dict[str, str]) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", "import time; time.sleep(60)"]
        return subprocess.Popen(command, env=env, start_new_session=True)

    leftover = running(workspace.environment())
    with running(Workspace("turn-left", elsewhere).environment()) as others:
        with workspace.lock(), pytest.raises(StageError, match="another process"), workspace.lock():
            pass
        assert leftover.wait(10) == -signal.SIGTERM
        assert others.poll() is None, "a turn of that name of another deployment was ended"
        others.kill()
