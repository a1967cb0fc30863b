"""A turn of the wheel: claimed failures in, a DVC experiment and a candidate policy out.

    open_turn     claim the inbox; fix source, settings and starting policy in ``runs/<turn>/turn.json``
    start_from    take another policy to start from, where the fleet has another one by then
    run_stage     one stage of dvc.yaml in the turn's workspace: curate, label, train, export, gate
    close_turn    save the experiment, put dataset, bundle, gate report and checkpoint into the store

Each may be called again after any crash, and by another machine: what a turn is, lies in the store, and the
workspace is made anew from there where it is missing. Tasks pass a turn's name and nothing else.

    claimed/<turn>/claims.json      its episodes
    runs/<turn>/turn.json           TurnRecord, written by open_turn, and anew by start_from
    runs/<turn>/source.patch        what the checkout had beyond its commit
    runs/<turn>/answers/<sha256>    what people had said of labels by then
    runs/<turn>/workspace/…         dvc.lock and metrics after the last finished stage
    runs/<turn>/result.json         TurnResult, written last
"""

from __future__ import annotations

import hashlib
import re
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml

from flywheel import episode, lineage, policies
from flywheel.claims import Claim, Claims, claim, claims_of
from flywheel.config import PARAMS_FILE, Deployment, Settings
from flywheel.dataset.earlier import Earlier
from flywheel.errors import (
    BundleError,
    ConfigError,
    Conflict,
    EpisodeError,
    IntegrityError,
    NotFound,
    StageError,
)
from flywheel.label import Questions, answers
from flywheel.schema import (
    GateReport,
    Strict,
    Verdict,
    sha256_bytes,
)
from flywheel.store import Store
from flywheel.workspace import Source, Workspace, snapshot, source_checkout

STAGES = ("curate", "label", "replay", "train", "export", "gate")
COLLECTED, TRAINED = STAGES[:3], STAGES[:5]  # what has finished when a policy is trained, and judged
BASE_POLICY = "models/base"
CURRENT_POLICY = "data/current"  # a later policy than the base, fetched for a turn
EARLIER_DATA = "data/earlier"  # what the turns that led to it were trained on; in the checkout, nothing
RECORD = "data/turn.json"
CLAIMS = "data/claims.json"
ANSWERS = "data/answers.json"  # what people have said of labels; in the checkout, nothing
QUEUE = "data/labels/queue.json"
DATASET = "data/curated/dataset"
BUNDLE = "data/bundle"
CHECKPOINT = "data/checkpoint"
GATE_REPORT = "data/gate/gate.json"
TURN = re.compile(r"turn-[a-z0-9-]{1,80}")
# What one turn may set differently. Never the gate or the rollout: nobody may lower a bar by a form.
ADJUSTABLE = ("curate", "label", "train", "export")
_FILLED = ".git/flywheel-filled"


class TurnRecord(Strict):
    """``runs/<turn>/turn.json``: all that a turn starts from."""

    schema_version: Literal[1] = 1
    turn: str
    opened_unix_ns: int
    commit: str
    patch_sha256: str = ""  # "" if the checkout was clean
    policy: str = BASE_POLICY  # in the workspace: a checkpoint, its bundle inside
    current_digest: str  # of that bundle: what the candidate is compared with
    adjusted: Mapping[str, Any] = {}  # settings of this turn alone, "section.key": value
    episodes: int
    answers_sha256: str = ""  # of what people had said of labels; "" for a turn of an older version
    opened_digest: str = ""  # of the bundle that the fleet ran when it was opened, where that is another


class TurnResult(Strict):
    """``runs/<turn>/result.json``: what came of a turn. Without ``ok`` only what was reached."""

    schema_version: Literal[1] = 1
    turn: str
    ok: bool
    stages: tuple[str, ...]  # finished ones
    commit: str
    experiment: str = ""  # commit of the DVC experiment, which has the turn's name
    dataset: str = ""  # DVC's name for its content
    current_digest: str = ""
    candidate_digest: str = ""
    gate_digest: str = ""
    verdict: Verdict | None = None
    reasons: tuple[str, ...] = ()

    @property
    def promotes(self) -> bool:
        """Whether a rollout may start."""
        return self.ok and self.verdict is Verdict.PROMOTE


