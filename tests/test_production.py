"""The settings of a production Airflow: names that the installed Airflow knows, and no secret among them."""

from __future__ import annotations

import configparser
import importlib.util
import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from flywheel.cli import app
from flywheel.config import Deployment
from flywheel.errors import ConfigError
from flywheel.services.production import Executor, Metrics, Setting, settings

STORE = {"FLYWHEEL_STORE": "s3://fleet/prod", "AWS_ENDPOINT_URL": "https://rgw.example:7480"}
URL = "https://airflow.example"
# Of providers that are not installed, and that Airflow itself has no defaults for: as in celery 3.17 and
# edge3 3.0. Installing one makes its names known, and its line here superfluous.
ELSEWHERE = {
    ("celery_broker_transport_options", "visibility_timeout"),
    ("edge", "api_enabled"),
    ("edge", "api_url"),
}


def deployment(**environ: str) -> Deployment:
    return Deployment.from_env(STORE | environ)


def every() -> Iterator[Setting]:
    """Whatever any choice of options prints."""
    for executor in Executor:
        for metrics, to in (
            (Metrics.NONE, ""),
            (Metrics.STATSD, "statsd:9125"),
            (Metrics.OTEL, "http://c:4318"),
        ):
            for repository in ("", "https://git.example/robots/flywheel.git"):
                yield from settings(
                    deployment(), executor, metrics, url=URL, repository=repository, collector=to
                )


@pytest.fixture(scope="module")
def known() -> dict[tuple[str, str], bool]:
    """Every option of the installed Airflow and of its providers' fall-backs; whether it is a secret."""
    spec = importlib.util.find_spec("airflow")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(next(iter(spec.submodule_search_locations))) / "config_templates"
    sections = yaml.safe_load((folder / "config.yml").read_text())
    found = {
        (section, key): bool(option.get("sensitive"))
        for section, content in sections.items()
        for key, option in content["options"].items()
        if not option.get("version_deprecated")
    }
    fall_backs = configparser.ConfigParser(interpolation=None)
    fall_backs.read(folder / "provider_config_fallback_defaults.cfg")
    for section in fall_backs.sections():
        for key in fall_backs[section]:
            found.setdefault((section, key), key in ("broker_url", "result_backend"))
    found.setdefault(("celery", "result_backend"), True)  # its fall-back is computed
    return found


def test_every_name_is_an_option_of_the_installed_airflow_that_is_not_deprecated(
    known: dict[tuple[str, str], bool],
) -> None:
    used = {s.option for s in every() if s.option is not None}
    assert len(used) > 35
    assert used - set(known) == ELSEWHERE
    others = {s.name for s in every() if s.option is None}
    assert others == {
        "FLYWHEEL_STORE", "FLYWHEEL_HOME", "FLYWHEEL_CHECKOUT", "FLYWHEEL_GIT_REMOTE", "FLYWHEEL_APPROVERS",
        "AWS_ENDPOINT_URL", "AIRFLOW_CONN_AWS_DEFAULT",
        "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_SERVICE_NAME",
    }  # fmt: skip


def test_what_airflow_takes_for_a_secret_is_read_from_a_file_and_nothing_else_is(
    known: dict[tuple[str, str], bool],
) -> None:
    """Airflow runs ``…_CMD`` for its secrets alone, and ignores it for other options."""
    for s in every():
        if s.option is None or s.option in ELSEWHERE:
            continue
        assert s.name.endswith("_CMD") == known[s.option], s.name
        if s.name.endswith("_CMD"):
            assert shlex.split(s.value)[0] == "cat"
            assert len(shlex.split(s.value)) == 2


def test_what_the_flywheel_reads_is_understood_by_it() -> None:
    said = {s.name: s.value for s in settings(deployment(), Executor.LOCAL, Metrics.NONE, url=URL)}
    read = Deployment.from_env({k: v for k, v in said.items() if k.startswith(("FLYWHEEL_", "AWS_"))})
    assert not read.embedded
    assert (read.store_url, read.git_remote) == ("s3://fleet/prod", "origin")
    assert read.home == Path("/var/lib/flywheel")
    (bundle,) = json.loads(said["AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_CONFIG_LIST"])
    assert bundle["kwargs"]["path"] == f"{said['FLYWHEEL_CHECKOUT']}/dags"
    assert said["AIRFLOW__LOGGING__REMOTE_BASE_LOG_FOLDER"] == "s3://fleet/prod/logs/airflow"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"url": "airflow.example"}, "url"),
        ({"url": "https://ops:hunter2@airflow.example"}, "no password"),
        ({"repository": "https://ops:hunter2@git.example/x"}, "no password"),
        ({"checkout": "/opt/fly wheel"}, "checkout"),
        ({"secrets": "/run/$(rm -rf ~)"}, "secrets"),
        ({"metrics": Metrics.STATSD, "collector": "http://x"}, "collector"),
        ({"metrics": Metrics.OTEL, "collector": "c:4318"}, "collector"),
    ],
)
def test_what_is_no_address_or_path_is_refused_without_repeating_a_password(
    wrong: dict[str, str], says: str
) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        settings(deployment(), Executor.LOCAL, **({"metrics": Metrics.NONE, "url": URL} | wrong))  # type: ignore[arg-type]
    assert "hunter2" not in str(caught.value)


def test_a_store_that_no_other_machine_reaches_is_refused() -> None:
    with pytest.raises(ConfigError, match="FLYWHEEL_STORE"):
        settings(Deployment.from_env({}), Executor.CELERY, Metrics.NONE, url=URL)


def test_the_printed_file_is_one_that_a_shell_reads_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in STORE.items():
        monkeypatch.setenv(name, value)
    command = ["airflow-settings", "--url", URL, "--executor", "celery", "--metrics", "otel"]
    printed = CliRunner().invoke(app, [*command, "--collector", "http://c:4318"])
    assert printed.exit_code == 0, printed.output
    lines = [shlex.split(line, comments=True) for line in printed.stdout.splitlines()]
    read = dict(words[0].split("=", 1) for words in lines if words)
    found = settings(deployment(), Executor.CELERY, Metrics.OTEL, url=URL, collector="http://c:4318")
    assert read == {s.name: s.value for s in found}
    assert "airflow pools set trainer 1" in printed.stdout
    as_json = CliRunner().invoke(app, [*command, "--collector", "http://c:4318", "--json"])
    assert json.loads(as_json.stdout) == read


@pytest.mark.parametrize("value", ["https://user:secret@git.example", "-oProxyCommand=x", "a b"])
def test_a_git_remote_is_a_name_and_never_an_address(value: str) -> None:
    with pytest.raises(ConfigError, match="name of a remote") as caught:
        Deployment.from_env({"FLYWHEEL_GIT_REMOTE": value})
    assert "secret" not in str(caught.value)
