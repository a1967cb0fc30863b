"""What the budget goes to: clusters, weights, coverage; and what is kept from training for evaluation."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel import episode
from flywheel.config import CurateSettings, Settings
from flywheel.curate.choice import order
from flywheel.curate.clusters import Examples, cluster
from flywheel.curate.distances import PIXEL, Scale, between, measure
from flywheel.curate.embed import Encoder, NoEncoder
from flywheel.curate.examine import Candidate, examine, pictures
from flywheel.curate.select import Selected, select
from flywheel.dataset.yardstick import Scenes, Yardstick
from flywheel.errors import BundleError, ConfigError, StageError
from flywheel.label.signals import signals
from flywheel.schema import Manifest, Outcome
from tests.attempts import CORRECTED, KINDS, attempt
from tests.encoders import BASE, bundle

SETTINGS = CurateSettings()
TENTH = Yardstick(held_out_fraction=0.1)
CHOICES = get_args(CurateSettings.model_fields["choice"].annotation)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return Encoder.load(bundle(tmp_path_factory.mktemp("policy") / "bundle"))


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> list[Candidate]:
    root = tmp_path_factory.mktemp("pool")
    return [examine(attempt(root, CORRECTED[i % 5], seed=i), SETTINGS) for i in range(20)]


def fresh(candidates: Sequence[Candidate]) -> list[Candidate]:
    return [copy.copy(c) for c in candidates]


def manifest(c: Candidate) -> Manifest:
    assert c.manifest is not None
    return c.manifest


def variant(c: Candidate, n: int, moved: float = 0.0, **fields: Any) -> Candidate:
    """Another episode like ``c``: id and content of its own, its way ``moved`` m off, manifest ``fields``."""
    v = copy.copy(c)
    name = f"{n:08x}{c.episode_id[8:]}"
    v.manifest = manifest(c).model_copy(update={"episode_id": name, "seed": None, **fields})
    v.directory, v.content_sha256 = Path(name), f"{n:064x}"
    v.path = c.path + moved
    return v


def outcome(found: Sequence[Candidate]) -> dict[str, tuple[Any, ...]]:
    return {
        c.directory.name: (c.taken, c.reason, c.why, c.cluster, c.weight, c.nearest, c.held_out)
        for c in found
    }


# ── whatever the order ───────────────────────────────────────────────────────────────────────────────


@given(st.permutations(range(20)), st.integers(1, 20), st.sampled_from(CHOICES))
@settings(max_examples=20, deadline=None)
def test_order_of_the_input_decides_nothing_and_no_budget_is_overdrawn(
    pool: list[Candidate], encoder: Encoder, order_of: list[int], budget: int, choice: Any
) -> None:
    rule = CurateSettings(choice=choice, budget=budget)

    def run(indices: Sequence[int]) -> tuple[dict[str, tuple[Any, ...]], Selected]:
        found = fresh([pool[i] for i in indices])
        how = select(found, rule, encoder, TENTH)
        assert sum(c.taken for c in found) <= (len(found) if choice == "all" else budget)
        assert not any(c.taken and c.held_out for c in found)
        return outcome(found), how

    assert run(range(20)) == run(order_of)


@pytest.mark.parametrize("choice", CHOICES)
def test_a_rerun_decides_the_same_to_the_last_bit(
    pool: list[Candidate], encoder: Encoder, choice: Any
) -> None:
    rule = CurateSettings(choice=choice, budget=7)
    first, again = fresh(pool), fresh(pool)
    select(first, rule, encoder, TENTH)
    select(again, rule, encoder, TENTH)
    assert outcome(first) == outcome(again)


# ── kept for evaluation ──────────────────────────────────────────────────────────────────────────────


@given(st.uuids(), st.floats(0, 0.99), st.floats(0, 0.99))
def test_a_larger_share_holds_out_all_that_a_smaller_one_did(name: Any, a: float, b: float) -> None:
    low, high = (Yardstick(held_out_fraction=x) for x in sorted((a, b)))
    assert high.holds_out(str(name)) or not low.holds_out(str(name))


def test_the_share_that_is_held_out_is_the_one_that_was_asked_for() -> None:
    ids = [f"{i:08x}-0000-7000-8000-000000000000" for i in range(20_000)]
    assert sum(map(TENTH.holds_out, ids)) / len(ids) == pytest.approx(0.1, abs=0.01)
    assert not any(map(Yardstick().holds_out, ids[:100]))


def test_what_is_held_out_does_not_depend_on_what_else_is_there(
    pool: list[Candidate], encoder: Encoder
) -> None:
    half = Yardstick(held_out_fraction=0.4)  # and no cluster has as many as three
    whole, part = fresh(pool), fresh(pool[:9])
    select(whole, SETTINGS, encoder, half)
    select(part, SETTINGS, None, half)
    assert [c.held_out for c in whole[:9]] == [c.held_out for c in part]
    assert 0 < sum(c.held_out for c in part) < 9
    assert all((c.reason, c.taken) == ("held_out", False) for c in whole if c.held_out)


@given(st.integers(0, 2**32 - 8), st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_no_kind_of_failure_goes_without_a_held_out_episode(
    pool: list[Candidate], first: int, size: int
) -> None:
    """Five are enough for one in five to be one, however the draw falls out."""
    found = [variant(pool[0], first + n, moved=0.03 * n) for n in range(size)]
    select(found, CurateSettings(cluster_distance=5.0), None, Yardstick(held_out_fraction=0.2))
    held = [c for c in found if c.held_out]
    assert held or size < 5
    assert len(held) < size or size == 1 or all(map(Yardstick(held_out_fraction=0.2).holds_out, ids(held)))


def ids(found: Sequence[Candidate]) -> list[str]:
    return [c.episode_id for c in found]


def test_what_an_earlier_turn_held_out_stays_so_by_id_and_by_content(pool: list[Candidate]) -> None:
    found = fresh(pool)
    select(found, CurateSettings(choice="all"), kept={pool[2].episode_id, pool[5].content_sha256})
    assert [i for i, c in enumerate(found) if c.held_out] == [2, 5]
    assert not any(c.taken for c in found if c.held_out)


@pytest.mark.parametrize("choice", CHOICES)
def test_a_near_copy_of_a_held_out_episode_is_not_trained_on_either(
    pool: list[Candidate], choice: Any
) -> None:
    half = Yardstick(held_out_fraction=0.5)
    kept = next(c for c in pool if half.holds_out(c.episode_id))
    numbers = (n for n in range(100) if not half.holds_out(variant(kept, n).episode_id))
    copies = [variant(kept, next(numbers), moved=0.001) for _ in range(3)]
    found = fresh([*pool, *copies])
    select(found, CurateSettings(choice=choice), None, half)
    assert [c.reason for c in found[-3:]] == ["near_held_out"] * 3
    assert kept.episode_id in found[-1].why


def test_the_yardsticks_own_scenes_and_episodes_are_never_taken(pool: list[Candidate]) -> None:
    named = pool[3].episode_id, pool[4].content_sha256
    rule = Yardstick(scenes=(Scenes(shift="factory", first=7, last=8),), episodes=named)
    found = fresh(pool)
    select(found, CurateSettings(choice="all"), None, rule)
    assert [i for i, c in enumerate(found) if c.reason == "yardstick"] == [3, 4, 7, 8]
    other = Yardstick(scenes=(Scenes(shift="lab", first=0, last=99),))
    select(found := fresh(pool), CurateSettings(choice="all"), None, other)
    assert all(c.taken for c in found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema_version": 1, "held_out_fraction": 1.0}', r"held_out_fraction = 1\.0"),
        ('{"schema_version": 1, "held_out": 0.1}', "held_out = 0.1"),
        ("{", "document"),
    ],
)
def test_a_yardstick_that_cannot_be_meant_is_refused_by_its_key(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "y.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        Yardstick.load(tmp_path / "y.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        Yardstick.load(tmp_path / "absent.json")


def test_the_repositorys_yardstick_holds_out_a_share_and_no_turn_can_change_it() -> None:
    rule = Yardstick.load(BASE.parents[1] / "yardstick.json")
    assert 0 < rule.held_out_fraction <= 0.2
    assert rule.scenes
    assert not {"yardstick", "held_out_fraction"} & set(CurateSettings.model_fields), "a form could set it"


# ── the rules to compare with ────────────────────────────────────────────────────────────────────────


def taken(pool: Sequence[Candidate], encoder: Encoder | None = None, **fields: Any) -> set[str]:
    found = fresh(pool)
    select(found, CurateSettings(**fields), encoder)
    return {c.episode_id for c in found if c.taken}


def test_newest_takes_the_newest(pool: list[Candidate]) -> None:
    assert taken(pool, choice="newest", budget=6) == set(sorted(c.episode_id for c in pool)[-6:])


def test_all_takes_all_that_is_sound_whatever_the_budget(pool: list[Candidate]) -> None:
    near = variant(pool[0], 1, moved=0.001)
    assert len(taken([*pool, near], choice="all", budget=2)) == 21
    assert len(taken([*pool, near], choice="coverage")) == 20


def test_random_is_the_same_for_a_seed_and_another_for_another(pool: list[Candidate]) -> None:
    draws = [taken(pool, choice="random", budget=6, seed=s) for s in range(30)]
    assert draws[3] == taken(pool, choice="random", budget=6, seed=3)
    assert all(len(d) == 6 for d in draws)
    assert len(set(map(frozenset, draws))) > 20
    often = Counter(e for d in draws for e in d)
    assert len(often) == 20, "an episode that no seed draws is not drawn at random"


def test_coverage_covers_more_of_what_weighs_than_chance_and_age_do(
    pool: list[Candidate], encoder: Encoder
) -> None:
    everything = fresh(pool)
    how = select(everything, SETTINGS, encoder)
    apart = between(everything, everything, how.scale)
    tasks = np.array([manifest(c).task for c in everything])
    near = np.where(tasks[:, None] == tasks[None, :], 1 / (1 + (apart / 0.075) ** 2), 0.0)
    weights = np.array([c.weight for c in everything])

    def covered(**fields: Any) -> float:
        chosen = taken(pool, encoder, budget=7, **fields)
        mine = [c.episode_id in chosen for c in everything]
        return float(weights @ near[:, mine].max(axis=1))

    ours = covered(choice="coverage")
    assert ours > covered(choice="newest")
    assert ours > max(covered(choice="random", seed=s) for s in range(20))


def test_lazy_greedy_is_greedy(pool: list[Candidate], encoder: Encoder) -> None:
    found = sorted(fresh(pool), key=lambda c: c.episode_id)
    scale = measure(found, encoder)
    rng = np.random.default_rng(0)
    for c in found:
        c.weight = float(rng.uniform(0.1, 3.0))
    rule = CurateSettings(cluster_distance=0.3)
    got = [c.episode_id for c in order(found, [], 8, rule, scale)]

    apart = between(found, found, scale)
    tasks = np.array([manifest(c).task for c in found])
    near = np.where(tasks[:, None] == tasks[None, :], 1 / (1 + (apart / 0.15) ** 2), 0.0)
    weights, best, slow = np.array([c.weight for c in found]), np.zeros(len(found)), []
    for _ in range(8):
        gains = (weights[:, None] * np.maximum(0, near - best[:, None])).sum(axis=0).round(9)
        i = max(
            (i for i in range(len(found)) if found[i].episode_id not in slow), key=lambda i: (gains[i], i)
        )
        slow.append(found[i].episode_id)
        best = np.maximum(best, near[:, i])
    assert got == slow


# ── frequency × cost × coverage gap ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("jitter", [0.0, 0.0005, 0.05])
def test_a_thousand_copies_of_one_failure_do_not_crowd_out_the_rest(
    pool: list[Candidate], jitter: float
) -> None:
    """From a robot that repeats itself: byte-like copies, or noise enough to pass for distinct."""
    rng = np.random.default_rng(0)
    flood = [variant(pool[0], n, robot="loud") for n in range(1000)]
    for c in flood:
        c.path = c.path + jitter * rng.normal(size=c.path.shape)
    found = fresh([*pool, *flood])
    select(found, CurateSettings(budget=20))
    alone = taken(pool, budget=20)
    mine = {c.episode_id for c in found[:20] if c.taken}
    assert len(alone) == 20
    assert len(mine) >= 17, "the flood took the place of other failures"
    assert Counter(c.taken for c in found)[True] == 20
    weights = sum(c.weight for c in found[20:])
    assert weights <= np.log2(1001) + 1.0, "a robot's repeats buy weight, beyond their share of one cluster"


def test_many_robots_that_fail_alike_weigh_more_than_one_that_repeats_itself(pool: list[Candidate]) -> None:
    def weight(robots: Sequence[str]) -> float:
        found = [variant(pool[0], n, moved=0.03 * n, robot=r) for n, r in enumerate(robots)]
        select(found, CurateSettings(cluster_distance=5.0))
        assert len({c.cluster for c in found}) == 1
        return sum(c.weight for c in found)

    assert weight(["a"] * 7) == pytest.approx(3.0)
    assert weight(["a", "b", "c", "d", "e", "f", "g"]) == pytest.approx(7.0)


def test_a_costly_failure_comes_before_a_cheap_one(pool: list[Candidate]) -> None:
    cheap = [variant(pool[0], n, moved=0.5 * n) for n in range(6)]
    dear = variant(pool[0], 50, moved=9.0, outcome=Outcome.DROPPED)

    def first(cost: float) -> str:
        found = fresh([*cheap, dear])
        select(found, CurateSettings(budget=1, costs={"dropped": cost}))
        return next(c.episode_id for c in found if c.taken)

    assert first(4.0) == dear.episode_id
    assert first(0.5) != dear.episode_id


def test_a_cost_of_a_failure_that_does_not_exist_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"costs\.droped: no such failure"):
        Settings.parse("curate: {costs: {droped: 2.0}}", "params.yaml")


# ── clusters ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_cluster_is_of_one_task_one_mode_and_one_phase(pool: list[Candidate], encoder: Encoder) -> None:
    found = fresh(pool)
    select(found, CurateSettings(cluster_distance=1e6), encoder)
    kinds = {(c.cluster, manifest(c).task, c.failure_mode, c.phase) for c in found}
    assert len(kinds) == len({k[0] for k in kinds}) == len({k[1:] for k in kinds})
    assert len({c.phase for c in found}) > 1
    assert all(c.cluster.startswith(f"{c.failure_mode}-{c.phase}-") for c in found)


def test_clusters_keep_their_names_when_the_policy_and_the_episodes_are_others(
    pool: list[Candidate], tmp_path: Path
) -> None:
    """Three kinds of one failure, far apart; every turn other episodes of them and another encoder."""

    def turn(n: int, kinds: Sequence[int], earlier: Examples) -> tuple[dict[int, str], Examples]:
        encoder = Encoder.load(bundle(tmp_path / f"{n}", weights=n))
        found = {k: [variant(pool[0], 100 * n + 10 * k + i, k + i / 50) for i in range(4)] for k in kinds}
        everyone = [c for k in sorted(found, reverse=n % 2 == 0) for c in found[k]]
        examples = cluster(everyone, measure(everyone, encoder), 0.3, earlier, encoder)
        names = {k: {c.cluster for c in cs} for k, cs in found.items()}
        assert all(len(v) == 1 for v in names.values())
        # as it comes to the next turn: by way of a file
        (tmp_path / "clusters.json").write_bytes(examples.to_bytes())
        return {k: v.pop() for k, v in names.items()}, Examples.load(tmp_path / "clusters.json")

    first, examples = turn(1, [1, 2, 3], Examples())
    assert len(set(first.values())) == 3
    second, examples = turn(2, [3, 1], examples)
    assert second == {1: first[1], 3: first[3]}
    third, examples = turn(3, [2, 4], examples)
    assert third[2] == first[2], "a kind that was away for a turn lost its name"
    assert third[4] not in first.values(), "a name was given twice"


def test_no_file_names_clusters_anew_and_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    assert Examples.load(tmp_path / "clusters.json") == Examples()
    (tmp_path / "clusters.json").write_text('{"clusters": 3}')
    with pytest.raises(StageError, match="remove it to name clusters anew"):
        Examples.load(tmp_path / "clusters.json")


@pytest.mark.parametrize("kind", KINDS)
def test_the_phase_is_the_one_that_labels_give(tmp_path: Path, kind: str) -> None:
    directory = attempt(tmp_path, kind)
    c = examine(directory, SETTINGS)
    assert c.phase == ("" if not c.stretches else signals(episode.read(directory)).phase)


# ── the policy's encoder ─────────────────────────────────────────────────────────────────────────────


def test_the_base_policys_graph_shows_what_the_policy_sees() -> None:
    encoder = Encoder.load(BASE)
    rng = np.random.default_rng(0)
    views = {"wrist": rng.integers(0, 255, (3, 64, 64, 3), dtype=np.uint8)}
    states = np.array([[0.4, 0.0, 0.3, 0.0]] * 3, np.float32)
    red = encoder.features(views, states, "pick the red box and place it in the bin")
    assert red.shape == (3, 48)
    assert np.isfinite(red).all()
    assert np.array_equal(red, encoder.features(views, states, "pick the red box and place it in the bin"))
    other: list[Callable[[], Any]] = [
        lambda: encoder.features(views, states, "pick the blue box and place it in the bin"),
        lambda: encoder.features({"wrist": views["wrist"][::-1]}, states, "pick the red box"),
        lambda: encoder.features(views, states + 0.1, "pick the red box and place it in the bin"),
    ]
    assert all(not np.allclose(f(), red) for f in other), "it must see pictures, words and state"


def test_one_pixel_to_the_side_is_one_pixel_whatever_the_encoder(
    pool: list[Candidate], tmp_path: Path
) -> None:
    for weights in range(3):
        found = fresh(pool[:6])
        encoder = Encoder.load(bundle(tmp_path / f"{weights}", weights=weights))
        scale = measure(found, encoder)
        moves = [
            encoder.resolution(pictures(c.views), c.view_states, manifest(c).task) * scale.per_unit
            for c in found
        ]
        assert np.median(moves) == pytest.approx(PIXEL)


def test_a_bundle_without_a_prefix_of_the_known_form_falls_back_to_thumbnails(
    pool: list[Candidate], tmp_path: Path
) -> None:
    with pytest.raises(NoEncoder, match="no kv_cache and no prefix_mask"):
        Encoder.load(bundle(tmp_path / "old", prefix=False))
    plain, fallen = fresh(pool), fresh(pool)
    select(plain, SETTINGS)
    how = select(fallen, SETTINGS, no_encoder="its graph has none")
    assert outcome(plain) == outcome(fallen)
    assert (how.scale.encoder, how.scale.why) == ("", "its graph has none")


@pytest.mark.parametrize("case", ["camera", "state", "constant"])
def test_an_encoder_that_cannot_tell_is_not_asked(pool: list[Candidate], tmp_path: Path, case: str) -> None:
    directory = BASE if case == "state" else bundle(tmp_path / "b", constant=case == "constant")
    found = fresh(pool)
    if case == "camera":
        found[5].view_shapes = {"wrist": (32, 32, 3)}
    how = select(found, SETTINGS, Encoder.load(directory))
    word = {"camera": "camera 'wrist'", "state": "state has 5 dimensions", "constant": "do not change"}[case]
    assert how.scale.encoder == ""
    assert word in how.scale.why
    assert all(c.taken for c in found)


def test_features_that_are_not_finite_quarantine_the_episode_and_no_other(
    pool: list[Candidate], encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = encoder.features

    def features(views: Any, states: Any, instruction: str) -> Any:
        out = real(views, states, instruction)
        return np.full_like(out, np.nan) if states[0, 0] == pool[2].view_states[0, 0] else out

    monkeypatch.setattr(encoder, "features", features)
    found = fresh(pool)
    select(found, SETTINGS, encoder)
    assert [c.reason for c in found if not c.taken] == ["quarantine:features"]
    assert not found[2].taken


def test_a_damaged_bundle_is_an_error_and_no_fallback(tmp_path: Path) -> None:
    directory = bundle(tmp_path / "b")
    (directory / "policy.onnx").write_bytes(b"\x00garbage")
    with pytest.raises(BundleError, match=r"policy\.onnx") as e:
        Encoder.load(directory)
    assert not isinstance(e.value, NoEncoder)
    (directory / "policy.onnx").unlink()
    with pytest.raises(BundleError, match=r"a bundle holds"):
        Encoder.load(directory)


def test_distances_are_a_metric_but_for_the_same_scene(pool: list[Candidate], encoder: Encoder) -> None:
    found = fresh(pool)
    scale = measure(found, encoder)
    apart = between(found, found, scale)
    assert np.allclose(apart, apart.T)
    assert np.allclose(np.diag(apart), 0.0)
    assert (apart[:, :, None] <= apart[:, None, :] + apart.T[None, :, :] + 1e-9).all()
    one = copy.copy(found[0])
    assert one.features is not None
    one.features = one.features + 1.0
    assert between([found[0]], [one], scale)[0, 0] == 0.0, "the very same scene"
    one.manifest = manifest(one).model_copy(update={"seed": 999})
    assert between([found[0]], [one], scale)[0, 0] == pytest.approx(scale.per_unit)


def test_settings_of_the_wheel_name_every_setting_of_the_choice() -> None:
    params = Settings.load(BASE.parents[2] / "params.yaml").curate
    assert params.choice == "coverage"
    text = (BASE.parents[2] / "params.yaml").read_text()
    assert all(f"  {name}:" in text for name in ("choice", "budget", "cluster_distance", "costs"))
    assert json.loads(params.model_dump_json())["costs"] == SETTINGS.costs
    assert all(a <= b for a, b in pairwise(sorted(params.costs.values())))
    assert Scale().encoder == ""
