"""Identification of the twin's parameters from recorded episodes, by output error over short windows.

The parameters are those under which the twin, run open loop from the start of each window, comes closest to
what the robot did, in units of the sensors' noise (Ljung, *System Identification*, 2nd ed., 7.4; as multiple
shooting: Bock, *Springer Ser. Chem. Phys.* 18 (1981) 102). The state at the start of a window was measured
with noise too. It is a nuisance parameter of each window, eliminated by projection (Golub and Pereyra, SIAM
J. Numer. Anal. 10 (1973) 413; with Kaufman's Jacobian, BIT 15 (1975) 49): taking it as measured biases the
rest. ``mujoco.sysid`` does that, and has one variance for all sensors, so its intervals are not used here.

What a datasheet knows counts as one more measurement of each parameter (a normal prior,
``parameters.KINDS``), so that what the episodes do not show stays where the model had it. A parameter is
*identified* only if the episodes make it far more certain than that (``IDENTIFIED``): for a serial
arm only groups of inertial parameters can be (Gautier and Khalil, IEEE Trans. Robot. Autom. 6 (1990) 368),
and which, depends on how it moved (Gautier and Khalil, Int. J. Robot. Res. 11 (1992) 362).

The arm is identified from windows of free motion, what it carries from the others, with the arm as it was
found: where a box hangs on the cup is not recorded, and must not be mistaken for something in the arm.

Intervals come from the Jacobian at the optimum (Fisher information and prior) or, where these are wider, from
how the windows disagree (White, Econometrica 48 (1980) 817; clusters: Liang and Zeger, Biometrika 73 (1986)
13): what the model cannot explain is no white noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.stats import t as student_t

from flywheel.errors import StageError
from flywheel.twin.arm import STATE, Arms, FloatArray, delayed, nominal_values, run
from flywheel.twin.cell import JOINTS, MODEL_SHA256
from flywheel.twin.parameters import JOINT_NAMES, KINDS, Estimate, Scale, TwinParameters, Values
from flywheel.twin.replay import WINDOWS_S, Recorded, Window, Windows, cut, errors, windows

WINDOW_S = 0.2
PER_EPISODE = 6  # windows taken of an episode, those in which the arm moves most
IDENTIFIED = 0.3  # standard deviation against the prior's
LEAST_EPISODES = 3  # two to fit, one to hold out
LEAST_WINDOWS = 3  # of an episode
LEAST_SHARE = 0.3  # of the parameters that an episode alone must make twice as certain
# An encoder of 16 bits, and what its difference over some ticks makes of it; for the question whether an
# episode excites enough, which a simulated robot without noise would always answer with yes.
ENCODER = np.repeat([1e-4, 1e-3], JOINTS)
FLOOR = np.repeat([1e-6, 1e-5], JOINTS)  # float32, as recorded
PASSES = 8
OUTLIER = 1.5  # mean square of what is left of a window, against the median window's …
KEPT = 0.75  # … and the share of the windows that stays whatever is left of them
_DZ = 0.01
_DX = np.repeat([1e-4, 1e-3], JOINTS)
_T95 = 1.96

OnProgress = Callable[[str], None]


@dataclass(frozen=True)
class Excited:
    """An episode's windows in free motion and with something on the cup, or why it says too little."""

    windows: tuple[Window, ...]
    carrying: tuple[Window, ...] = ()
    reason: str = ""


class _Point(NamedTuple):
    """At some parameters, in units of noise: residuals without what the starts can explain ``[W, M]``, a
    basis of that ``[W, M, 10]``, the best starts ``[W, 10]`` and the states predicted from them
    ``[W, M]``."""

    residual: FloatArray
    basis: FloatArray
    starts: FloatArray
    predicted: FloatArray