def turn_name(run_id: str, when: datetime) -> str:
    """The turn of an Airflow run: the same for every attempt, readable, fit for git and for keys."""
    return f"turn-{when:%Y%m%d-%H%M%S}-{hashlib.sha256(run_id.encode()).hexdigest()[:6]}"


def open_turn(
    turn: str,
    *,
    current_digest: str = "",
    adjust: Mapping[str, Any] | None = None,
    force: bool = False,
    store: Store | None = None,
    deployment: Deployment | None = None,
) -> TurnRecord | None:
    """Claim waiting failures and make the workspace; None (and nothing done) if too few wait.

    ``current_digest`` is the bundle that the fleet runs, "" for the base policy. ``force`` takes whatever
    waits, as long as anything does. ``adjust`` sets training settings for this turn, such as
    ``{"train.steps": 1200}``. Raises ``ConfigError`` for a checkout without git or a bad setting, before
    anything is claimed.
    """
    _check_name(turn)
    deployment = deployment or Deployment.from_env()
    store = store or Store.from_env(deployment)
    origin = source_checkout()
    record = _find_record(store, turn) or _begin(turn, current_digest, adjust or {}, force, store, origin)
    if record is None:
        return None
    workspace = Workspace(turn, deployment)
    with workspace.lock():
        _fill(workspace, record, store, origin)
    return record


def _begin(
    turn: str, current_digest: str, adjust: Mapping[str, Any], force: bool, store: Store, origin: Path
) -> TurnRecord | None:
    settings = Settings.load(origin / PARAMS_FILE)
    text = adjusted((origin / PARAMS_FILE).read_text(encoding="utf-8"), adjust, BASE_POLICY)
    source = snapshot(origin)
    # Both fail now rather than after the claim.
    policy, current_digest = _policy(current_digest, store, origin)
    _ancestors(store, current_digest, text, origin)
    said = answers.collect(store).to_bytes()
    claims = claim(
        store,
        turn,
        settings.curate.max_episodes,
        enough=lambda waiting: force or waiting.due(settings.trigger),
    )
    if not claims.episodes:
        return None
    if source.patch:
        store.put(_key(turn, "source.patch"), source.patch)
    store.put(_key(turn, f"answers/{sha256_bytes(said)}.json"), said)
    record = TurnRecord(
        turn=turn,
        opened_unix_ns=time.time_ns(),
        commit=source.commit,
        patch_sha256=sha256_bytes(source.patch) if source.patch else "",
        policy=policy,
        current_digest=current_digest,
        adjusted=dict(adjust),
        episodes=len(claims.episodes),
        answers_sha256=sha256_bytes(said),
    )
    try:
        store.create(_key(turn, "turn.json"), record.to_bytes())
    except Conflict:
        return store.get_json(_key(turn, "turn.json"), TurnRecord)
    return record


def _policy(digest: str, store: Store, origin: Path) -> tuple[str, str]:
    """Where a turn has the policy of a bundle, "" for the base policy, and the bundle's digest."""
    base = policies.digest_of(origin / BASE_POLICY / "bundle")
    if digest in ("", base):
        return BASE_POLICY, base
    policies.record(store, digest)
    return CURRENT_POLICY, digest


