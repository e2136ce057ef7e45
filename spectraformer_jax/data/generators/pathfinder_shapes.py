"""Synthetic Pathfinder: its settings, and its bars drawn once for all.

A snake is a chain of bars on a grid of pixels. A bar is seen from a pivot: it
points away from it in one of finitely many directions and covers the radii from
`margin` to `margin + bar_length`; the next pivot lies `margin` behind its end.
So the pixels of a bar, of the room it needs, and of what is too near to it are
tables over directions, and growing a snake looks them up.

Directions are those of the pixels on the circle of radius `margin +
bar_length`, where a bar may end, and then 360 degrees for the first bar of a
snake. Angles are those of (row, column) = (sin, cos), rows counted downwards.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import numpy as np

DEGREES = 360

FULL = 127
"""A pixel that is wholly occupied: two of them add up within a uint8."""

_SAMPLES = 4  # per pixel and axis, to measure how much of a pixel is covered
_LINK = 0.75  # of gaps that are kept closed: no pixel's centre is farther off


@dataclasses.dataclass(frozen=True)
class Settings:
  """Sizes in pixels, and counts.

  Attributes:
    side: of the picture.
    bar_length: of a bar.
    thickness: of a bar.
    margins: half the gap between bars; one of these for each picture.
    seed_distance: between the starts of the two long snakes.
    radius: of the discs.
    continuity: a snake turns by less than 90 degrees over this.
    distractor_bars: bars of all short snakes together, at most.
    target: brightness of the long snakes; discs have 1.
    distractor: brightness of the short snakes.
  """

  side: int
  bar_length: int
  thickness: float
  margins: tuple[int, ...]
  seed_distance: int
  radius: float
  continuity: float
  distractor_bars: int
  target: float
  distractor: float


SETTINGS = {
  32: Settings(32, 2, 0.5, (1,), 7, 1.5, 1.0, 20, 1.5, 2.0),
  64: Settings(64, 3, 1.0, (2,), 12, 2.0, 1.4, 28, 1.2, 1.2),
  128: Settings(128, 5, 1.5, (2, 3), 20, 3.0, 1.8, 35, 0.9, 0.9),
}
"""32 and 128 as published, except that those for 128 leave the bar's length and
the border open: 5, the public generator's own, and 1. 64 lies in between."""


class Patches(NamedTuple):
  """A set of pixels with values for each direction or shape.

  Attributes:
    offsets: of the pixels from the centre, in a flat picture, [shapes, pixels].
      Short rows go on with pixels of value 0; none names a pixel twice.
    values: [shapes, pixels].
  """

  offsets: np.ndarray
  values: np.ndarray


class Shapes(NamedTuple):
  """Tables for one picture size and margin; D directions, K ends of a bar.

  Attributes:
    side: of the picture.
    margin: half the gap between bars.
    frame: pixels around the picture that every patch stays within.
    bar: how bright each pixel of a bar is, 0 to 1.
    room: the bar's margin, and the gaps before and behind it, 0 to FULL.
    near: where no other bar may end, 0 to FULL.
    disc: the one shape of a disc, 0 to 1.
    ends: flat offsets of the K pixels where a bar may end, [K].
    tails: flat offset of the pixel where the bar starts, [D].
    steps: flat offset of the next pivot, [D].
    turns: weight of each end after a direction, [D, K].
    segments: start and end of a bar, (row, column) twice, [D, 4].
    border: what the picture's edge occupies and is near to, [2, frame + side +
      frame squared].
  """

  side: int
  margin: int
  frame: int
  bar: Patches
  room: Patches
  near: Patches
  disc: Patches
  ends: np.ndarray
  tails: np.ndarray
  steps: np.ndarray
  turns: np.ndarray
  segments: np.ndarray
  border: np.ndarray

  @property
  def width(self) -> int:
    """Of the picture with its frame."""
    return self.side + 2 * self.frame