class _Fit:
    """Residuals and their Jacobian over windows, as functions of ``z`` (``parameters.Scale``)."""

    def __init__(self, w: Windows, scale: Scale, noise: FloatArray, others: Values) -> None:
        self.w, self.scale, self.noise, self.others = w, scale, noise, others
        self._seen: tuple[bytes, _Point] | None = None

    def at(self, z: FloatArray) -> _Point:
        """Residuals at ``z`` ``[P]``."""
        key = z.tobytes()
        if self._seen is None or self._seen[0] != key:
            self._seen = (key, self._at(z))
        return self._seen[1]

    def _at(self, z: FloatArray) -> _Point:
        arms = Arms({**self.others, **self.scale.values(z)})
        count = len(self.w.where)
        starts = np.concatenate([self.w.starts + d for d in (np.zeros(STATE), *np.diag(_DX))])
        runs = self._run(arms, starts, 1 + STATE).reshape(1 + STATE, count, -1)
        slopes = np.moveaxis((runs[1:] - runs[0]) / _DX[:, None, None], 0, -1)
        basis, triangle = np.linalg.qr(slopes)
        left = self._measured() - runs[0]
        step = np.linalg.solve(triangle, np.einsum("wmk,wm->wk", basis, left)[..., None])[..., 0]
        better = self.w.starts + step
        predicted = self._run(arms, better, 1).reshape(count, -1)
        return _Point(_project(self._measured() - predicted, basis), basis, better, predicted)

    def jacobian(self, z: FloatArray) -> FloatArray:
        """Of the residuals by ``z``, ``[W, M, P]``, by differences (Kaufman's: the basis stays)."""
        point, values = self.at(z), {**self.others, **self.scale.values(z)}
        count = len(self.w.where)
        columns = []
        for i, name in enumerate(self.scale.around):
            sign = 1.0 if z[i] + _DZ <= self.scale.high[i] else -1.0
            moved = values | {name: self.scale.value(name, float(z[i]) + sign * _DZ)}
            there = self._run(Arms(moved), point.starts, 1).reshape(count, -1)
            columns.append(_project((point.predicted - there) / (sign * _DZ), point.basis))
        return np.stack(columns, axis=-1)

    def solve(self, z: FloatArray) -> FloatArray:
        """The best ``z``, from here on.

        Far from it, the misfit is hundreds of times the noise, and in units of the noise the prior would
        weigh nothing: what is not observable would run away before the rest is found. So the unit is the
        misfit, for as long as that falls.
        """
        unit = self.misfit(z)
        for _ in range(PASSES):
            z = self._step(z, max(unit, 1.0))
            before, unit = unit, self.misfit(z)
            if unit > 0.9 * before:
                break
        return self._step(z, 1.0)

    def _step(self, z: FloatArray, unit: float) -> FloatArray:
        def residual(x: FloatArray) -> FloatArray:
            return np.concatenate([self.at(x).residual.ravel() / unit, x])

        def jacobian(x: FloatArray) -> FloatArray:
            return np.concatenate([self.jacobian(x).reshape(-1, x.size) / unit, np.eye(x.size)])

        found = least_squares(
            residual,
            z,
            jac=jacobian,
            bounds=(self.scale.low - 1e-9, self.scale.high),
            xtol=1e-4,
            ftol=1e-3,
            gtol=1e-6,
            max_nfev=4,
        )
        return np.asarray(found.x)

    def misfit(self, z: FloatArray) -> float:
        """Root mean square of the residuals, in units of the noise; 1 if all that is left is noise."""
        r = self.at(z).residual
        return float(np.sqrt(np.sum(r**2) / (r.size - STATE * len(r))))

    def left(self, z: FloatArray, of: NDArray[np.intp]) -> FloatArray:
        """Root mean square of what the fit leaves of each signal in some windows, in its unit ``[10]``; the
        degrees of freedom that the starts and parameters took are given back."""
        r = self.at(z).residual[of].reshape(-1, STATE)
        free = 1.0 - (STATE * len(of) + z.size) / r.size
        return np.asarray(np.sqrt(np.mean(r**2, axis=0) / free) * self.noise)

    def _measured(self) -> FloatArray:
        return np.asarray((self.w.states / self.noise).reshape(len(self.w.where), -1))

    def _run(self, arms: Arms, starts: FloatArray, times: int) -> FloatArray:
        models = [arms.carrying if at.carrying else arms.free for at in self.w.where] * times
        tau = np.tile(delayed(self.w.tau, arms.values["delay"]), (times, 1, 1))
        return run(models, starts, tau) / self.noise