def start_from(
    turn: str,
    current_digest: str,
    *,
    store: Store | None = None,
    deployment: Deployment | None = None,
) -> TurnRecord:
    """Train and judge against the policy that the fleet runs now, ``current_digest`` ("": the base policy).

    It is another one than at the opening where a turn ahead was released meanwhile. What was curated and
    labelled stays as it is; what was trained from the other policy counts as unfinished. A repeat changes
    nothing. Raises ``StageError`` for a turn that is not there, not collected yet, or closed on another one.
    """
    require(turn, COLLECTED, store=store, deployment=deployment)
    deployment = deployment or Deployment.from_env()
    store = store or Store.from_env(deployment)
    origin, record = source_checkout(), _record(store, turn)
    policy, current_digest = _policy(current_digest, store, origin)
    if current_digest != record.current_digest:
        closed = _find_result(store, turn)
        if closed is not None and closed.ok:
            raise StageError(
                f"{turn}: was closed ({closed.verdict}) on policy {record.current_digest[:12]}, and the "
                f"fleet runs {current_digest[:12]}: what fails now starts a turn of its own"
            )
        record = record.model_copy(
            update={
                "policy": policy,
                "current_digest": current_digest,
                "opened_digest": record.opened_digest or record.current_digest,
            }
        )
        store.put(_key(turn, "turn.json"), record.to_bytes())
    workspace = Workspace(turn, deployment)
    with workspace.lock():
        _fill(workspace, record, store, origin)
    return record


def require(
    turn: str,
    stages: tuple[str, ...],
    *,
    store: Store | None = None,
    deployment: Deployment | None = None,
) -> None:
    """``StageError`` unless the turn is there and these of its stages have finished, here or by the store."""
    _check_name(turn)
    deployment = deployment or Deployment.from_env()
    store = store or Store.from_env(deployment)
    _record(store, turn)
    done = set(_finished(Workspace(turn, deployment)))
    if not done.issuperset(stages):
        with suppress(NotFound):
            done |= set(yaml.safe_load(store.get(_key(turn, "workspace/dvc.lock"))).get("stages") or {})
    if missing := [s for s in stages if s not in done]:
        raise StageError(f"{turn}: {missing[0]} has not finished; clear its task, and the turn goes on")


def made(turn: str, deployment: Deployment | None = None) -> dict[str, str]:
    """What the turn's workspace has so far: DVC's name for the dataset's content, the candidate's digest."""
    workspace = Workspace(turn, deployment or Deployment.from_env())
    bundle = workspace.root / BUNDLE
    found = {"dataset": _dataset(workspace)}
    return found | {"digest": policies.digest_of(bundle)} if bundle.is_dir() else found


def run_stage(
    turn: str,
    stage: str,
    *,
    store: Store | None = None,
    deployment: Deployment | None = None,
    hand_over: bool | None = None,
) -> int:
    """Run one stage in the turn's workspace; its exit code, 0 also for a stage that is finished already.

    Its output is this process's. SIGTERM reaches the stage (then 143). Call it from a main thread.
    ``hand_over`` puts its outputs into the store, so that the next stage can run on another machine; the
    default is to do so unless the store is one that no other machine reaches (a push costs 2 s of CPU, and
    ``close_turn`` does it in any case).
    """
    _check_name(turn)
    if stage not in STAGES:
        raise StageError(f"stage {stage!r}: must be one of {', '.join(STAGES)}")
    deployment = deployment or Deployment.from_env()
    store = store or Store.from_env(deployment)
    record = _record(store, turn)
    workspace = Workspace(turn, deployment)
    with workspace.lock():
        _fill(workspace, record, store, source_checkout())
        if code := workspace.run("repro", "--single-item", stage):
            return code
        if stage == "label" and (workspace.root / QUEUE).is_file():
            answers.ask(store, turn, Questions.model_validate_json((workspace.root / QUEUE).read_bytes()))
        if not _only_here(deployment) if hand_over is None else hand_over:
            workspace.dvc("push", stage)
            _put_state(workspace, store)
    return 0


