"""The twin: a MuJoCo work cell with a torque-controlled arm, a suction cup, boxes, a bin and two cameras.

Task: "pick the COLOUR box and place it in the bin". Physics runs at 1 kHz; everything random comes from the
seed given to :meth:`Cell.reset`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import mujoco
import numpy as np
from numpy.typing import NDArray

from flywheel.errors import ConfigError
from flywheel.schema import sha256_bytes
from flywheel.twin.kinematics import FORE_M, SHOULDER_M, TOOL_M, UPPER_M, FloatArray, forward, inverse
from flywheel.twin.operator import BIN_M
from flywheel.twin.parameters import TwinParameters, apply
from flywheel.twin.shift import COLOURS, Shift

JOINTS = 5
BOXES = 3
STEP_NS = 1_000_000
CAMERAS: Mapping[str, int] = MappingProxyType({"wrist": 64, "scene": 96})  # name -> side, px
BIN_HALF_M = 0.09
HOME_M = np.array([0.42, -0.02, 0.30])
GRASP_RADIUS_M = 0.02  # how far the cup's centre may be from the centre of the face it sucks on
GRASP_GAP_M = 0.010
CARRY_M = 0.05  # a box this far above where it rested has been taken
REACH_M = 0.05  # the cup is at the target

_WALLS = "".join(
    f'<geom type="box" size="{sx} {sy} .025" pos="{BIN_M[0] + dx} {BIN_M[1] + dy} .025" rgba=".18 .18 .2 1"/>'
    for sx, sy, dx, dy in (
        (BIN_HALF_M, 0.004, 0, BIN_HALF_M),
        (BIN_HALF_M, 0.004, 0, -BIN_HALF_M),
        (0.004, BIN_HALF_M, BIN_HALF_M, 0),
        (0.004, BIN_HALF_M, -BIN_HALF_M, 0),
    )
)
_STRIPES = "".join(
    f'<geom class="paint" name="stripe{i}" type="box" size=".6 .02 .0004" pos=".35 {-0.56 + 0.16 * i} .0004"/>'
    for i in range(8)
)
_BOXES = "".join(
    f'<body name="box{i}" pos="0.4 {0.1 * i} .02"><freejoint/>'
    f'<geom name="box{i}" class="touched" type="box" size=".02 .02 .02" mass=".05" friction=".8 .01 .001"/></body>'
    for i in range(BOXES)
)
MJCF = f"""
<mujoco model="pick-and-place cell">
 <compiler angle="radian" autolimits="true"/>
 <option timestep="0.001" integrator="implicitfast" cone="pyramidal" iterations="12" ls_iterations="8">
  <flag sleep="enable"/>
 </option>
 <visual><quality shadowsize="0" offsamples="0"/><global offwidth="480" offheight="480"/><map znear="0.005"/>
  <headlight ambient=".35 .35 .35" diffuse=".3 .3 .3" specular="0 0 0"/></visual>
 <default><default class="link"><geom contype="0" conaffinity="0" rgba=".95 .6 .1 1"/></default>
  <default class="touched"><geom contype="3" conaffinity="3"/></default>
  <default class="paint"><geom contype="0" conaffinity="0" rgba="0 0 0 0"/></default></default>
 <worldbody>
  <light name="key" pos="0.4 0 1.6" dir="0 0 -1" diffuse=".6 .6 .6" specular="0 0 0" castshadow="false"/>
  <geom name="table" class="touched" type="box" size=".6 .6 .02" pos=".35 0 -.02" friction=".8 .01 .001"/>
  {_STRIPES}
  <geom name="bin" type="box" size="{BIN_HALF_M} {BIN_HALF_M} .002" pos="{BIN_M[0]} {BIN_M[1]} .002"
   rgba=".25 .25 .28 1"/>{_WALLS}
  <camera name="scene" pos="1.15 -0.15 0.85" xyaxes="0.17 0.985 0 -0.62 0.11 0.78" fovy="48"/>
  <body name="yaw" pos="0 0 {SHOULDER_M}">
   <joint name="yaw" axis="0 0 1" damping="4" armature=".1" range="-2.5 2.5"/>
   <geom class="link" type="cylinder" size=".05 .06" rgba=".9 .9 .9 1" mass="3"/>
   <body name="shoulder"><joint name="shoulder" axis="0 1 0" damping="4" armature=".1" range="-2.5 2.5"/>
    <geom class="link" type="capsule" fromto="0 0 0 {UPPER_M} 0 0" size=".03" mass="2"/>
    <body name="elbow" pos="{UPPER_M} 0 0"><joint name="elbow" axis="0 1 0" damping="3" armature=".1" range="-2.8 2.8"/>
     <geom class="link" type="capsule" fromto="0 0 0 {FORE_M} 0 0" size=".025" mass="1.5"/>
     <body name="wrist" pos="{FORE_M} 0 0"><joint name="wrist" axis="0 1 0" damping="1" armature=".05" range="-3.1 3.1"/>
      <geom class="link" type="sphere" size=".025" mass=".15"/>
      <body name="tool"><joint name="roll" axis="1 0 0" damping=".5" armature=".02" range="-3.1 3.1"/>
       <geom class="link" type="capsule" fromto=".01 0 0 {TOOL_M - 0.012} 0 0" size=".008" mass=".12" rgba=".3 .3 .3 1"/>
       <geom name="cup" type="sphere" pos="{TOOL_M - 0.008} 0 0" size=".008" mass=".03" rgba=".1 .1 .1 1"
        contype="2" conaffinity="2" friction=".6 .01 .001"/>
       <site name="cup" pos="{TOOL_M} 0 0"/>
       <camera name="wrist" pos="0 0 .06" xyaxes="0 -1 0 0 0 1" fovy="90"/>
  </body></body></body></body></body>
  {_BOXES}
 </worldbody>
 <actuator>{"".join(f'<motor joint="{j}"/>' for j in ("yaw", "shoulder", "elbow", "wrist", "roll"))}</actuator>
 <equality>{"".join(f'<weld name="grasp{i}" body1="tool" body2="box{i}" active="false"/>' for i in range(BOXES))}
 </equality>
