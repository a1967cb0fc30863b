"""The digital twin: a MuJoCo work cell, its shifts and its scripted operator."""

import os

os.environ.setdefault("MUJOCO_GL", "egl")  # read once, when mujoco is first imported
