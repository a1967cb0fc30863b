"""Named shifts: what differs between the lab where a policy was trained and the floor where it works."""

from __future__ import annotations

from dataclasses import dataclass

from flywheel.errors import ConfigError

RGB = tuple[float, float, float]

COLOURS: dict[str, RGB] = {
    "red": (0.85, 0.10, 0.10),
    "green": (0.10, 0.70, 0.15),
    "blue": (0.10, 0.20, 0.85),
    "yellow": (0.90, 0.80, 0.10),
    "purple": (0.55, 0.08, 0.65),
}


@dataclass(frozen=True, slots=True)
class Shift:
    """One setting of the cell. Pairs are the bounds of a uniform draw per scene."""

    name: str
    light: tuple[float, float] = (0.85, 1.15)  # factor on every light
    tint: RGB = (1.0, 1.0, 1.0)
    table: RGB = (0.75, 0.75, 0.78)
    texture: float = 0.0  # contrast of the table's pattern, 0 = plain
    camera_offset_m: RGB = (0.0, 0.0, 0.0)  # wrist camera, in its own frame
    camera_tilt_rad: float = 0.0  # wrist camera, about its horizontal axis
    colours: tuple[str, ...] = ("red", "green", "blue")
    half_size_m: tuple[float, float] = (0.019, 0.021)
    mass_kg: float = 0.05


LAB = Shift("lab")
FACTORY = Shift(
    "factory",
    light=(0.35, 0.55),
    tint=(1.0, 0.82, 0.62),
    table=(0.36, 0.31, 0.25),
    texture=0.5,
    camera_offset_m=(0.015, -0.02, 0.0),
    camera_tilt_rad=0.09,
    colours=("red", "green", "blue", "purple"),
    half_size_m=(0.021, 0.026),
    mass_kg=0.08,
)

SHIFTS: dict[str, Shift] = {
    s.name: s
    for s in (
        LAB,
        FACTORY,
        Shift("dim", light=FACTORY.light, tint=FACTORY.tint),
        Shift("table", table=FACTORY.table, texture=FACTORY.texture),
        Shift("camera", camera_offset_m=FACTORY.camera_offset_m, camera_tilt_rad=FACTORY.camera_tilt_rad),
        Shift("parts", colours=FACTORY.colours, half_size_m=FACTORY.half_size_m, mass_kg=FACTORY.mass_kg),
    )
}

# Floors that a fleet may be brought to one after the other: the base policy fails in each, and whoever knows
# the ones before still fails in the next.
SUCCESSION = ("dim", "table", "factory")


def shift(name: str) -> Shift:
    """The shift called ``name``.

    Raises:
        ConfigError: there is none.
    """
    try:
        return SHIFTS[name]
    except KeyError:
        raise ConfigError(f"shift: {name!r} is not known; choose one of {', '.join(SHIFTS)}") from None
