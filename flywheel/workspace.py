"""A turn's own clone of the checkout, and the git and DVC commands that run in it.

One workspace per turn, because two DVC runs in one workspace break each other; they share DVC's cache, so
equal data are stored once. A workspace is disposable: everything in it comes from the checkout (commit and
patch) and from the store (episodes, stage outputs), so any machine can make it again.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import flywheel
from flywheel.config import Deployment, checkout
from flywheel.errors import ConfigError, StageError
from flywheel.services.process import end_marked
from flywheel.store import embedded_store

PATCH_MAX_BYTES = 64 << 20  # uncommitted state that a turn takes along
SNAPSHOT_ATTEMPTS, SNAPSHOT_PAUSE_S = 20, 0.25  # of a checkout in which somebody works
STOP_GRACE_S = 20.0  # from SIGTERM to SIGKILL: a training writes its checkpoint meanwhile
TURN_VARIABLE = "FLYWHEEL_TURN"  # marks every process of a turn, so that leftovers are found


@dataclass(frozen=True, slots=True)
class Source:
    """The state of a checkout: a commit, and what the working tree has beyond it (a binary git patch)."""

    commit: str
    patch: bytes


def source_checkout(environ: Mapping[str, str] | None = None) -> Path:
    """The checkout that turns are cloned from: FLYWHEEL_CHECKOUT, else the working directory's or our own."""
    env = os.environ if environ is None else environ
    if given := env.get("FLYWHEEL_CHECKOUT"):
        found = checkout(Path(given).absolute())
        if found is None:
            raise ConfigError(f"FLYWHEEL_CHECKOUT={given}: no checkout of flywheel; it has no params.yaml")
        return found
    package = Path(flywheel.__file__).parent
    found = checkout(Path.cwd()) or checkout(package)
    if found is None:
        raise ConfigError(
            f"no checkout at {Path.cwd()} nor {package}: a turn is a DVC experiment in a checkout; set "
            "FLYWHEEL_CHECKOUT to one"
        )
    return found


def snapshot(root: Path) -> Source:
    """The checkout's HEAD and its uncommitted changes, new files included, ignored ones not.

    The checkout itself (index, object database, stash) is left as it is.
    """
    needs = f"but a turn is a DVC experiment on a commit; run in {root}: git init && git add -A && git commit"
    if _git(root, "rev-parse", "--git-dir", check=False).returncode != 0:
        raise ConfigError(f"{root} is no git repository, {needs}")
    head = _git(root, "rev-parse", "--verify", "--quiet", "HEAD^{commit}", check=False)
    if head.returncode != 0:
        raise ConfigError(f"{root} has no commit yet, {needs}")
    top = Path(_text(_git(root, "rev-parse", "--show-toplevel")))
    if not top.samefile(root):
        raise ConfigError(f"{root} lies inside of the repository {top}; a turn needs a repository of its own")
    commit = _text(head)
    _refuse_bulk(root)
    objects = _text(_git(root, "rev-parse", "--path-format=absolute", "--git-path", "objects"))
    with tempfile.TemporaryDirectory(prefix="flywheel-snapshot-") as tmp:
        (Path(tmp) / "objects").mkdir()
        aside = {
            "GIT_INDEX_FILE": f"{tmp}/index",
            "GIT_OBJECT_DIRECTORY": f"{tmp}/objects",
            "GIT_ALTERNATE_OBJECT_DIRECTORIES": objects,
        }
        _git(root, "read-tree", commit, env=aside)
        _add_all(root, aside)
        diff = _git(root, "diff", "--cached", "--binary", "--full-index", "--no-ext-diff", commit, env=aside)
    return Source(commit, diff.stdout)


def _add_all(root: Path, env: Mapping[str, str]) -> None:
    """Take what lies there, also while somebody works in it: an editor, a developer's ``dvc exp run``."""
    for attempt in range(SNAPSHOT_ATTEMPTS):
        try:
            _git(root, "add", "--all", env=env)
        except StageError:
            # A file went away or grew while git looked at it, which git takes for an error.
            if attempt == SNAPSHOT_ATTEMPTS - 1:
                raise
            time.sleep(SNAPSHOT_PAUSE_S)
        else:
            return


def _refuse_bulk(root: Path) -> None:
    listed = _git(root, "ls-files", "-z", "--modified", "--others", "--exclude-standard").stdout
    sizes: dict[str, int] = {}
    for name in filter(None, listed.decode(errors="surrogateescape").split("\0")):
        try:
            found = (root / name).lstat()
        except FileNotFoundError:
            continue  # it went away since it was listed
        if stat.S_ISREG(found.st_mode):
            sizes[name] = found.st_size
    if (total := sum(sizes.values())) > PATCH_MAX_BYTES:
        largest = max(sizes, key=lambda n: sizes[n])
        raise ConfigError(
            f"{root} has {total >> 20} MiB of uncommitted files, {largest} the largest; a turn takes at most "
            f"{PATCH_MAX_BYTES >> 20} MiB along: commit them, or name them in .gitignore"
        )