def close_turn(
    turn: str, ok: bool = True, *, store: Store | None = None, deployment: Deployment | None = None
) -> TurnResult:
    """Save the turn as a DVC experiment of its name, list it in the checkout, and publish what it made.

    With ``ok`` false (a stage failed for good) the experiment holds the stages that were finished, and
    nothing is published; closing it again with ``ok`` goes on from there. Raises ``StageError`` if ``ok``
    and a stage is missing, or if the gate report is about other bundles than the turn's.
    """
    _check_name(turn)
    deployment = deployment or Deployment.from_env()
    store = store or Store.from_env(deployment)
    record = _record(store, turn)
    earlier = _find_result(store, turn)
    if earlier is not None and (earlier.ok or not ok):
        return earlier
    workspace = Workspace(turn, deployment)
    with workspace.lock():
        _fill(workspace, record, store, source_checkout())
        finished = _finished(workspace)
        if ok and (missing := [s for s in STAGES if s not in finished]):
            raise StageError(f"{turn}: cannot be closed: {missing[0]} has not finished")
        result = TurnResult(
            turn=turn,
            ok=ok,
            stages=finished,
            commit=record.commit,
            dataset=_dataset(workspace),
            current_digest=record.current_digest,
        )
        if ok:
            result = _publish(workspace, record, result, store)
        if finished:
            workspace.dvc("push", *finished)
            _put_state(workspace, store)
            result = result.model_copy(update={"experiment": _save_experiment(workspace, finished)})
    store.put(_key(turn, "result.json"), result.to_bytes())
    return result


def result_of(turn: str, store: Store | None = None) -> TurnResult:
    """What came of a turn; ``StageError`` if it has not been closed."""
    _check_name(turn)
    found = _find_result(store or Store.from_env(), turn)
    if found is None:
        raise StageError(f"{turn}: has no result yet; close it first")
    return found


def open_turns(store: Store) -> list[TurnRecord]:
    """Turns that were opened and have no result yet, in the order of their names."""
    files: dict[str, set[str]] = {}
    for info in store.list("runs/"):
        _, name, *rest = info.key.split("/")
        files.setdefault(name, set()).add("/".join(rest))
    unfinished = (n for n, found in files.items() if "turn.json" in found and "result.json" not in found)
    return [r for n in sorted(unfinished) if (r := _find_record(store, n)) is not None]


def unopened_turns(store: Store) -> dict[str, datetime]:
    """Turns that died between their claim and their record, and when they claimed.

    What they claimed is theirs for ever: only the same turn, opened again, goes on with it.
    """
    recorded = {i.key.split("/")[1] for i in store.list("runs/") if i.key.endswith("/turn.json")}
    claims = (i for i in store.list("claimed/") if i.key.endswith("/claims.json"))
    return {n: i.modified for i in claims if (n := i.key.split("/")[1]) not in recorded}


# ── the workspace's content ──────────────────────────────────────────────────────────────────────────


def _fill(workspace: Workspace, record: TurnRecord, store: Store, origin: Path) -> None:
    """Everything a stage needs, in an existing workspace or a new one."""
    turn, root = record.turn, workspace.root
    if (root / _FILLED).exists():
        if (root / RECORD).read_bytes() != record.to_bytes():
            _forget(workspace, COLLECTED)
            _start(workspace, record, store)
        return
    patch = store.get(_key(turn, "source.patch"), record.patch_sha256) if record.patch_sha256 else b""
    workspace.clone(origin, Source(record.commit, patch))
    # The checkout's own says what somebody finished there; this turn has finished nothing yet.
    (root / "dvc.lock").unlink(missing_ok=True)
    (root / "data").mkdir(exist_ok=True)
    claims = _pull_episodes(store, claims_of(store, turn), root / "data" / "episodes")
    (root / CLAIMS).write_bytes(claims.to_bytes())
    if record.answers_sha256:
        said = store.get(_key(turn, f"answers/{record.answers_sha256}.json"), record.answers_sha256)
        (root / ANSWERS).write_bytes(said)
    _start(workspace, record, store)
    if _get_state(workspace, store):
        workspace.dvc("pull", *_finished(workspace))
    (root / _FILLED).touch()


