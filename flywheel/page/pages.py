"""What each route answers: looks at the source, picks the part that was asked for, fills a template."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from fastapi import Query, Request
from fastapi.responses import HTMLResponse, Response

from flywheel.page import failures, rendering, robots
from flywheel.page.episodes import jpeg_only
from flywheel.page.kept import Seen
from flywheel.page.paging import PAGES_MAX, SIZES, part
from flywheel.page.robots import Robot
from flywheel.page.source import Source
from flywheel.schema import Mode

LIVE_S = 4  # between two looks of an open page
FOR_EVER = "private, max-age=31536000, immutable"
THUMBNAILS = (12, 24, 48, 96)

Text = Annotated[str, Query(max_length=200)]
Place = Annotated[str, Query(max_length=400)]
PageNumber = Annotated[int, Query(ge=1, le=PAGES_MAX)]


class Refused(Exception):
    """A request that asks for what there is not; ``status`` and why."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class Pages:
    """What each route answers."""

    def __init__(self, source: Source, silence_s: float, airflow_url: str) -> None:
        self._source, self._silence_s, self._airflow_url = source, silence_s, airflow_url

    # ── pages ────────────────────────────────────────────────────────────────────────────────────────

    def overview(self, request: Request) -> HTMLResponse:
        """Everything at a glance."""
        s = self._source
        fleet, rolled, failed, turned = s.fleet.look(), s.rollouts.look(), s.failures.look(), s.turns.look()
        under_way = rolled.value.under_way if rolled.value else None
        detail = s.detail(under_way.name).look() if under_way else None
        return self._page(
            request,
            "overview",
            "Overview",
            [fleet, rolled, failed, turned, detail],
            fleet=fleet.value,
            rollouts=rolled.value,
            under_way=under_way,
            detail=detail.value if detail else None,
            failures=failed.value,
            turns=turned.value,
            clusters=failures.clusters(failed.value.all)[:6] if failed.value else [],
            troubled=robots.troubled(fleet.value.robots, self._silent) if fleet.value else [],
            silent=sum(map(self._silent, fleet.value.robots)) if fleet.value else 0,
        )

    def robots(
        self,
        request: Request,
        q: Text = "",
        site: Text = "",
        policy: Text = "",
        mode: Text = "",
        state: Text = "",
        sort: Text = "robot",
        down: bool = False,
        page: PageNumber = 1,
        size: int = 50,
    ) -> HTMLResponse:
        """Every robot, by pages."""
        modes = [m.name.lower() for m in Mode]
        _choice("mode", mode, ("", *modes))
        _choice("state", state, ("", *robots.STATES))
        _choice("sort", sort, robots.SORTS)
        _choice("size", size, SIZES)
        fleet, rolled = self._source.fleet.look(), self._source.rollouts.look()
        wanted = robots.Wanted(q, site, policy, mode, state, sort, down)
        found = robots.select(fleet.value.robots if fleet.value else (), wanted, self._silent)
        shown_part = part(found, page, size)
        tails: Seen[Any] = Seen({})
        latest = next((s.name for s in rolled.value.all if s.history), "") if rolled.value else ""
        if latest and shown_part.items:
            names = tuple(r.report.robot for r in shown_part.items)
            tails = self._source.tails(latest, names).look()
        return self._page(
            request,
            "robots",
            "Robots",
            [fleet, rolled, tails],
            fleet=fleet.value,
            rollouts=rolled.value,
            part=shown_part,
            tails=tails.value or {},
            tails_of=latest,
            wanted=wanted,
            modes=modes,
            states=robots.STATES,
            sizes=SIZES,
            size=size,
        )

    def robot(self, request: Request, name: Text) -> HTMLResponse:
        """One robot."""
        s = self._source
        fleet, rolled, failed = s.fleet.look(), s.rollouts.look(), s.failures.look()
        robot = fleet.value.find(name) if fleet.value else None
        if fleet.value is not None and robot is None:
            raise Refused(404, f"no robot of the name {name!r} has reported; the list has those that did")
        latest = next((x.name for x in rolled.value.all if x.history), "") if rolled.value else ""
        batches: Seen[Any] = s.batches(latest, name).look() if latest else Seen([])
        return self._page(
            request,
            "robot",
            f"Robot {name}",
            [fleet, rolled, failed, batches],
            name=name,
            robot=robot,
            rollouts=rolled.value,
            batches=batches.value or [],
            batches_of=latest,
            failures=failures.select(failed.value.all, robot=name)[:24] if failed.value else [],
        )

    def rollouts(self, request: Request, page: PageNumber = 1, size: int = 25) -> HTMLResponse:
        """Every rollout, the newest first."""
        _choice("size", size, SIZES)
        rolled, fleet = self._source.rollouts.look(), self._source.fleet.look()
        return self._page(
            request,
            "rollouts",
            "Rollouts",
            [rolled, fleet],
            rollouts=rolled.value,
            part=part(rolled.value.all if rolled.value else (), page, size),
            fleet=fleet.value,
            sizes=SIZES,
            size=size,
        )

    def rollout(self, request: Request, id: Text) -> HTMLResponse:
        """One rollout: its stages, its verdict with the evidence, people's words, every decision."""
        rolled = self._source.rollouts.look()
        if rolled.value is not None and rolled.value.find(id) is None:
            raise Refused(404, f"no rollout {id!r} in this store; the list has those that there are")
        detail: Seen[Any] = self._source.detail(id).look() if rolled.value is not None else Seen(None)
        return self._page(
            request,
            "rollout",
            f"Rollout {id}",
            [rolled, detail],
            id=id,
            rollouts=rolled.value,
            standing=rolled.value.find(id) if rolled.value else None,
            detail=detail.value,
        )

    def failures(
        self,
        request: Request,
        q: Text = "",
        mode: Text = "",
        site: Text = "",
        robot: Text = "",
        turn: Text = "",
        page: PageNumber = 1,
        size: int = 24,
    ) -> HTMLResponse:
        """The failure log: by failure mode, and episode by episode."""
        _choice("size", size, THUMBNAILS)
        failed = self._source.failures.look()
        everything = failed.value.all if failed.value else ()
        found = failures.select(everything, q=q, mode=mode, site=site, robot=robot, turn=turn)
        clusters = failures.clusters(everything)
        return self._page(
            request,
            "failures",
            "Failures",
            [failed],
            failures=failed.value,
            clusters=clusters,
            most=max((c.total for c in clusters), default=1),
            part=part(found, page, size),
            wanted={"q": q, "mode": mode, "site": site, "robot": robot, "turn": turn},
            sites=sorted({f.site for f in everything if f.site}),
            took=sorted({f.turn for f in everything if f.turn}, reverse=True),
            sizes=THUMBNAILS,
            size=size,
        )

    def failure(self, request: Request, at: Place) -> HTMLResponse:
        """One episode: its timeline, its pictures, its events."""
        prefix = _prefix(at)
        opened = self._source.episode(prefix)
        failed = self._source.failures.look()
        return self._page(
            request,
            "failure",
            f"Episode {opened.timeline.manifest.episode_id}",
            [failed],
            t=opened.timeline,
            m=opened.timeline.manifest,
            prefix=prefix,
            listed=failed.value.find(prefix) if failed.value else None,
            live=False,  # sealed episodes do not change
        )

    def turns(self, request: Request, page: PageNumber = 1, size: int = 25) -> HTMLResponse:
        """Turns with success by shift, the newest first."""
        _choice("size", size, SIZES)
        turned = self._source.turns.look()
        return self._page(
            request,
            "turns",
            "Turns",
            [turned],
            turns=turned.value,
            part=part(turned.value.all if turned.value else (), page, size),
            sizes=SIZES,
            size=size,
        )

    def turn(self, request: Request, name: Text) -> HTMLResponse:
        """One turn: what it started from, its gate, its failures."""
        turned, failed, rolled = (
            self._source.turns.look(),
            self._source.failures.look(),
            self._source.rollouts.look(),
        )
        turn = turned.value.find(name) if turned.value else None
        if turned.value is not None and turn is None:
            raise Refused(404, f"no turn {name!r} among the newest; `flywheel experiments` has all")
        taken = failures.select(failed.value.all, turn=name) if failed.value else []
        return self._page(
            request,
            "turn",
            f"Turn {name}",
            [turned, failed, rolled],
            name=name,
            turn=turn,
            clusters=failures.clusters(taken),
            most=max((c.total for c in failures.clusters(taken)), default=1),
            taken=taken[:12],
            standing=rolled.value.find(turn.rollout) if rolled.value and turn and turn.rollout else None,
        )

    # ── pictures ─────────────────────────────────────────────────────────────────────────────────────

    def thumbnail(self, at: Place) -> Response:
        """The moment of failure."""
        return _jpeg(self._source.thumbnail(_prefix(at)))

    def plot(self, at: Place) -> Response:
        """The timeline, as a picture for other pages."""
        return rendering.plot(self._source.episode(_prefix(at)).timeline)

    def picture(self, at: Place, camera: Text, row: Annotated[int, Query(ge=0, le=10**9)]) -> Response:
        """One picture of a strip."""
        prefix = _prefix(at)
        found = self._source.episode(prefix).pictures.get(camera, {})
        return _jpeg(jpeg_only(found.get(row), prefix))

    # ── what every page has ──────────────────────────────────────────────────────────────────────────

    def _silent(self, robot: Robot) -> bool:
        return robot.silent(self._source.unix(), self._silence_s)

    def _page(
        self,
        request: Request,
        template: str,
        title: str,
        looks: Iterable[Seen[Any] | None],
        *,
        live: bool = True,
        **context: Any,
    ) -> HTMLResponse:
        now = self._source.unix()
        seen = [x for x in looks if x is not None]
        return rendering.page(
            template,
            503 if any(x.down and x.value is None for x in seen) else 200,
            **context,
            title=title,
            path=request.url.path.rsplit("/", 1)[-1] or "./",
            query=dict(request.query_params),
            now=now,
            notices=rendering.notices(seen, now),
            live=LIVE_S if live else 0,
            silent_robot=self._silent,
            airflow_url=self._airflow_url,
        )


def _choice(name: str, value: object, valid: Iterable[object]) -> None:
    choices = [v for v in valid if v != ""]
    if value not in (*choices, "") or (value == "" and "" not in valid):
        raise Refused(400, f"{name} = {value!r}: choose one of {', '.join(map(str, choices))}")


def _prefix(at: str) -> str:
    if not failures.PREFIX.fullmatch(at):
        raise Refused(400, f"at = {at!r}: must be where an episode lies, episodes/site=…/robot=…/date=…/ID/")
    return at


def _jpeg(data: bytes) -> Response:
    return Response(data, media_type="image/jpeg", headers={"Cache-Control": FOR_EVER})