@functools.lru_cache(maxsize=8)
def make_shapes(settings: Settings, margin: int) -> Shapes:
  """The tables for one margin.

  Example:
    >>> shapes = make_shapes(SETTINGS[32], margin=1)
    >>> len(shapes.ends), len(shapes.steps)
    (16, 376)
  """
  length, half = settings.bar_length, settings.thickness / 2
  reach = length + margin
  frame = math.ceil(reach + 2 * margin + half) + 1
  width = settings.side + 2 * frame
  ends = _circle(reach)
  degrees = np.deg2rad(np.arange(DEGREES))
  far = np.concatenate(
    [
      ends,
      reach * np.stack([np.sin(degrees), np.cos(degrees)], axis=1),
    ]
  )
  outer = np.linalg.norm(far, axis=1, keepdims=True)
  unit = far / outer
  inner = outer - length
  segments = np.concatenate([inner * unit, far], axis=1)
  bars = np.stack([_coverage(s, half, frame) for s in segments])
  room = np.stack([_coverage(s, margin + half, frame) for s in segments])
  # From pivot to pivot: with grey margins alone, snakes cross in their gaps.
  behind = (length + 2 * margin) * unit
  links = np.concatenate([np.zeros_like(unit), behind], axis=1)
  closed = np.stack([_coverage(s, _LINK, frame) for s in links])
  room = np.maximum(room, closed >= 0.5)
  disc = _coverage(np.zeros(4), settings.radius, frame)
  room = np.round(room * FULL).astype(np.uint8)
  flat = lambda pixels: (pixels @ np.array([width, 1])).astype(np.int64)
  turn = np.arccos(np.clip(unit @ unit[: len(ends)].T, -1, 1))
  turn = np.minimum(turn * settings.continuity, np.pi / 2)
  return Shapes(
    side=settings.side,
    margin=margin,
    frame=frame,
    bar=_patches(bars.astype(np.float32), width),
    room=_patches(room, width),
    near=_patches(_dilate(room, margin), width),
    disc=_patches(disc[None].astype(np.float32), width),
    ends=flat(ends),
    tails=flat(np.round(inner * unit)),
    steps=flat(np.round(behind)),
    turns=(np.cos(turn) ** 2).astype(np.float32),
    segments=segments.astype(np.float32),
    border=_border(settings.side, frame, margin),
  )


def _circle(radius: int) -> np.ndarray:
  """Pixels within half a pixel of a circle around (0, 0), [K, 2]."""
  line = np.arange(-radius - 1, radius + 2)
  rows, columns = np.meshgrid(line, line, indexing="ij")
  on = np.abs(np.hypot(rows, columns) - radius) <= 0.5
  return np.stack([rows[on], columns[on]], axis=1)


def _coverage(segment: np.ndarray, radius: float, frame: int) -> np.ndarray:
  """How much of each pixel of a square lies within `radius` of a segment."""
  count = 2 * frame + 1
  line = (np.arange(count * _SAMPLES) + 0.5) / _SAMPLES - 0.5 - frame
  rows, columns = line[:, None], line[None, :]
  start, along = segment[:2], segment[2:] - segment[:2]
  square = max(float(along @ along), 1e-9)
  part = (rows - start[0]) * along[0] + (columns - start[1]) * along[1]
  part = np.clip(part / square, 0, 1)
  distance = np.hypot(
    rows - start[0] - part * along[0], columns - start[1] - part * along[1]
  )
  inside = (distance <= radius).reshape(count, _SAMPLES, count, _SAMPLES)
  return inside.mean(axis=(1, 3))


def _dilate(squares: np.ndarray, radius: int) -> np.ndarray:
  """The maximum over a disc around each pixel; squares [..., n, n]."""
  spread = [(0, 0)] * (squares.ndim - 2) + [(radius, radius)] * 2
  padded, result = np.pad(squares, spread), np.zeros_like(squares)
  rows, columns = squares.shape[-2:]
  for i in range(2 * radius + 1):
    for j in range(2 * radius + 1):
      if math.hypot(i - radius, j - radius) <= radius:
        part = padded[..., i : i + rows, j : j + columns]
        np.maximum(result, part, out=result)
  return result


def _patches(squares: np.ndarray, width: int) -> Patches:
  """The pixels of squares [shapes, n, n] that are not 0."""
  count, side = squares.shape[:2]
  line = np.arange(side) - side // 2
  offsets = (line[:, None] * width + line[None, :]).ravel()
  values = squares.reshape(count, -1)
  # Stable, so that what comes first are the pixels in use, then zeros.
  order = np.argsort(values == 0, axis=1, kind="stable")
  order = order[:, : np.count_nonzero(values, axis=1).max()]
  return Patches(offsets[order], np.take_along_axis(values, order, axis=1))


def _border(side: int, frame: int, margin: int) -> np.ndarray:
  """The outermost pixels of the picture and all beyond, and what is near."""
  width = side + 2 * frame
  occupied = np.full((width, width), FULL, np.uint8)
  inside = slice(frame + 1, frame + side - 1)
  occupied[inside, inside] = 0
  near = _dilate(occupied, margin)
  return np.stack([occupied.ravel(), near.ravel()])
