"""The supervisor of the benchmark: a real one, killed and started again as a process of its own.

``python -m flywheel.edge.faults.supervisor STATE``: the plan lies in ``STATE/plan.json``; a line of JSON on
standard input asks for a swap: ``{"directory": …, "digest": …}``.
"""

from __future__ import annotations

import json
import os
import select
import sys
from pathlib import Path

from flywheel.edge.processes import BundleRef, Plan
from flywheel.edge.runtime import Wall, read_bundle


def main(state: Path) -> None:
    """Until SIGTERM, or until the benchmark is gone: then its end of the pipe is closed."""
    plan = Plan.model_validate_json((state / "plan.json").read_bytes())
    if plan.others:
        os.sched_setaffinity(0, plan.others)
    with Wall(plan, state=state) as wall:
        print(json.dumps({"taken_over": wall.taken_over}), flush=True)

        bench_is_gone = False

        def asked() -> bool:
            nonlocal bench_is_gone
            if select.select([sys.stdin], [], [], 0.0)[0]:
                line = sys.stdin.readline()
                if not line:
                    bench_is_gone = True
                else:
                    wanted = json.loads(line)
                    bundle = read_bundle(wanted["directory"])
                    wall.policies.swap(BundleRef(bundle=bundle, **wanted))
            return bench_is_gone

        wall.run(float("inf"), until=asked)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except KeyboardInterrupt:
        sys.exit(0)