def _start(workspace: Workspace, record: TurnRecord, store: Store) -> None:
    """Settings and policy that the turn starts from, the record of them last: a repeat begins again."""
    root = workspace.root
    text = workspace.git("show", f":{PARAMS_FILE}")
    params = adjusted(f"{text}\n", record.adjusted, record.policy)
    (root / PARAMS_FILE).write_text(params, encoding="utf-8")
    lineage.fetch(store, _ancestors(store, record.current_digest, params, root), root / EARLIER_DATA)
    if record.policy == CURRENT_POLICY:
        policies.fetch(store, record.current_digest, root / CURRENT_POLICY)
    found = policies.digest_of(root / record.policy / "bundle")
    if found != record.current_digest:
        raise BundleError(
            f"{root / record.policy}: bundle {found[:12]}, but {record.turn} is to start from "
            f"{record.current_digest[:12]}"
        )
    (root / RECORD).write_bytes(record.to_bytes())


def _forget(workspace: Workspace, keep: tuple[str, ...]) -> None:
    """The other stages have not finished any more, and what they had made is of another policy."""
    shutil.rmtree(workspace.root / CURRENT_POLICY, ignore_errors=True)
    stages = workspace.locked_stages()
    for name in [s for s in stages if s not in keep]:
        for out in stages.pop(name).get("outs", ()):
            path = workspace.root / out["path"]
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    text = yaml.safe_dump({"schema": "2.0", "stages": stages}, sort_keys=False)
    (workspace.root / "dvc.lock").write_text(text, encoding="utf-8")


def _ancestors(store: Store, digest: str, params: str, root: Path) -> Earlier:
    """The turns that led to a policy, as many as the settings ``params`` (text) say."""
    settings = Settings.parse(params, PARAMS_FILE).train
    return lineage.ancestors(
        store, digest, settings.earlier_turns, policies.digest_of(root / BASE_POLICY / "bundle")
    )


def _pull_episodes(store: Store, claims: Claims, into: Path) -> Claims:
    """Download what was claimed. An episode that is damaged in the store is noted and left out.

    A store that is down raises: then the whole step is tried again.
    """

    def one(c: Claim) -> Claim:
        if c.problem:
            return c
        try:
            episode.pull(store, c.prefix, into)
        except (EpisodeError, IntegrityError, NotFound) as e:
            return c.model_copy(update={"problem": str(e)})
        return c

    into.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(8) as pool:
        return claims.model_copy(update={"episodes": tuple(pool.map(one, claims.episodes))})


def _put_state(workspace: Workspace, store: Store) -> None:
    """What DVC keeps in git rather than in its cache; dvc.lock last, because it says what is finished."""
    for name in (*workspace.figures(), "dvc.lock"):
        store.put(_key(workspace.turn, f"workspace/{name}"), workspace.root / name)


def _get_state(workspace: Workspace, store: Store) -> bool:
    """Restore what ``_put_state`` put; False if no stage has finished yet or the workspace has it already."""
    if (workspace.root / "dvc.lock").exists():
        return False
    prefix = _key(workspace.turn, "workspace/")
    for info in sorted(store.list(prefix), key=lambda i: i.key.endswith("/dvc.lock")):
        path = workspace.root / info.key.removeprefix(prefix)
        path.parent.mkdir(parents=True, exist_ok=True)
        store.get_file(info.key, path)
    return (workspace.root / "dvc.lock").exists()


def _only_here(deployment: Deployment) -> bool:
    host = urlsplit(deployment.endpoint or "").hostname or ""
    return deployment.embedded or host == "localhost" or host.startswith("127.")


def _finished(workspace: Workspace) -> tuple[str, ...]:
    locked = workspace.locked_stages()
    return tuple(s for s in STAGES if s in locked)


def _dataset(workspace: Workspace) -> str:
    outs = workspace.locked_stages().get("curate", {}).get("outs", [])
    return next((str(o["md5"]) for o in outs if o["path"] == DATASET), "")


