"""A checkout to turn the wheel in: the project's shape, with stages that are tiny scripts."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from flywheel.schema import BUNDLE_FILES

STAGE_SCRIPT = '''
"""Stands in for the stages: data flow and files are theirs, what is computed is not."""
import hashlib, json, os, pathlib, signal, sys, time
from greeting import GREETING

stage, policy = sys.argv[1:]
data = pathlib.Path("data")
with open(os.environ["TEST_LOG"], "a") as log:
    log.write(stage + "\\n")
if os.environ.get("TEST_HANG") == stage:
    def ended(*_):
        pathlib.Path(os.environ["TEST_LOG"] + ".term").write_text(str(os.getpid()))
        sys.exit(1)
    signal.signal(signal.SIGTERM, ended)
    pathlib.Path(os.environ["TEST_LOG"] + ".up").write_text(str(os.getpid()))
    time.sleep(60)
if os.environ.get("TEST_FAIL") == stage:
    sys.exit(3)

def write(path, text):
    path = data / path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)

def digest(directory):
    names = ("policy.onnx", "tokenizer.json", "policy.json")
    hashes = (hashlib.sha256((directory / n).read_bytes()).hexdigest() for n in names)
    return hashlib.sha256("".join(f"{n} {h}\\n" for n, h in zip(names, hashes)).encode()).hexdigest()

if stage == "curate":
    found = sorted(p.name for p in (data / "episodes").iterdir())
    write("curated/dataset/episodes.json", json.dumps(found))
    write("curated/curate.json", json.dumps({"taken": len(found)}))
elif stage == "label":
    write("labels/labels.parquet", GREETING)
    write("labels/label.json", json.dumps({"labels": len(GREETING)}))
elif stage == "replay":
    write("replay/frames", GREETING)
elif stage == "train":
    before = pathlib.Path(policy, "weights").read_text()
    old = "".join("~" + p.read_text() for p in sorted(data.glob("earlier/*/episodes.json")))
    write("checkpoint/weights", before + "+" + (data / "curated/dataset/episodes.json").read_text() + old)
    write("metrics/train.json", json.dumps({"loss": 0.5}))
elif stage == "export":
    for name in ("policy.onnx", "tokenizer.json", "policy.json"):
        write("bundle/" + name, name + (data / "checkpoint/weights").read_text())
elif stage == "gate":
    report = {
        "schema_version": 1, "candidate_digest": digest(data / "bundle"), "verdict": "promote",
        "current_digest": digest(pathlib.Path(policy, "bundle")), "reasons": [],
        "checks": [{"name": "lift", "verdict": "promote", "value": 0.5, "bar": "> 0"}],
    }
    write("gate/gate.json", json.dumps(report))
'''

OUTS = {
    "curate": ("data/curated/dataset", "data/curated/curate.json", ("data/episodes",)),
    "label": (
        "data/labels/labels.parquet",
        "data/labels/label.json",
        ("data/curated/dataset", "greeting.py"),
    ),
    "replay": ("data/replay", "", ("greeting.py",)),
    "train": (
        "data/checkpoint",
        "data/metrics/train.json",
        ("data/curated/dataset", "data/earlier", "${turn.policy}"),
    ),
    "export": ("data/bundle", "", ("data/checkpoint",)),
    "gate": ("", "data/gate/gate.json", ("data/bundle", "${turn.policy}/bundle")),
}


PARAMS = """\
# kept
train:
  steps: 10
trigger:
  min_episodes: 2
  poll_s: 1.0
rollout:
  look_s: 1.0
turn:
  policy: models/base
"""


def git(root: Path, *args: str) -> str:
    """Run git there; what it printed."""
    done = subprocess.run(["git", *args], cwd=root, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def stages_yaml() -> str:
    """Its dvc.yaml."""
    text = "stages:\n"
    for stage, (out, figures, deps) in OUTS.items():
        text += f"  {stage}:\n    cmd: {sys.executable} stage.py {stage} ${{turn.policy}}\n    deps:\n"
        text += "".join(f"      - {d}\n" for d in deps)
        text += f"    outs:\n      - {out}\n" if out else ""
        text += f"    metrics:\n      - {figures}:\n          cache: false\n" if figures else ""
    return text


def make_checkout(root: Path, params: str = PARAMS) -> Path:
    """Committed, with this project's DVC settings. Its scripts need TEST_LOG in the environment.

    They are those of the checkout that this code belongs to.
    """
    bundle = root / "models" / "base" / "bundle"
    bundle.mkdir(parents=True)
    for name in BUNDLE_FILES:
        (bundle / name).write_text(f"base {name}")
    (bundle.parent / "weights").write_text("base")
    (root / "flywheel").mkdir()
    (root / "flywheel" / "config.py").touch()  # what makes it a checkout of this project
    (root / "stage.py").write_text(STAGE_SCRIPT)
    (root / "greeting.py").write_text("GREETING = 'committed'\n")
    (root / "params.yaml").write_text(params)
    (root / "dvc.yaml").write_text(stages_yaml())
    here = Path(__file__).resolve().parents[2]
    shutil.copytree(
        here / ".dvc", root / ".dvc", ignore=shutil.ignore_patterns("tmp", "cache", "config.local")
    )
    shutil.copy(here / ".dvcignore", root)
    (root / "data").mkdir()
    shutil.copy(here / "data" / ".gitignore", root / "data")
    shutil.copytree(here / "data" / "earlier", root / "data" / "earlier")
    git(root, "init", "--quiet", "--initial-branch=main")
    git(root, "add", "--all")
    git(root, "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "--quiet", "-m", "one")
    return root
