"""What the gate leaves behind: ``gate.json`` (canonical), ``gate.html`` (people), ``gate.xml`` (JUnit)."""

from __future__ import annotations

import math
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

from flywheel.schema import Check, GateReport, Verdict, sha256_bytes

if TYPE_CHECKING:
    from jinja2 import Template

FILES = ("gate.json", "gate.html", "gate.xml")
_COLOUR = {Verdict.PROMOTE: "#2e7d32", Verdict.HOLD: "#b26a00", Verdict.ROLL_BACK: "#b71c1c"}
_SHADES = ("#2e7d32", "#b71c1c", "#ef6c00", "#6a1b9a", "#455a64", "#00838f")  # success first, then reasons

_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Gate: {{ report.verdict }}</title>
<style>
 body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
 h1 span, td.verdict { font-weight: 600 }
 code { font-size: .85em; overflow-wrap: anywhere }
 table { border-collapse: collapse; width: 100% }
 th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid #ddd; vertical-align: top }
 td.number { font-variant-numeric: tabular-nums; white-space: nowrap }
 small { color: #555 }
 .legend i { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 .8em }
</style></head><body>
<h1>Gate: <span style="color:{{ colour[report.verdict] }}">{{ report.verdict }}</span></h1>
<p>candidate <code>{{ report.candidate_digest or "incomplete" }}</code><br>
current <code>{{ report.current_digest }}</code><br>
report <code>{{ digest }}</code></p>
{% if report.reasons %}<h2>Why not promoted</h2>
<ul>{% for r in report.reasons %}<li>{{ r }}</li>{% endfor %}</ul>{% endif %}
<h2>Checks</h2>
<table><thead><tr>
<th>check</th><th>verdict</th><th>found</th><th>interval and bar</th><th>n</th><th>bar</th>
</tr></thead><tbody>
{% for c in report.checks %}<tr><td>{{ c.name }}</td>
<td class="verdict" style="color:{{ colour[c.verdict] }}">{{ c.verdict }}</td>
<td class="number">{{ figures(c) }}</td><td>{{ interval(c) }}</td><td class="number">{{ c.n }}</td>
<td>{{ c.bar }}{% if c.evidence.reason %}<br><small>{{ c.evidence.reason }}</small>{% endif %}</td></tr>
{% endfor %}</tbody></table>
{% for name, rows, reasons in outcomes %}<h2>{{ name }}: how attempts ended</h2>
<table><tbody>{% for who, rate, svg in rows %}
<tr><td>{{ who }}</td><td class="number">{{ rate }}</td><td>{{ svg }}</td></tr>{% endfor %}
</tbody></table>
<p class="legend">{% for r, shade in reasons %}<i style="background:{{ shade }}"></i>{{ r }}{% endfor %}</p>
{% endfor %}
{% for title, scenes in scenarios %}<h2>{{ title }}</h2>
<p>{% for s in scenes %}<code>{{ s }}</code> {% endfor %}</p>{% endfor %}
</body></html>
"""


def clear(out: Path) -> None:
    """Make ``out`` and remove an earlier run's reports: a gate that dies must not leave a verdict behind."""
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (out / name).unlink(missing_ok=True)


def write(report: GateReport, out: Path) -> None:
    """Write all three files; ``gate.json`` last and atomically, so its presence means a whole report."""
    (out / "gate.html").write_text(html(report), encoding="utf-8")
    (out / "gate.xml").write_bytes(junit(report))
    part = out / "gate.json.part"
    with part.open("wb") as f:
        f.write(report.to_bytes())
        f.flush()
        os.fsync(f.fileno())
    part.replace(out / "gate.json")


def sentence(check: Check) -> str:
    """One check in words: what was found against which bar."""
    if check.value is None:
        return str(check.evidence.get("reason", "no evidence"))
    return f"{figures(check)} over {check.n}; bar: {check.bar}"


def figures(check: Check) -> str:
    """Value and interval in the check's own unit."""
    if check.value is None:
        return "–"
    scale = check.evidence.get("scale")
    factor, form, unit = {"difference": (100.0, "+.4g", " points"), "ratio": (1.0, ".3g", "")}.get(
        str(scale), (1.0, ".4g", "")
    )
    text = ("×" if scale == "ratio" else "") + format(factor * check.value, form)
    if check.low is not None and check.high is not None:
        text += f" [{factor * check.low:{form}}, {factor * check.high:{form}}]"
    text += unit
    if "candidate_median" in check.evidence:
        e = check.evidence
        medians = (float(e[k]) for k in ("current_median", "candidate_median"))
        text += f"; {' → '.join(f'{m:.0f}' if m >= 1000 else f'{m:.3g}' for m in medians)} {e['unit']}"
    return text


def junit(report: GateReport) -> bytes:
    """JUnit XML: a test case per check; *hold* and *roll back* are failures of that type."""
    suite = ET.Element("testsuite", name="gate", tests=str(len(report.checks)), errors="0", skipped="0")
    suite.set("failures", str(sum(c.verdict is not Verdict.PROMOTE for c in report.checks)))
    properties = ET.SubElement(suite, "properties")
    for name, value in (
        ("verdict", report.verdict.value),
        ("candidate_digest", report.candidate_digest),
        ("current_digest", report.current_digest),
        ("report_digest", sha256_bytes(report.to_bytes())),
    ):
        ET.SubElement(properties, "property", name=name, value=value)
    for c in report.checks:
        case = ET.SubElement(suite, "testcase", classname="gate", name=c.name)
        if c.verdict is not Verdict.PROMOTE:
            failure = ET.SubElement(case, "failure", type=c.verdict.value)
            failure.set("message", str(c.evidence.get("reason") or sentence(c)))
        ET.SubElement(case, "system-out").text = sentence(c)
    root = ET.Element("testsuites")
    root.append(suite)
    for element in root.iter():  # XML 1.0 has no control characters
        element.text = _printable(element.text)
        for key, value in element.items():
            element.set(key, _printable(value) or "")
    return bytes(ET.tostring(root, encoding="utf-8", xml_declaration=True))


def html(report: GateReport) -> str:
    """One self-contained page: no script, no outside resource."""
    from markupsafe import Markup

    # An absent reason is normal in evidence; everything else absent is a mistake in the template.
    checks = [c.model_copy(update={"evidence": {"reason": None} | c.evidence}) for c in report.checks]
    outcomes = []
    for c in checks:
        sides = [(who, c.evidence[who]) for who in ("current", "candidate") if _has_rate(c.evidence.get(who))]
        reasons = list(dict.fromkeys(r for _, side in sides for r in side["failures"]))
        shades = dict(zip(("success", *reasons), _SHADES * (1 + len(reasons)), strict=False))
        rows = [(who, _rate(side["success"]), Markup(_stack(side, shades))) for who, side in sides]
        if rows:
            outcomes.append((c.name, rows, list(shades.items())))
    scenarios = [
        (f"{c.name}: {kind.replace('_', ' ')} ({len(scenes)})", scenes)
        for c in checks
        if isinstance(c.evidence.get("scenarios"), dict)
        for kind, scenes in c.evidence["scenarios"].items()
        if scenes
    ]
    return _template().render(
        report=report.model_copy(update={"checks": tuple(checks)}),
        digest=sha256_bytes(report.to_bytes()),
        colour=_COLOUR,
        figures=figures,
        interval=lambda c: Markup(_interval(c)),
        outcomes=outcomes,
        scenarios=scenarios,
    )


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    return Environment(autoescape=True, undefined=StrictUndefined).from_string(_TEMPLATE)


def _interval(check: Check) -> str:
    """SVG of the interval, the estimate and the bar; ratios on a logarithmic axis."""
    bar, scale = check.evidence.get("threshold"), check.evidence.get("scale")
    if check.value is None or check.low is None or check.high is None or not isinstance(bar, int | float):
        return ""
    ratio = scale == "ratio"
    values = [check.low, check.value, check.high, float(bar), 1.0 if ratio else 0.0]
    if ratio:
        values = [math.log(max(v, 1e-6)) for v in values]
    span = max(max(values) - min(values), 1e-6)
    low, value, high, at, same = (12 + 236 * (v - min(values)) / span for v in values)
    colour = _COLOUR[check.verdict]
    return (
        f'<svg width="260" height="26" role="img" aria-label="{figures(check)}, bar {bar:.4g}">'
        f'<line x1="{same:.1f}" x2="{same:.1f}" y1="2" y2="24" stroke="#bbb"/>'
        f'<line x1="{at:.1f}" x2="{at:.1f}" y1="2" y2="24" stroke="#222" stroke-dasharray="3 2"/>'
        f'<line x1="{low:.1f}" x2="{high:.1f}" y1="13" y2="13" stroke="{colour}" stroke-width="3"/>'
        f'<circle cx="{value:.1f}" cy="13" r="4" fill="{colour}"/></svg>'
    )


def _stack(side: dict[str, Any], shades: dict[str, str]) -> str:
    """SVG bar of how attempts ended, successes first."""
    n = max(1, int(side["success"]["n"]))
    parts = {"success": round(side["success"]["mean"] * n), **side["failures"]}
    x, out = 0.0, []
    for reason, count in parts.items():
        width = 480 * count / n
        out.append(f'<rect x="{x:.1f}" y="2" width="{width:.1f}" height="16" fill="{shades[reason]}"/>')
        x += width
    return f'<svg width="480" height="20" role="img">{"".join(out)}</svg>'


def _has_rate(side: object) -> bool:
    return isinstance(side, dict) and isinstance(side.get("success"), dict) and "failures" in side


def _rate(p: dict[str, float]) -> str:
    return f"{100 * p['mean']:.1f} % [{100 * p['low']:.1f}, {100 * p['high']:.1f}] of {p['n']}"


def _printable(text: str | None) -> str | None:
    return None if text is None else "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def metrics(report: GateReport) -> dict[str, float | str]:
    """The report as flat figures, for an experiment tracker's table."""
    out: dict[str, float | str] = {"verdict": report.verdict.value}
    for c in report.checks:
        if c.value is not None:
            out[c.name.replace(": ", "_").replace(" ", "_")] = c.value
    return out