def identify(
    recorded: Sequence[Recorded],
    *,
    holdout: float = 0.25,
    window_s: float = WINDOW_S,
    per_episode: int = PER_EPISODE,
    on_progress: OnProgress = lambda _: None,
) -> TwinParameters:
    """Identify the twin's parameters; every fourth episode (``holdout``) is kept out to measure the error.

    Raises:
        StageError: fewer than ``LEAST_EPISODES`` episodes excite the arm enough; says why each does not.
    """
    on_progress("excitation")
    judged = excitation(recorded, window_s, per_episode)
    refused = {r.episode_id: e.reason for r, e in zip(recorded, judged, strict=True) if e.reason}
    kept = [i for i, e in enumerate(judged) if not e.reason]
    if len(kept) < LEAST_EPISODES:
        first = "; ".join(f"{name}: {why}" for name, why in list(refused.items())[:5])
        raise StageError(
            f"{len(kept)} of {len(recorded)} episodes excite the arm enough, {LEAST_EPISODES} are needed; "
            f"{first}"
        )
    each = max(round(1.0 / holdout), 2)
    out = kept[each - 1 :: each] or kept[-1:]
    fitted = [i for i in kept if i not in out]
    held_out = [recorded[i] for i in out]
    model = nominal_values()

    on_progress("arm")
    chosen = [at for i in fitted for at in judged[i].windows]
    scale = Scale({n: v for n, v in model.items() if n != "payload"})
    fit, z = _fitted(cut(recorded, chosen, window_s), scale, model)
    sd, condition = _certainty(fit, z, [at.episode for at in fit.w.where])
    estimates = _estimates(scale, z, sd)
    values = model | scale.values(z)

    on_progress("payload")
    carrying = [at for i in fitted for at in judged[i].carrying]
    episodes = {at.episode for at in carrying}
    if len(episodes) >= LEAST_EPISODES - 1:
        scale = Scale({"payload": model["payload"]})
        load, z = _fitted(cut(recorded, carrying, window_s), scale, values)
        sd, _ = _certainty(load, z, [at.episode for at in load.w.where], few=True)
        estimates |= _estimates(scale, z, sd)
        values |= scale.values(z)

    on_progress("held out")
    return TwinParameters(
        model_sha256=MODEL_SHA256,
        parameters=estimates,
        episodes={recorded[i].episode_id: recorded[i].sha256 for i in fitted},
        held_out={r.episode_id: r.sha256 for r in held_out},
        refused=refused,
        robots=tuple(sorted({recorded[i].robot for i in kept})),
        window_s=window_s,
        windows=len(fit.w.where),
        condition=condition,
        noise=dict(
            zip([f"{s}.{n}" for s in ("q", "dq") for n in JOINT_NAMES], map(float, fit.noise), strict=True)
        ),
        before=tuple(e for s in WINDOWS_S for e in errors(held_out, Arms(model), s)),
        after=tuple(e for s in WINDOWS_S for e in errors(held_out, Arms(values), s)),
    )


def _fitted(w: Windows, scale: Scale, others: Values) -> tuple[_Fit, FloatArray]:
    """The fit, twice: then with the noise that the first one left, and without windows that it cannot explain
    (``OUTLIER``)."""
    fit = _Fit(w, scale, noise_of(w), others)
    z = fit.solve(np.zeros(len(scale.around)))
    misfit = np.mean(fit.at(z).residual ** 2, axis=1)
    bound = max(OUTLIER * float(np.median(misfit)), float(np.quantile(misfit, KEPT)))
    explained = np.flatnonzero(misfit <= bound)
    noise = np.maximum(fit.left(z, explained), FLOOR)
    w = Windows(
        tuple(w.where[i] for i in explained), w.starts[explained], w.tau[explained], w.states[explained]
    )
    fit = _Fit(w, scale, noise, others)
    return fit, fit.solve(z)


def excitation(recorded: Sequence[Recorded], window_s: float, per_episode: int) -> list[Excited]:
    """Which windows of each episode to use; none, with the reason, of one that says too little.

    An episode must have some windows of free motion, and alone make ``LEAST_SHARE`` of the parameters at
    least twice as certain as the prior, with the sensors' noise that it shows.
    """
    model = nominal_values()
    scale = Scale({n: v for n, v in model.items() if n != "payload"})
    found = []
    for i, r in enumerate(recorded):
        where = windows([r], window_s, moving=True)
        free = _busiest(r, [at for at in where if not at.carrying], window_s, per_episode)
        if len(free) < LEAST_WINDOWS:
            why = f"{len(free)} windows of {window_s:g} s in which it moves freely, at least {LEAST_WINDOWS}"
            found.append(Excited((), reason=f"{why} are needed; {_slowest(r)}"))
            continue
        w = cut([r], free, window_s)
        fit = _Fit(w, scale, np.maximum(noise_of(w), ENCODER), model)
        j = fit.jacobian(np.zeros(len(scale.around))).reshape(-1, len(scale.around))
        sd = np.sqrt(np.diag(np.linalg.inv(j.T @ j + np.eye(j.shape[1]))))
        twice, need = int(np.sum(sd < 0.5)), int(np.ceil(LEAST_SHARE * sd.size))
        if twice < need:
            why = f"would make {twice} of {sd.size} parameters twice as certain, at least {need} are needed"
            found.append(Excited((), reason=f"{why}; {_slowest(r)}"))
            continue
        loaded = _busiest(r, [at for at in where if at.carrying], window_s, per_episode)
        found.append(
            Excited(
                tuple(at._replace(episode=i) for at in free), tuple(at._replace(episode=i) for at in loaded)
            )
        )
    return found


