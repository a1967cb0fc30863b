"""A robot as a service: the supervisor with its log, its metrics, and word to systemd.

``unit`` fills in the systemd unit that lies beside this module; its comments say why each line is there.
"""

from __future__ import annotations

import os
import shutil
import socket
import string
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TextIO

from flywheel.edge import realtime
from flywheel.edge.delivery import Delivery
from flywheel.edge.figures import WallResult
from flywheel.edge.log import Journal
from flywheel.edge.metrics import Metrics
from flywheel.edge.processes import Plan
from flywheel.edge.runtime import Wall
from flywheel.errors import ConfigError

UNIT_FILE = Path(__file__).parent / "flywheel-edge.service"
TELL_EVERY = 20  # looks of the supervisor: once a second


def serve(
    plan: Plan,
    seconds: float = float("inf"),
    *,
    state: Path | None = None,
    metrics_port: int | None = None,
    log: TextIO | None = None,
    on_start: Callable[[Wall], None] = lambda _: None,
    delivery: Delivery | None = None,
) -> WallResult:
    """Run a robot for ``seconds``, or until SIGTERM, and sum up.

    ``metrics_port`` (0: any) serves Prometheus on loopback; ``log`` takes JSON lines. ``on_start`` is called
    once the robot runs. ``delivery`` brings it releases while it runs.
    """
    with ExitStack() as stack:
        metrics = None if metrics_port is None else stack.enter_context(Metrics(metrics_port))
        if plan.others:  # this process and its threads keep off System 1's core
            before = os.sched_getaffinity(0)
            os.sched_setaffinity(0, plan.others)
            stack.callback(os.sched_setaffinity, 0, before)
        if delivery is None:
            wall = Wall(plan, state=state)
        else:
            stack.enter_context(delivery)
            wall = Wall(
                plan, state=state, told=delivery.heard, previous=delivery.previous, trial=delivery.trial
            )
        stack.enter_context(wall)
        if log is not None:
            rings = (wall.shared.log, wall.shared.events)
            journal = Journal(*rings, from_start=not wall.taken_over, to=log, robot=plan.robot)
            stack.enter_context(journal)
            ports = {} if metrics is None else {"metrics_port": metrics.port}
            told = {role: said.get("privileges") for role, said in wall.told.items()}
            journal.log.info("started", taken_over=wall.taken_over, **ports, privileges=told.get("system1"))
        notify("READY=1")
        on_start(wall)
        if delivery is not None:
            delivery.start(wall)
        looks = 0

        def look() -> bool:
            nonlocal looks
            if looks % TELL_EVERY == 0:
                notify("WATCHDOG=1")
                if metrics is not None:
                    metrics.update(wall)
            looks += 1
            return False

        try:
            return wall.run(seconds, until=look)
        finally:
            notify("STOPPING=1")


def notify(message: str) -> None:
    """sd_notify(3): a datagram to the socket that systemd names; nothing where it names none."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    with socket.socket(socket.AF_UNIX, kind) as s, suppress(OSError):  # busy: the next beat comes in a second
        s.sendto(message.encode(), address)


def unit(policy: Path, user: str, priority: int = 50, metrics_port: int = 9464) -> str:
    """The systemd unit for this machine and this installation."""
    program = shutil.which("flywheel", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if program is None:
        raise ConfigError("flywheel: the program is not on PATH; install the package first")
    for name, value in (("policy", str(policy)), ("user", user), ("program", program)):
        if not value or any(c.isspace() or c in "%$\"'\\" for c in value):
            raise ConfigError(f"{name} = {value!r}: must hold no blanks, quotes, % or $ in a systemd unit")
    cpu, others = realtime.cores()
    everywhere = sorted(others | ({cpu} if cpu is not None else set()))
    return string.Template(UNIT_FILE.read_text(encoding="utf-8")).substitute(
        program=program,
        policy=policy.absolute(),
        user=user,
        priority=priority,
        port=metrics_port,
        cores=" ".join(map(str, everywhere)),
    )