def adjusted(text: str, adjust: Mapping[str, Any], policy: str) -> str:
    """params.yaml with the turn's settings, comments kept; ``ConfigError`` for a setting that may not be."""
    from io import StringIO

    from ruamel.yaml import YAML

    for name in adjust:
        if name.split(".")[0] not in ADJUSTABLE or name.count(".") != 1:
            raise ConfigError(
                f"{name!r} cannot be set for one turn: only settings of {', '.join(ADJUSTABLE)} can"
            )
    yaml = YAML()
    yaml.preserve_quotes = True
    doc = yaml.load(text)
    for name, value in {**adjust, "turn.policy": policy}.items():
        section, key = name.split(".")
        doc.setdefault(section, {})[key] = value
    out = StringIO()
    yaml.dump(doc, out)
    Settings.parse(out.getvalue(), f"{PARAMS_FILE} with this turn's settings")
    return out.getvalue()


# ── results ─────────────────────────────────────────────────────────────────────────────────────────


def _publish(workspace: Workspace, record: TurnRecord, result: TurnResult, store: Store) -> TurnResult:
    """Dataset, bundle, gate report, checkpoint: by content, so that a repeat writes the same."""
    root = workspace.root
    candidate = policies.digest_of(root / BUNDLE)
    data = (root / GATE_REPORT).read_bytes()
    report = GateReport.model_validate_json(data)
    if (report.candidate_digest, report.current_digest) != (candidate, record.current_digest):
        raise StageError(
            f"{record.turn}: the gate compared {report.candidate_digest[:12]} with "
            f"{report.current_digest[:12]}, but the turn made {candidate[:12]} from "
            f"{record.current_digest[:12]}: run gate again"
        )
    dataset = lineage.publish(store, root / DATASET)
    policies.publish(
        store,
        record.turn,
        root / BUNDLE,
        root / CHECKPOINT,
        start=record.current_digest,
        dataset=dataset,
    )
    gate_digest = sha256_bytes(report.to_bytes())
    store.put(f"gates/{gate_digest}.json", report.to_bytes())
    return result.model_copy(
        update={
            "candidate_digest": candidate,
            "gate_digest": gate_digest,
            "verdict": report.verdict,
            "reasons": report.reasons,
        }
    )


def _save_experiment(workspace: Workspace, finished: tuple[str, ...]) -> str:
    """``dvc exp save`` and its way into the checkout; the experiment's commit."""
    include = [arg for p in (RECORD, CLAIMS, *workspace.figures()) for arg in ("--include-untracked", p)]
    workspace.dvc("exp", "save", "--force", "--name", workspace.turn, *include, *finished)
    for line in workspace.git("for-each-ref", "--format=%(objectname) %(refname)", "refs/exps").splitlines():
        commit, _, ref = line.partition(" ")
        if ref.endswith(f"/{workspace.turn}"):
            # What `dvc exp push --no-cache` does, without the second that it takes.
            workspace.git("push", "--quiet", "--force", "origin", f"{ref}:{ref}")
            workspace.forward(ref)
            return commit
    raise StageError(f"{workspace.turn}: dvc exp save left no experiment of that name")


def _find_record(store: Store, turn: str) -> TurnRecord | None:
    try:
        return store.get_json(_key(turn, "turn.json"), TurnRecord)
    except NotFound:
        return None


def _find_result(store: Store, turn: str) -> TurnResult | None:
    try:
        return store.get_json(_key(turn, "result.json"), TurnResult)
    except NotFound:
        return None


def _record(store: Store, turn: str) -> TurnRecord:
    record = _find_record(store, turn)
    if record is None:
        raise StageError(f"{turn}: no such turn; open it first")
    return record


def _check_name(turn: str) -> None:
    if not TURN.fullmatch(turn):
        raise StageError(f"turn {turn!r}: must be turn- and lower-case letters, digits and dashes")


def _key(turn: str, name: str) -> str:
    return f"runs/{turn}/{name}"
