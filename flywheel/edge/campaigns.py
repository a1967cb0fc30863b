"""Campaigns: what a set of robots is to record besides its failures, from a signed document.

``campaigns/campaigns.json`` is a target of the release repository: it is signed as a stable release is, and a
robot verifies it the same way. It can only ask for recordings: conditions are data, not code, and bounded by
a quota and an end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from flywheel.edge.history import Event
from flywheel.edge.link import Records
from flywheel.edge.triggers import Debounce, Happening, What, detail_of, draw
from flywheel.schema import ROBOT_NAME, Strict, TriggerKind, cohort_draw

CAMPAIGNS_TARGET = "campaigns/campaigns.json"
CAMPAIGNS_BYTES_MAX = 1 << 18
_EVERYONE = 1 << 32

Signal = Literal["tracking_error_rad", "dq_rad_s", "tau_nm", "chunk_age_s", "late_s"]


class Condition(Strict):
    """What is recorded: a share of attempts, a signal above a bound for ``confirm`` ticks, or an event."""

    on: Literal["attempt", "signal", "event"]
    fraction: float = Field(default=1.0, gt=0, le=1)  # of attempts
    signal: Signal = "tracking_error_rad"
    joint: int | None = Field(default=None, ge=0, le=63)  # None: the worst
    above: float = 0.0
    confirm: int = Field(default=5, ge=1, le=10_000)
    heal: int = Field(default=200, ge=1, le=100_000)
    kind: str = Field(default="", max_length=16)
    name: str = Field(default="", max_length=64)  # "" for any

    @model_validator(mode="after")
    def _whole(self) -> Condition:
        if self.on == "event" and not self.kind:
            raise ValueError("kind is empty: an event's condition names its kind")
        return self


class Campaign(Strict):
    """One campaign; ``campaign_id`` is never used for another."""

    schema_version: Literal[1] = 1
    campaign_id: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,47}$")
    why: str = Field(min_length=1, max_length=1000)
    condition: Condition
    pre_s: float = Field(gt=0, le=60)
    post_s: float = Field(gt=0, le=60)
    cameras: tuple[str, ...] = ()  # () for all
    robots: tuple[Annotated[str, Field(pattern=ROBOT_NAME)], ...] = ()  # () for all, thinned by share
    share: float = Field(default=1.0, gt=0, le=1)  # of the robots
    episodes: int = Field(ge=1, le=100_000)  # most that one robot records
    end_unix_ns: int = Field(gt=0)

    def concerns(self, robot: str, now_unix_ns: int) -> bool:
        """Whether a robot takes part, now."""
        if now_unix_ns >= self.end_unix_ns or (self.robots and robot not in self.robots):
            return False
        return cohort_draw(self.campaign_id, robot) < self.share * _EVERYONE


class Campaigns(Strict):
    """``campaigns.json``: all that hold now. ``approved_by`` names who let it out."""

    schema_version: Literal[1] = 1
    campaigns: tuple[Campaign, ...]
    approved_by: tuple[str, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _unique(self) -> Campaigns:
        names = [c.campaign_id for c in self.campaigns]
        if len(set(names)) < len(names):
            raise ValueError(f"campaigns: {max(names, key=names.count)!r} is there twice")
        return self


class CampaignWatch:
    """Looks for one campaign's condition; ``count`` says how often it was met (a ``triggers.Watch``)."""

    def __init__(self, campaign: Campaign, count: int = 0) -> None:
        self.campaign, self.count = campaign, count
        c = campaign.condition
        self._debounce = Debounce(c.confirm, c.heal)

    def control(self, rows: Records) -> list[Happening]:
        """A signal that came above its bound and stayed there."""
        c = self.campaign.condition
        if c.on != "signal":
            return []
        values = signal(rows, c.signal, c.joint)
        edges = self._debounce.edges(~(values <= c.above))
        return [h for i in edges for h in self._met(int(rows["t_ns"][i]), {"value": _number(values[i])})]

    def event(self, event: Event) -> list[Happening]:
        """An attempt that was drawn, or the event that was named."""
        c, t_ns = self.campaign.condition, int(event["t_ns"])
        if c.on == "attempt" and (event["kind"], event["name"]) == ("task", "end"):
            if detail_of(event).get("by", "policy") != "policy":
                return []
            lot = f"{self.campaign.campaign_id}/{t_ns}"
            return self._met(t_ns, {}) if draw(lot) < c.fraction else []
        if c.on == "event" and event["kind"] == c.kind and c.name in ("", event["name"]):
            return self._met(t_ns, {"event": event["name"]})
        return []

    def _met(self, t_ns: int, detail: dict[str, Any]) -> list[Happening]:
        c = self.campaign
        if self.count >= c.episodes:
            return []
        self.count += 1
        detail = {**detail, "campaign": c.campaign_id, "cameras": list(c.cameras)}
        pre, post = round(c.pre_s * 1e9), round(c.post_s * 1e9)
        return [Happening(t_ns, What.TRIGGER, TriggerKind.CAMPAIGN, detail, pre, post)]


def watches(
    campaigns: Iterable[Campaign], robot: str, now_unix_ns: int, counts: Mapping[str, int]
) -> list[CampaignWatch]:
    """Those that a robot takes part in and has not fulfilled. ``counts``: what it recorded before."""
    mine = [c for c in campaigns if c.concerns(robot, now_unix_ns)]
    return [CampaignWatch(c, n) for c in mine if (n := counts.get(c.campaign_id, 0)) < c.episodes]


def signal(rows: Records, name: Signal, joint: int | None) -> npt.NDArray[np.float64]:
    """A signal of control rows, ``[n]``; of several joints the largest magnitude."""
    if name in ("chunk_age_s", "late_s"):
        return np.asarray(rows[name.replace("_s", "_ns")] * 1e-9, np.float64)
    if name == "tracking_error_rad":
        values = rows["q"] - rows["q_ref"]
    else:
        values = rows["dq" if name == "dq_rad_s" else "tau"]
    size = np.abs(values.astype(np.float64))
    return np.asarray(size.max(axis=1) if joint is None or joint >= size.shape[1] else size[:, joint])


def only_cameras(triggers: Iterable[Any], cameras: tuple[str, ...]) -> tuple[str, ...]:
    """The cameras of an episode that only campaigns asked for; all, if anything else did."""
    wanted: set[str] = set()
    for t in triggers:
        asked = t.detail.get("cameras") if t.kind is TriggerKind.CAMPAIGN else None
        if not isinstance(asked, list) or not asked:
            return cameras
        wanted |= set(map(str, asked))
    return tuple(c for c in cameras if c in wanted) or cameras


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None  # JSON has no NaN