class Workspace:
    """The clone of one turn at ``<home>/runs/<turn>``."""

    def __init__(self, turn: str, deployment: Deployment) -> None:
        self.turn = turn
        self.deployment = deployment
        self.root = deployment.home / "runs" / turn

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the turn's workspace; ``StageError`` if another process of this machine does.

        What an earlier holder left running (it was killed) is ended first.
        """
        self.root.parent.mkdir(parents=True, exist_ok=True)
        with (self.root.parent / f".{self.turn}.lock").open("w") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StageError(
                    f"{self.turn}: another process works on this turn; wait for it, or end it first"
                ) from None
            end_marked(str(self.root), STOP_GRACE_S, TURN_VARIABLE)
            # Nobody else can be using them now: DVC's own locks in here are leftovers of the dead.
            for name in ("rwlock", "rwlock.lock", "lock"):
                (self.root / ".dvc" / "tmp" / name).unlink(missing_ok=True)
            yield

    def clone(self, origin: Path, source: Source) -> bool:
        """Make the clone unless it is there; True if it was made. It appears whole or not at all."""
        if self.root.exists():
            return False
        temp = self.root.with_name(f".{self.turn}.partial")
        shutil.rmtree(temp, ignore_errors=True)
        _git(origin, "clone", "--quiet", "--no-checkout", str(origin), str(temp))
        found = _git(temp, "checkout", "--quiet", "--detach", source.commit, check=False)
        if found.returncode != 0:
            shutil.rmtree(temp)
            raise StageError(
                f"{origin} lacks commit {source.commit[:12]}, on which {self.turn} was opened: git fetch it"
            )
        if source.patch:
            _git(temp, "apply", "--index", "--whitespace=nowarn", "-", stdin=source.patch)
        for key, value in (("user.name", "flywheel"), ("user.email", "flywheel@localhost")):
            _git(temp, "config", key, value)
        self._configure(temp)
        temp.rename(self.root)
        return True

    def _configure(self, root: Path) -> None:
        """``.dvc/config.local``: this machine's cache and this deployment's store. It holds no secret."""
        if not (root / ".dvc" / "config").is_file():
            raise ConfigError(f"{root}: the commit has no .dvc/config; run `dvc init` and commit it")
        url, endpoint, _ = _remote(self.deployment)
        lines = [
            "[core]",
            "    remote = turns",
            "    analytics = false",
            "    check_update = false",
            "    autostage = true",
            "[cache]",
            f"    dir = {self.deployment.home / 'dvc' / 'cache'}",
            '    type = "reflink,hardlink,symlink,copy"',
            "['remote \"turns\"']",
            f"    url = {url}/dvc",
        ]
        if endpoint:
            lines.append(f"    endpointurl = {endpoint}")
        (root / ".dvc" / "config.local").write_text("\n".join(lines) + "\n")

    def dvc(self, *args: str) -> str:
        """Run a short DVC command in the workspace; its output. ``StageError`` holds its last words."""
        done = subprocess.run(
            [sys.executable, "-m", "dvc", *args],
            cwd=self.root,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            words = " ".join(line for line in done.stdout.splitlines() if line.strip())[-600:]
            raise StageError(f"{self.turn}: dvc {args[0]} failed: {words}")
        return done.stdout

    def locked_stages(self) -> dict[str, Any]:
        """The stages of dvc.lock: finished ones, with the hashes of what they read and made."""
        try:
            text = (self.root / "dvc.lock").read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        return dict(yaml.safe_load(text).get("stages") or {})

    def figures(self) -> list[str]:
        """Metrics and plots that exist: the outputs that dvc.yaml marks ``cache: false``."""
        stages = yaml.safe_load((self.root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
        outs = (o for s in stages.values() for kind in ("metrics", "plots", "outs") for o in s.get(kind, ()))
        flags = {path: f for o in outs if isinstance(o, dict) for path, f in o.items()}
        return sorted(p for p, f in flags.items() if not f.get("cache", True) and (self.root / p).is_file())

    def git(self, *args: str) -> str:
        """Run git in the workspace; its output without the newline at the end."""
        return _text(_git(self.root, *args))

    def forward(self, ref: str) -> None:
        """Push a ref of the checkout on to the remote that the deployment names, if it names one."""
        if remote := self.deployment.git_remote:
            checkout = Path(self.git("remote", "get-url", "origin"))
            _git(checkout, "push", "--quiet", "--force", remote, f"{ref}:{ref}")

    def run(self, *args: str) -> int:
        """Run a long DVC command; its exit code.

        Its output goes to this process's own. SIGTERM and SIGINT reach every process that it started;
        then they have ``STOP_GRACE_S`` to end, and the code is 128 + the signal.
        """
        command = [sys.executable, "-m", "dvc", *args]
        return supervise(command, cwd=self.root, env=self.environment())

    def environment(self) -> dict[str, str]:
        """The environment of everything that runs in the workspace: its own code, the store, no hub."""
        env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
        env |= _remote(self.deployment)[2]
        path = [str(Path(sys.executable).parent), env.get("PATH", os.defpath)]
        python_path = [str(self.root), env.get("PYTHONPATH", "")]
        return env | {
            TURN_VARIABLE: str(self.root),  # its name alone may be another deployment's too
            "PATH": os.pathsep.join(path),
            # The workspace's code, not the checkout's, which may change while the turn runs.
            "PYTHONPATH": os.pathsep.join(filter(None, python_path)),
            "PYTHONUNBUFFERED": "1",
            "FLYWHEEL_HOME": str(self.deployment.home),
            "DVC_SITE_CACHE_DIR": str(self.deployment.home / "dvc" / "site"),
            "DVC_NO_ANALYTICS": "1",
            "DVC_STUDIO_OFFLINE": "1",
        }


def supervise(
    command: Sequence[str], cwd: Path, env: Mapping[str, str], grace_s: float = STOP_GRACE_S
) -> int:
    """Run a command in a process group of its own; see ``Workspace.run``. Only from a main thread."""
    received: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def stop() -> None:
        # The group, not the child alone: DVC does not pass signals on to the stage that it runs.
        if child is not None and _kill_group(child.pid, signal.SIGTERM):
            last_resort.start()

    def on_signal(signum: int, _frame: object) -> None:
        received.append(signum)
        if len(received) == 1:  # repeats come from several who watch over us; they must not cut the grace
            stop()

    last_resort = threading.Timer(grace_s, lambda: child and _kill_group(child.pid, signal.SIGKILL))
    last_resort.daemon = True
    before = {s: signal.signal(s, on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        child = subprocess.Popen(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, start_new_session=True)
        if received and not last_resort.is_alive():
            stop()  # the signal came while the child was being started
        code = child.wait()
        deadline = time.monotonic() + grace_s + 1.0
        while received and _kill_group(child.pid, 0) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        last_resort.cancel()
        for s, handler in before.items():
            signal.signal(s, handler)
    if received:
        return 128 + received[0]
    return code if code >= 0 else 128 - code


def _kill_group(group: int, signum: int) -> bool:
    """Signal a process group; False if it has no process any more."""
    try:
        os.killpg(group, signum)
    except ProcessLookupError:
        return False
    return True


def _remote(deployment: Deployment) -> tuple[str, str | None, dict[str, str]]:
    """Url, endpoint and environment by which DVC reaches the store; keys go by the environment alone."""
    url, endpoint, env = deployment.store_url.rstrip("/"), deployment.endpoint, dict[str, str]()
    if deployment.embedded and (embedded := embedded_store(deployment.home)) is not None:
        url, endpoint = f"s3://{embedded.bucket}", embedded.endpoint
        env = {
            "AWS_ENDPOINT_URL": embedded.endpoint,
            "AWS_ACCESS_KEY_ID": embedded.access_key,
            "AWS_SECRET_ACCESS_KEY": embedded.secret_key,
            "AWS_DEFAULT_REGION": embedded.region,
        }
    # Servers other than AWS rarely do trailing checksums.
    when = "when_required"
    env |= {"AWS_REQUEST_CHECKSUM_CALCULATION": when, "AWS_RESPONSE_CHECKSUM_VALIDATION": when}
    return url, endpoint, env


def _git(
    root: Path,
    *args: str,
    env: Mapping[str, str] | None = None,
    stdin: bytes | None = None,
    check: bool = True,
) -> subprocess.CompletedProcess[bytes]:
    # A hook or an editor that runs us may have set GIT_DIR and its like for its own repository.
    clean = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {"GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(
            ["git", *args],
            cwd=root,
            env=clean | dict(env or {}),
            input=stdin,
            capture_output=True,
            check=False,
        )
    except FileNotFoundError:
        raise ConfigError("git is not installed; a turn needs it (Debian: apt-get install git)") from None
    if check and done.returncode != 0:
        words = done.stderr.decode(errors="replace").strip().replace("\n", " ")[-400:]
        raise StageError(f"git {args[0]} in {root}: {words}")
    return done


def _text(done: subprocess.CompletedProcess[bytes]) -> str:
    return done.stdout.decode(errors="surrogateescape").strip()
