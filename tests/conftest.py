"""What every test gets: an environment that cannot reach a real store, hub or Airflow by accident."""

from __future__ import annotations

import os
import signal
import tempfile

import hypothesis

# At import, before any library reads its environment; inherited by every process that a test starts.
for _name in [n for n in os.environ if n.startswith(("AWS_", "FLYWHEEL_", "AIRFLOW_", "DVC_"))]:
    del os.environ[_name]

_state = tempfile.TemporaryDirectory(prefix="flywheel-tests-")  # removed when the run ends

os.environ.update(
    {
        "FLYWHEEL_HOME": f"{_state.name}/flywheel",
        "AIRFLOW_HOME": f"{_state.name}/airflow",
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AWS_EC2_METADATA_DISABLED": "true",  # boto3 would ask the network for keys
        "DVC_NO_ANALYTICS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
)

# A shell's background jobs ignore Ctrl-C, and so would all that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A shared machine stalls for longer than any deadline that would mean something; the suite has its own bound.
hypothesis.settings.register_profile(
    "flywheel", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("flywheel")
