"""An episode is explained by its id alone: it, its like and the policy that acted come from the store."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flywheel import policies
from flywheel.bench.curate import record
from flywheel.cli import app
from flywheel.edge.spool import Spool
from flywheel.label import Aspect
from flywheel.label import answers as saying
from flywheel.label.answers import Evidence
from flywheel.store import Store

pytestmark = pytest.mark.integration
BASE = Path(__file__).parents[2] / "models" / "base"


def test_the_page_of_an_id_has_neighbours_attention_and_what_people_said(
    tmp_path: Path, store_env: dict[str, str], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(BASE.parents[1])
    spool = tmp_path / "spool"
    ids = sorted(d.name for d in record(spool / "episodes", 4, seed=5, seconds=60.0))
    assert sorted(Spool(spool, store, 1 << 30).upload_once(0).uploaded) == ids
    shutil.copytree(BASE, tmp_path / "checkpoint", ignore=shutil.ignore_patterns("bundle"))
    digest = policies.publish(store, "turn-1", BASE / "bundle", tmp_path / "checkpoint").digest
    saying.answer(
        store, ids[0], {Aspect.CAUSE: "hardware"}, "ann", 1, evidence=Evidence(votes={}, features={})
    )
    elsewhere = tmp_path / "elsewhere"  # no checkout, so no policy but the store's
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (elsewhere / "params.yaml").write_text("label: {reference_runs: 2}\n")

    def explained(*more: str) -> dict[str, Any]:
        done = CliRunner().invoke(app, ["explain", ids[0], "--json", *more])
        assert done.exit_code == 0, done.output
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    x = explained("--html", "page.html")
    assert x["episode"] == ids[0]
    assert (x["attention"]["policy"], x["attention"]["same_policy"]) == (digest, True)
    near = [n["episode_id"] for n in (*x["neighbours"]["successes"], *x["neighbours"]["failures"])]
    assert near == [ids[2]], "the one other episode of its task"
    assert [a["by"] for a in x["answers"]] == ["ann"]
    assert ids[0] in (elsewhere / "page.html").read_text()

    # A policy that is not what its record says is not looked with; the rest is told all the same.
    store.put(f"bundles/{digest}/policy.onnx", b"another graph")
    x = explained()
    assert x["attention"] is None
    assert x["without"]["attention"]
    assert x["happened"]

    done = CliRunner().invoke(app, ["explain", "0190b0b0-0000-7000-8000-000000000000"])
    assert done.exit_code == 1
    assert "the store holds no such episode" in str(done.exception)