def _busiest(r: Recorded, where: Sequence[Window], window_s: float, most: int) -> list[Window]:
    """The windows in which the joints' speeds vary most, in order of time."""
    if not where:
        return []
    speeds = cut([r], where, window_s).states[:, :, JOINTS:]
    order = np.argsort(-np.std(speeds, axis=1).sum(axis=1), kind="stable")[:most]
    return [where[i] for i in sorted(order.tolist())]


def _slowest(r: Recorded) -> str:
    fastest = np.abs(r.state[:, JOINTS:]).max(axis=0)
    return f"slowest joint {JOINT_NAMES[int(np.argmin(fastest))]}, at most {fastest.min():.3f} rad/s"


def noise_of(w: Windows) -> FloatArray:
    """Standard deviation of white noise on each signal ``[10]``, from third differences, to which smooth
    motion adds little (von Neumann et al., Ann. Math. Stat. 12 (1941) 153, taken further)."""
    third = np.diff(w.states, n=3, axis=1)
    return np.asarray(np.maximum(np.sqrt(np.mean(third**2, axis=(0, 1)) / 20.0), FLOOR))  # 1 + 9 + 9 + 1


def _project(columns: FloatArray, basis: FloatArray) -> FloatArray:
    """What is left of ``[W, M]`` without its part in the span of an orthonormal basis ``[W, M, k]``."""
    return np.asarray(columns - np.einsum("wmk,wk->wm", basis, np.einsum("wmk,wm->wk", basis, columns)))


def _certainty(
    fit: _Fit, z: FloatArray, clusters: Sequence[int], few: bool = False
) -> tuple[FloatArray, float | None]:
    """Standard deviations ``[P]``, in the prior's, and the condition number over what is identified.

    Windows are clusters of their own; with ``few``, each of ``clusters`` (the episode) is one, and Student's
    quantile takes the place of the normal one.
    """
    j, r = fit.jacobian(z), fit.at(z).residual
    p = z.size
    information = np.einsum("wmp,wmq->pq", j, j)
    covariance = np.linalg.inv(information + np.eye(p))
    scores = np.einsum("wmp,wm->wp", j, r)
    if few:
        scores = np.array([scores[np.equal(clusters, c)].sum(axis=0) for c in sorted(set(clusters))])
    count = len(scores)
    spread = scores.T @ scores * (count / max(count - 1, 1))
    robust = np.diag(covariance @ (spread + np.eye(p)) @ covariance)
    widen = (student_t.ppf(0.975, max(count - 1, 1)) / _T95) ** 2 if few else 1.0
    sd = np.sqrt(np.maximum(np.diag(covariance), widen * robust))
    known = np.flatnonzero(sd < IDENTIFIED)
    if not known.size:
        return sd, None
    part = information[np.ix_(known, known)]
    size = np.sqrt(np.diag(part))
    return sd, float(np.linalg.cond(part / np.outer(size, size)))


def _estimates(scale: Scale, z: FloatArray, sd: FloatArray) -> dict[str, Estimate]:
    found = {}
    for i, name in enumerate(scale.around):
        value, low, high = (scale.value(name, float(z[i] + k * _T95 * sd[i])) for k in (0, -1, 1))
        found[name] = Estimate(
            nominal=scale.around[name],
            value=value,
            low=min(low, value),
            high=max(high, value),
            identified=bool(sd[i] < IDENTIFIED),
            unit=KINDS[name.partition(".")[0]].unit,
        )
    return found
