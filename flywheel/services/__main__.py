"""The watchdog's and the keeper's own processes; see ``watchdog`` and ``keeper``."""

import sys
from pathlib import Path

from flywheel import services
from flywheel.services.keeper import Keeper, run
from flywheel.services.watchdog import watch

if __name__ == "__main__":
    if sys.argv[1] == "keep":
        home = Path(sys.argv[2])
        run(Keeper(home), lambda patience: services.revive(home, patience))
    else:
        watch(int(sys.argv[1]), lambda: services.stop(Path(sys.argv[2]), sys.argv[3:]))
