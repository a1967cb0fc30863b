"""The pictures of one episode: decoded within bounds, and checked for a camera that does not see.

* black, white: mean brightness and contrast of each picture;
* blurred: variance of the Laplacian (Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield
  microscopy: a comparative study", ICPR, LAPV), divided by the picture's own variance so that dim light is no
  blur;
* stuck: the same bytes again although the arm moved in between, or nothing but noise from one to the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from flywheel.config import CheckSettings
from flywheel.curate import columns
from flywheel.curate.checks import STEPS_MIN, Fault, Found, variation
from flywheel.curate.signals import Floats
from flywheel.episode import in_one
from flywheel.errors import EpisodeError

MAX_SIDE_PX = 4096  # a JPEG that claims more is an attack on memory
MAX_PIXEL_BYTES = 1 << 30  # of one camera's pictures in one episode, decoded
MAX_SCANS = 64  # of one picture: each costs its whole area (a progressive one of libjpeg has 10)
THUMBNAIL_PX = 8
GREY_PX = 128  # of the shorter side, that are left for the checks
SHARP_PX = 64
LIGHT_PX = 32  # of each side, that light and contrast are taken from
SHARP_SAMPLES = 12  # pictures of an episode that are looked at for blur

Grey = NDArray[np.float32]  # [N, H, W], 0 to 255

SCAN = b"\xff\xda"  # start of scan; never inside of one, where ff is followed by 00 (ITU-T T.81, B.1.1)


@dataclass(frozen=True)
class Film:
    """The JPEGs of one camera in the rows of an episode."""

    camera: str
    jpegs: list[bytes]

    @classmethod
    def of(cls, frames: pa.Table, camera: str) -> Film:
        """From the table of frames."""
        return cls(camera, in_one(frames, f"image.{camera}").to_pylist())


def decoded(film: Film, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Images, uint8 [len(rows), H, W, 3]; ``EpisodeError`` names a row that does not decode."""
    return _decoded(film, rows, "RGB")[0]


def decoded_grey(film: Film, rows: NDArray[np.int64]) -> tuple[Grey, tuple[int, int, int]]:
    """Luma of the images ``[len(rows), h, w]``, and the shape that they have in colour.

    Large ones are decoded to a half, a quarter or an eighth of their size, as long as ``GREY_PX`` are left:
    every byte is read all the same. ``EpisodeError`` as for ``decoded``.
    """
    images, (height, width) = _decoded(film, rows, "GRAY")
    return images[..., 0].astype(np.float32), (height, width, 3)


