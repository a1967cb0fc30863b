"""The watchdog's own process; see ``flywheel.services.watchdog``."""

import sys
from pathlib import Path

from flywheel import services
from flywheel.services.watchdog import watch

if __name__ == "__main__":
    watch(int(sys.argv[1]), lambda: services.stop(Path(sys.argv[2]), sys.argv[3:]))
