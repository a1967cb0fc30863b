"""Settings and deployment: what a typing mistake or a hostile value in them does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from flywheel.config import Deployment, Settings, checkout, setting_names
from flywheel.errors import ConfigError

ROOT = Path(__file__).parents[1]


def test_shipped_params_are_valid_and_name_every_setting() -> None:
    path = ROOT / "params.yaml"
    Settings.load(path)
    doc = yaml.safe_load(path.read_text())
    assert set(_leaves(doc)) == set(setting_names())


def _leaves(doc: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in doc.items():
        if isinstance(value, dict) and value and f"{prefix}{key}" not in setting_names():
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_no_safety_limit_can_be_set_by_an_experiment() -> None:
    forbidden = ("limit", "torque", "velocity", "acceleration", "jerk", "workspace", "stop", "stale", "ramp")
    assert [n for n in setting_names() if any(word in n for word in forbidden)] == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train:\n  stpes: 3", r"p\.yaml: unknown key 'train\.stpes'; did you mean 'train\.steps'\?"),
        ("trian: {steps: 3}", r"unknown key 'trian'; did you mean 'train'\?"),
        ("gate: {replay_fraction: 0.1}", r"did you mean 'train\.replay_fraction'\?"),
        ("label: {zzz: 1}", r"unknown key 'label\.zzz'; valid here: label\.min_confidence"),
        ("1: 2", r"unknown key '1'; valid here: twin, edge"),
        ("train: {steps: true}", r"train\.steps = True: "),
        ("train: {steps: 2.5}", r"train\.steps = 2\.5: "),
        ("train: {steps: 0}", r"train\.steps = 0: .*greater than or equal to 1"),
        ("train: {learning_rate: .nan}", r"train\.learning_rate = nan: "),
        ("train: {learning_rate: 2023-01-01}", r"train\.learning_rate = '2023-01-01': "),
        ("train: 5", r"train = 5: "),
        ("train: [", r"p\.yaml line 1: not valid YAML"),
        ("train: {steps: 1}\ntrain: {steps: 2}", r"line 2: .*'train' is given twice"),
        ("train: {steps: 1, steps: 2}", r"'steps' is given twice"),
        ("- 1", r"must be a mapping of sections, found a list"),
        ("a: !!python/object/apply:os.getpid []", r"not valid YAML"),
        ("recorder: {pre_s: 20.0, post_s: 20.0, max_episode_s: 30.0}", r"recorder.*max_episode_s"),
    ],
)
def test_mistake_in_params_is_named(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as e:
        Settings.parse(text, "p.yaml")
    assert "\n" not in str(e.value)


def test_absent_sections_and_keys_have_their_defaults() -> None:
    assert Settings.parse("", "p") == Settings.parse("train:", "p") == Settings()
    assert Settings.parse("train: {learning_rate: 1e-4}", "p").train.learning_rate == 1e-4


def test_params_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        Settings.load(tmp_path / "nowhere.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"b\.yaml: cannot be read"):
        Settings.load(tmp_path / "b.yaml")


@given(st.text(max_size=200))
def test_no_text_does_worse_than_a_config_error(text: str) -> None:
    try:
        Settings.parse(text, "p.yaml")
    except ConfigError as e:
        assert str(e).startswith("p.yaml")


def test_home_is_the_checkout_around_the_working_directory(tmp_path: Path) -> None:
    inside = ROOT / "tests" / "integration"
    assert Deployment.from_env({}, inside).home == ROOT / ".flywheel"
    assert checkout(tmp_path) is None
    outside = Deployment.from_env({"XDG_STATE_HOME": str(tmp_path / "state")}, tmp_path)
    assert outside.home == tmp_path / "state" / "flywheel"
    assert Deployment.from_env({"FLYWHEEL_HOME": str(tmp_path)}, inside).home == tmp_path


@pytest.mark.parametrize(
    ("env", "url", "endpoint", "embedded"),
    [
        ({}, "s3://flywheel", None, True),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "s3://flywheel", "http://127.0.0.1:9", False),
        ({"FLYWHEEL_STORE": "s3://mine/a/b"}, "s3://mine/a/b", None, False),
        (
            {
                "FLYWHEEL_STORE": "s3://mine",
                "AWS_ENDPOINT_URL": "http://x",
                "AWS_ENDPOINT_URL_S3": "http://y",
            },
            "s3://mine",
            "http://y",
            False,
        ),
    ],
)
def test_store_is_embedded_only_if_nothing_names_another(
    env: dict[str, str], url: str, endpoint: str | None, embedded: bool
) -> None:
    d = Deployment.from_env(env)
    assert (d.store_url, d.endpoint, d.embedded) == (url, endpoint, embedded)


@pytest.mark.parametrize("name", ["../up", "a/b", "A B", "", "x" * 64, "a\nb", "-a", "ä"])
def test_site_that_would_escape_its_key_prefix_is_refused(name: str) -> None:
    env = {"FLYWHEEL_SITE": name}
    if not name:
        assert Deployment.from_env(env).site == "local"
        return
    with pytest.raises(ConfigError, match="FLYWHEEL_SITE"):
        Deployment.from_env(env)


def test_keys_in_an_endpoint_are_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL") as e:
        Deployment.from_env({"AWS_ENDPOINT_URL": "http://AKIA:topsecret@host:1"})
    assert "topsecret" not in str(e.value)
    with pytest.raises(ConfigError, match="FLYWHEEL_STORE"):
        Deployment.from_env({"FLYWHEEL_STORE": "http://bucket"})