</mujoco>"""


MODEL_SHA256 = sha256_bytes(MJCF.encode())


def twin_digest(parameters: TwinParameters | None) -> str:
    """What names a twin: hex sha256 over its model's and, where there are any, its parameters' digests."""
    return sha256_bytes(f"{MODEL_SHA256} {parameters.digest if parameters is not None else ''}\n".encode())


class Cell:
    """One cell in one shift. Not thread-safe; rendering binds to the thread that first renders.

    With ``parameters``, the arm and what it carries are as those were identified; ``ConfigError`` if that
    was for another model.
    """

    def __init__(self, shift: Shift, parameters: TwinParameters | None = None) -> None:
        self.shift = shift
        self.model = mujoco.MjModel.from_xml_string(MJCF)
        values = parameters.values if parameters is not None else {}
        if parameters is not None:
            if parameters.model_sha256 != MODEL_SHA256:
                raise ConfigError(
                    f"model_sha256 = {parameters.model_sha256[:12]}: these parameters were identified for another "
                    f"model than the twin's {MODEL_SHA256[:12]}; run `flywheel twin identify` again"
                )
            apply(self.model, values)
        self._box_kg = values.get("payload", shift.mass_kg)
        self._delay = Delay(values.get("delay", 0.0)) if values.get("delay", 0.0) > 0.0 else None
        self.data = mujoco.MjData(self.model)
        m = self.model
        self._light = m.light_diffuse.copy()
        self._ambient = np.array(m.vis.headlight.ambient)
        self._head = np.array(m.vis.headlight.diffuse)
        self._camera = m.camera("wrist").id
        self._camera_pos = m.cam_pos[self._camera].copy()
        self._camera_quat = m.cam_quat[self._camera].copy()
        self._tool = m.body("tool").id
        self._cup = m.site("cup").id
        self._box_body = [m.body(f"box{i}").id for i in range(BOXES)]
        self._box_geom = [m.geom(f"box{i}").id for i in range(BOXES)]
        self._box_qpos = [int(m.jnt_qposadr[m.body_jntadr[b]]) for b in self._box_body]
        self._box_dof = [int(m.jnt_dofadr[m.body_jntadr[b]]) for b in self._box_body]
        self._weld = [m.equality(f"grasp{i}").id for i in range(BOXES)]
        self._eyes: _Eyes | None = None
        # views that live as long as the data: attribute look-ups cost more than the arithmetic at 1 kHz
        self.qpos: FloatArray = self.data.qpos
        self.q: FloatArray = self.data.qpos[:JOINTS]
        self.dq: FloatArray = self.data.qvel[:JOINTS]
        self.bias: FloatArray = self.data.qfrc_bias[:JOINTS]
        self._ctrl: FloatArray = self.data.ctrl
        self._full_mass = np.zeros((m.nv, m.nv))
        self.damping: FloatArray = np.asarray(m.dof_damping).reshape(-1)[:JOINTS].copy()
        self.rng = np.random.default_rng(0)
        self.colours: tuple[str, ...] = ()
        self.target = 0
        self.held = -1  # index of the box on the cup
        self.ticks = 0
        self._rest_z = np.zeros(BOXES)
        self._released_high = False
        self.reset(0)

    def reset(self, seed: int, target: str | None = None) -> None:
        """A new scene: lights, boxes, where they lie, which is asked for and where the arm starts.

        Raises:
            ConfigError: ``target`` is not a colour of this shift.
        """
        self.rng = rng = np.random.default_rng(seed)
        s = self.shift
        mujoco.mj_resetData(self.model, self.data)
        self._light_up(float(rng.uniform(*s.light)))
        self._mount_camera()
        if target is not None and target not in s.colours:
            raise ConfigError(
                f"target: {target!r} is not in shift {s.name!r}; choose one of {', '.join(s.colours)}"
            )
        palette = list(s.colours)
        order = [str(c) for c in rng.permutation(palette)[:BOXES]]
        self.target = int(rng.integers(BOXES))
        if target is not None:
            if target in order:
                self.target = order.index(target)
            else:
                order[self.target] = target
        self.colours = tuple(order)
        spots = self._spots(rng)
        for i in range(BOXES):
            self._lay(
                i,
                COLOURS[order[i]],
                float(rng.uniform(*s.half_size_m)),
                spots[i],
                float(rng.uniform(-0.3, 0.3)),
            )
        self.place_arm(HOME_M + rng.normal(0.0, 0.02, 3))
        self.held = -1
        self.ticks = 0
        self._released_high = False
        mujoco.mj_forward(self.model, self.data)
        if self._delay is not None:
            self._delay.begin(self.bias)
        self._rest_z[:] = [self.data.xpos[b, 2] for b in self._box_body]

    @staticmethod
    def _spots(rng: np.random.Generator) -> list[FloatArray]:
        spots: list[FloatArray] = []
        while len(spots) < BOXES:
            a, r = rng.uniform(-0.75, 0.5), rng.uniform(0.33, 0.58)
            p = np.array([r * np.cos(a), r * np.sin(a)])
            if all(np.hypot(*(p - q)) > 0.085 for q in spots):
                spots.append(p)
        return spots

    def _light_up(self, factor: float) -> None:
        tint = np.array(self.shift.tint)
        self.model.light_diffuse[:] = self._light * factor * tint
        self.model.vis.headlight.ambient[:] = self._ambient * factor * tint
        self.model.vis.headlight.diffuse[:] = self._head * factor * tint
        table = np.array(self.shift.table)
        self.model.geom("table").rgba[:3] = table
        for i in range(8):
            stripe = self.model.geom(f"stripe{i}").rgba
            stripe[:3] = table * (1.0 - self.shift.texture)
            stripe[3] = 1.0 if self.shift.texture > 0 else 0.0

    def _mount_camera(self) -> None:
        turn, frame = np.zeros(9), np.zeros(9)
        mujoco.mju_quat2Mat(frame, self._camera_quat)
        tilt = np.array(
            [np.cos(self.shift.camera_tilt_rad / 2), np.sin(self.shift.camera_tilt_rad / 2), 0.0, 0.0]
        )
        quat = np.zeros(4)
        mujoco.mju_mulQuat(quat, self._camera_quat, tilt)
        mujoco.mju_quat2Mat(turn, quat)
        self.model.cam_quat[self._camera] = quat
        self.model.cam_pos[self._camera] = self._camera_pos + frame.reshape(3, 3) @ np.array(
            self.shift.camera_offset_m
        )

    def _lay(
        self, i: int, rgb: tuple[float, float, float], half: float, spot: FloatArray, yaw: float
    ) -> None:
        g, b = self._box_geom[i], self._box_body[i]
        self.model.geom_rgba[g, :3] = rgb
        self.model.geom_size[g] = half
        self.model.geom_rbound[g] = half * np.sqrt(3.0)
        self.model.geom_aabb[g, 3:] = half
        self.model.body_mass[b] = self._box_kg
        self.model.body_inertia[b] = self._box_kg * (2 * half) ** 2 / 6.0
        self.set_box(i, np.array([spot[0], spot[1], half]), yaw)

    def set_box(self, i: int, position: FloatArray, yaw: float = 0.0) -> None:
        """Put box ``i`` with its centre at ``position``, m, turned by ``yaw``, rad, about the vertical."""
        a = self._box_qpos[i]
        self.qpos[a : a + 3] = position
        self.qpos[a + 3 : a + 7] = (np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2))

    def place_arm(self, tip: FloatArray) -> None:
        """Put the arm, at rest, with the cup at ``tip``, m."""
        self.qpos[:JOINTS] = inverse(tip)
        self.dq[:] = 0.0

    def settle(self) -> None:
        """Make everything that follows from the positions agree with them."""
        mujoco.mj_forward(self.model, self.data)

    def mirror(self, qpos: FloatArray, held: int) -> None:
        """Show the world of another cell of the same scene, without physics."""
        self.qpos[:] = qpos
        self.held = held
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)

    @property
    def instruction(self) -> str:
        """What the policy is asked to do."""
        return f"pick the {self.colours[self.target]} box and place it in the bin"

    @property
    def tip(self) -> FloatArray:
        """Where the cup is, ``[3]`` m, from the joint encoders."""
        return forward(self.q)

    @property
    def target_top(self) -> FloatArray:
        """Centre of the target's upper face, ``[3]`` m."""
        return self.top(self.target)

    def top(self, i: int) -> FloatArray:
        """Centre of box ``i``'s upper face, ``[3]`` m."""
        p = self.centre(i)
        p[2] += self.model.geom_size[self._box_geom[i], 2]
        return p

    def centre(self, i: int) -> FloatArray:
        """Centre of box ``i``, ``[3]`` m."""
        p: FloatArray = self.data.xpos[self._box_body[i]].copy()
        return p

    def mass_matrix(self, out: FloatArray) -> None:
        """The arm's joint-space inertia matrix, ``[5, 5]`` kg·m², as of the last step."""
        mujoco.mj_fullM(self.model, self.data, self._full_mass)
        out[:] = self._full_mass[:JOINTS, :JOINTS]

    def step(self, tau: FloatArray, suction: float) -> None:
        """One millisecond with joint torques ``tau``, N·m, and the vacuum on if ``suction`` > 0.5."""
        self._ctrl[:] = tau if self._delay is None else self._delay.pass_on(tau)
        if suction > 0.5:
            if self.held < 0:
                self._grasp()
        elif self.held >= 0:
            self._release()
        mujoco.mj_step(self.model, self.data)
        self.ticks += 1

    def _grasp(self) -> None:
        tip = self.data.site_xpos[self._cup]
        for i in range(BOXES):
            top = self.top(i)
            if (
                np.hypot(tip[0] - top[0], tip[1] - top[1]) < GRASP_RADIUS_M
                and abs(tip[2] - top[2]) < GRASP_GAP_M
            ):
                self.attach(i)
                return

    def attach(self, i: int) -> None:
        """Hang box ``i`` on the cup as they are placed now."""
        d, e, t, b = self.data, self._weld[i], self._tool, self._box_body[i]
        frame = d.xmat[t].reshape(3, 3)
        inverse_quat, relative = np.zeros(4), np.zeros(4)
        mujoco.mju_negQuat(inverse_quat, d.xquat[t])
        mujoco.mju_mulQuat(relative, inverse_quat, d.xquat[b])
        self.model.eq_data[e, :3] = 0.0
        self.model.eq_data[e, 3:6] = frame.T @ (d.xpos[b] - d.xpos[t])
        self.model.eq_data[e, 6:10] = relative
        self.model.eq_data[e, 10] = 1.0
        d.eq_active[e] = 1
        self.held = i

    def _release(self) -> None:
        i = self.held
        self.data.eq_active[self._weld[i]] = 0
        self.held = -1
        if i == self.target and not self._over_bin(i) and self._lift(i) > CARRY_M:
            self._released_high = True

    def _over_bin(self, i: int) -> bool:
        return bool(np.all(np.abs(self.data.xpos[self._box_body[i], :2] - BIN_M) < BIN_HALF_M))

    def _lift(self, i: int) -> float:
        return float(self.data.xpos[self._box_body[i], 2] - self._rest_z[i])

    @property
    def success(self) -> bool:
        """The target lies in the bin and nothing holds it."""
        low = bool(self.data.xpos[self._box_body[self.target], 2] < 0.06)
        return self.held != self.target and low and self._over_bin(self.target)

    @property
    def progress(self) -> float:
        """How far the task stands now: 0, at the target 0.25, target taken 0.5, brought over the bin 0.75, done 1."""
        if self.success:
            return 1.0
        if self.held == self.target:
            return 0.75 if self._over_bin(self.target) else 0.5
        at_target = float(np.linalg.norm(self.data.site_xpos[self._cup] - self.target_top)) < REACH_M
        return 0.25 if at_target else 0.0

    @property
    def wrong_object(self) -> bool:
        """A box that was not asked for has been taken."""
        return self.held >= 0 and self.held != self.target and self._lift(self.held) > CARRY_M

    @property
    def dropped(self) -> bool:
        """The target was let go of in mid-air, outside the bin, or has left the table."""
        return self._released_high or self.lost

    @property
    def lost(self) -> bool:
        """The target has fallen off the table: nobody can pick it any more."""
        return bool(self.data.xpos[self._box_body[self.target], 2] < -0.02)

    def render(self, camera: str, side_px: int | None = None) -> NDArray[np.uint8]:
        """What ``camera`` sees now, uint8 ``[side, side, 3]`` RGB."""
        if self._eyes is None:
            self._eyes = _Eyes(self.model)
        return self._eyes.look(self.data, camera, side_px or CAMERAS[camera])

    def close(self) -> None:
        """Free the rendering context."""
        if self._eyes is not None:
            self._eyes.close()
            self._eyes = None