def _decoded(
    film: Film, rows: NDArray[np.int64], colorspace: str
) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    import simplejpeg

    images = np.empty((0, 0, 0, 3), np.uint8)
    first = (0, 0)
    least: dict[str, int] = {}
    for i, row in enumerate(rows.tolist()):
        picture = film.jpegs[row]
        try:
            if picture.count(SCAN) > MAX_SCANS:
                raise ValueError(f"is drawn in {picture.count(SCAN)} scans")
            if i and not least and _fits(picture, colorspace, images[i]):
                continue
            size = height, width = simplejpeg.decode_jpeg_header(picture)[:2]
            if not 0 < max(size) <= MAX_SIDE_PX:
                raise ValueError(f"claims {height}×{width} px")
            if len(rows) * height * width * 3 > MAX_PIXEL_BYTES:
                raise ValueError(f"{len(rows)} pictures of {height}×{width} px are too many to decode")
            if i == 0:
                first = size
                if colorspace == "GRAY" and (k := min(8, min(size) // GREY_PX)) > 1:
                    k = 1 << (k.bit_length() - 1)
                    least = {"min_height": -(-height // k), "min_width": -(-width // k)}
                one = simplejpeg.decode_jpeg(picture, colorspace=colorspace, **least)
                images = np.empty((len(rows), *one.shape), np.uint8)
                images[0] = one
                continue
            if size != first:
                raise ValueError(f"is {height}×{width} px, unlike the first one")
            simplejpeg.decode_jpeg(picture, colorspace=colorspace, buffer=images[i], **least)
        except ValueError as e:
            raise EpisodeError(f"image.{film.camera} in row {row}: {e}") from None
    return images, first


def _fits(picture: bytes, colorspace: str, into: NDArray[np.uint8]) -> bool:
    """Decode into an array; False if the picture is of another size. Raises ``ValueError``."""
    import simplejpeg

    try:
        return bool(simplejpeg.decode_jpeg(picture, colorspace=colorspace, buffer=into).shape == into.shape)
    except ValueError:
        if simplejpeg.decode_jpeg_header(picture)[:2] != into.shape[:2]:
            return False
        raise


def grey(images: NDArray[np.uint8]) -> Grey:
    """Luma, 0 to 255 (ITU-R BT.601, as in JFIF): ``[N, H, W]`` of images ``[N, H, W, 3]``."""
    return np.asarray(images @ np.array([0.299, 0.587, 0.114], np.float32), np.float32)


@lru_cache(maxsize=1024)
def evenly(length: int, count: int) -> NDArray[np.int64]:
    """``count`` of ``length`` rows, evenly spread, the first and the last included, some twice if need be."""
    rows = np.linspace(0, length - 1, count).round().astype(np.int64)
    rows.flags.writeable = False  # all callers have the same one
    return rows


def thumbnails(pictures: Grey) -> Floats:
    """``[N, 8, 8]`` in 0..1 of grey pictures ``[N, H, W]`` by averaging blocks."""
    down, across = (averages(n, THUMBNAIL_PX) for n in pictures.shape[1:3])
    return np.asarray(down @ (pictures @ across.T) / np.float32(255.0), np.float64)


@lru_cache(maxsize=64)
def averages(size: int, count: int) -> Grey:
    """``[count, size]``: what a row of a picture is multiplied with to average its blocks.

    These are as even as ``np.array_split`` makes them. A row of fewer pixels has each ``count`` times.
    """
    repeat = count if size < count else 1
    found = np.zeros((count, size * repeat), np.float32)
    for row, block in zip(found, np.array_split(np.arange(size * repeat), count), strict=True):
        row[block] = 1.0 / len(block)
    of_pixels: Grey = found.reshape(count, size, repeat).sum(axis=2)
    of_pixels.flags.writeable = False  # all callers have the same one
    return of_pixels


def check_stuck(film: Film, frame_q: Floats, settings: CheckSettings) -> list[Found]:
    """The same picture, to the last byte, at ``stuck_images`` or more different places of the arm."""
    rows_of: dict[bytes, list[int]] = {}
    for row, jpeg in enumerate(film.jpegs):
        rows_of.setdefault(jpeg, []).append(row)
    for rows in rows_of.values():
        if len(rows) < settings.stuck_images:
            continue
        spread = float(np.ptp(frame_q[rows], axis=0).max())
        if spread > settings.stuck_motion_rad:
            text = f"row {rows[0]} comes {len(rows)} times while a joint goes {spread:.3f} rad"
            return [Found(Fault.STUCK_IMAGE, f"image.{film.camera} of {text}")]
    return []


def check_pictures(
    images: Grey, change: Floats, camera: str, motion: Floats, settings: CheckSettings
) -> list[Found]:
    """Pictures ``[N, H, W]`` of one camera; how much their thumbnails change from each to the next ``[N-1]``,
    and how far the joints go meanwhile ``[N-1]``, rad."""
    mean, contrast = columns.light(
        images, max(1, images.shape[1] // LIGHT_PX), max(1, images.shape[2] // LIGHT_PX)
    )
    even = contrast < settings.min_contrast
    black, white = even & (mean < settings.black_level), even & (mean > settings.white_level)
    for fault, bad, text in ((Fault.BLACK_IMAGE, black, "dark"), (Fault.WHITE_IMAGE, white, "bright")):
        if (count := int(bad.sum())) > settings.bad_images:
            row = int(np.argmax(bad))
            why = (
                f"{count} of {len(images)} pictures of {camera} are evenly {text} (the first of them:"
                f" mean {mean[row]:.0f} of 255, deviation {contrast[row]:.1f})"
            )
            return [Found(fault, why)]
    sharp = sharpness(images, evenly(len(images), min(SHARP_SAMPLES, len(images))))
    if (blurred := int((sharp < settings.min_sharpness).sum())) > settings.bad_images:
        text = (
            f"{blurred} of {len(sharp)} pictures of {camera} are blurred (sharpness {np.median(sharp):.3f})"
        )
        return [Found(Fault.BLURRED_IMAGE, text)]
    fine = ~(black | white)
    between = fine[1:] & fine[:-1]  # a single black one says nothing of the rest
    motion = motion[between]
    if len(motion) >= STEPS_MIN and variation(motion) > settings.min_speed_variation:
        found = np.sort(change[between])
        low, high = np.interp([0.1 * (len(found) - 1), 0.9 * (len(found) - 1)], np.arange(len(found)), found)
        if motion.sum() > settings.min_motion_rad and high < settings.min_change_ratio * low:
            text = f"the pictures of {camera} change alike ({low:.2g} to {high:.2g}) however the arm moves"
            return [Found(Fault.STUCK_IMAGE, text)]
    return []


def changes(small: Floats) -> Floats:
    """Mean difference of each of the thumbnails ``[N, 8, 8]`` to the next, ``[N-1]``."""
    return np.asarray(np.abs(np.diff(small, axis=0)).mean(axis=(1, 2)))


def sharpness(images: Grey, rows: NDArray[np.int64]) -> Floats:
    """Variance of the Laplacian over the variance of the picture, of ``rows`` of ``images [N, H, W]``; 0 for
    an even picture, and for one of less than 3 px.

    Taken at 64 to 127 px (blocks are averaged), so that it does not depend on how many pixels a camera has.
    """
    k = max(1, min(images.shape[1:3]) // SHARP_PX)
    h, w = images.shape[1] // k, images.shape[2] // k
    if min(h, w) < 3:
        return np.zeros(len(rows))
    if k > 1:
        images = images[rows, : h * k, : w * k].reshape(len(rows), h, k, w, k).mean(axis=(2, 4))
        rows = np.arange(len(rows))
    return columns.laplacian_share(images, rows)