class Delay:
    """Torques that take effect later: linear between the two steps that a delay lies between."""

    def __init__(self, delay_s: float) -> None:
        whole, self._part = divmod(delay_s * 1e9 / STEP_NS, 1.0)
        self._kept = np.zeros((int(whole) + 2, JOINTS))
        self._at = 0

    def begin(self, tau: FloatArray) -> None:
        """``tau`` ``[5]``, N·m, is what was commanded until now."""
        self._kept[:] = tau

    def pass_on(self, tau: FloatArray) -> FloatArray:
        """What takes effect in this step, ``[5]`` N·m, now that ``tau`` is commanded."""
        n = len(self._kept)
        self._at = (self._at + 1) % n
        self._kept[self._at] = tau
        now, before = self._kept[(self._at + 2) % n], self._kept[(self._at + 1) % n]
        return np.asarray((1.0 - self._part) * now + self._part * before)


class _Eyes:
    """One off-screen context for every camera; mujoco.Renderer would make one for each image size."""

    def __init__(self, model: mujoco.MjModel) -> None:
        self._model = model
        side = int(model.vis.global_.offwidth)
        self._gl = mujoco.GLContext(side, side)
        self._gl.make_current()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = mujoco.MjvScene(model, maxgeom=100)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._scene.flags[flag] = 0
        self._option = mujoco.MjvOption()
        self._view = mujoco.MjvCamera()
        self._view.type = mujoco.mjtCamera.mjCAMERA_FIXED

    def look(self, data: mujoco.MjData, camera: str, side: int) -> NDArray[np.uint8]:
        self._gl.make_current()
        self._view.fixedcamid = self._model.camera(camera).id
        mujoco.mjv_updateScene(
            self._model, data, self._option, None, self._view, mujoco.mjtCatBit.mjCAT_ALL, self._scene
        )
        window = mujoco.MjrRect(0, 0, side, side)
        mujoco.mjr_render(window, self._scene, self._context)
        image = np.empty((side, side, 3), np.uint8)
        mujoco.mjr_readPixels(image, None, window, self._context)
        return np.ascontiguousarray(image[::-1])

    def close(self) -> None:
        self._context.free()
        self._gl.free()
