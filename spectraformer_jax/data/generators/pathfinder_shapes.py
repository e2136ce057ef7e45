"""Holds settings of synthetic Pathfinder, and makes tables of its bars' pixels.

A snake is a chain of bars on a grid of pixels. A bar points away from a pivot
in one of finitely many directions and covers the distances from `margin` to
`margin + bar_length`; the next pivot lies `margin` beyond the end of the bar.
So tables list, for each direction, the pixels of a bar, of the room that it
needs, and of its neighbourhood; the generator only looks them up.

The first directions are those of the pixels on the circle of radius `margin +
bar_length`, where a bar may end. The 360 others are whole degrees, for the
first bar of a snake. The angle a points to (row, column) = (sin a, cos a), with
rows counted downwards.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import numpy as np

DEGREES = 360

FULL = 127
"""Value of an occupied pixel; the sum of two fits a uint8."""

_SAMPLES = 4  # points per pixel and axis, to measure the covered part
_LINK = 0.75  # half the thickness of the lines that close gaps, in pixels


@dataclasses.dataclass(frozen=True)
class Settings:
  """Holds the sizes, in pixels, and counts of a kind of pictures.

  Attributes:
    side: width and height of the picture.
    bar_length: length of a bar.
    thickness: thickness of a bar.
    margins: half the gap between bars; each picture has one of them.
    seed_distance: distance between the starts of the two long snakes.
    radius: radius of the discs.
    continuity: a snake turns by less than 90 degrees / `continuity` per bar.
    distractor_bars: largest number of bars of all short snakes together.
    target: brightness of the long snakes, relative to that of the discs.
    distractor: brightness of the short snakes, relative to that of the discs.
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


# side, bar_length, thickness, margins, seed_distance, radius, continuity,
# distractor_bars, target, distractor.
SETTINGS = {
  32: Settings(32, 2, 0.5, (1,), 7, 1.5, 1.0, 20, 1.5, 2.0),
  64: Settings(64, 3, 1.0, (2,), 12, 2.0, 1.4, 28, 1.2, 1.2),
  128: Settings(128, 5, 1.5, (2, 3), 20, 3.0, 1.8, 35, 0.9, 0.9),
}
"""Settings by `side`. Those of 32 and 128 are as published, except for two of
128 that are not: the bar length, here 5 (the public generator's default), and
the border, here 1. Those of 64 lie in between."""


class Patches(NamedTuple):
  """Holds a set of pixels with values for each direction or shape.

  Attributes:
    offsets: offsets of the pixels from the centre in a flat picture, [shapes,
      pixels]. Rows are padded with pixels of value 0; no row repeats a pixel.
    values: values of the pixels, [shapes, pixels].
  """

  offsets: np.ndarray
  values: np.ndarray


class Shapes(NamedTuple):
  """Holds tables for one picture size and margin; D directions, K bar ends.

  Attributes:
    side: width and height of the picture.
    margin: half the gap between bars.
    frame: width of the frame that patches at the picture's edge reach into.
    bar: brightness of each pixel of a bar, 0 to 1.
    room: the bar with its margin and the gaps at its ends, 0 to FULL.
    near: pixels where no other bar may end, 0 to FULL.
    disc: the single shape of a disc, 0 to 1.
    ends: flat offsets of the K pixels where a bar may end, [K].
    tails: flat offset of the pixel where a bar starts, [D].
    steps: flat offset of the next pivot, [D].
    turns: weight of each end of the next bar after a direction, [D, K].
    segments: start and end of a bar, (row, column) twice, [D, 4].
    border: pixels that the picture's edge occupies, and those near to it, [2,
      (frame + side + frame)**2].
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
    """Width of the picture with its frame."""
    return self.side + 2 * self.frame


@functools.lru_cache(maxsize=8)
def make_shapes(settings: Settings, margin: int) -> Shapes:
  """Computes the tables for one margin.

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
  circle = np.stack([np.sin(degrees), np.cos(degrees)], axis=1)
  far = np.concatenate([ends, reach * circle])
  outer = np.linalg.norm(far, axis=1, keepdims=True)
  unit = far / outer
  inner = outer - length
  segments = np.concatenate([inner * unit, far], axis=1)
  bars = np.stack([_coverage(s, half, frame) for s in segments])
  room = np.stack([_coverage(s, margin + half, frame) for s in segments])
  # Occupies the line between pivots: else snakes could cross in their gaps.
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
  """Returns the pixels within 1/2 of a circle around (0, 0), [K, 2]."""
  line = np.arange(-radius - 1, radius + 2)
  rows, columns = np.meshgrid(line, line, indexing="ij")
  on = np.abs(np.hypot(rows, columns) - radius) <= 0.5
  return np.stack([rows[on], columns[on]], axis=1)


def _coverage(segment: np.ndarray, radius: float, frame: int) -> np.ndarray:
  """Returns the part of each pixel that lies within `radius` of a segment."""
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
  """Returns the maximum over a disc around each pixel of [..., n, n]."""
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
  """Returns the nonzero pixels of squares [shapes, n, n]."""
  count, side = squares.shape[:2]
  line = np.arange(side) - side // 2
  offsets = (line[:, None] * width + line[None, :]).ravel()
  values = squares.reshape(count, -1)
  # Moves the nonzero pixels to the front; a stable sort keeps their order.
  order = np.argsort(values == 0, axis=1, kind="stable")
  order = order[:, : np.count_nonzero(values, axis=1).max()]
  return Patches(offsets[order], np.take_along_axis(values, order, axis=1))


def _border(side: int, frame: int, margin: int) -> np.ndarray:
  """Returns what the edge and the frame occupy, and the pixels near to that."""
  width = side + 2 * frame
  occupied = np.full((width, width), FULL, np.uint8)
  inside = slice(frame + 1, frame + side - 1)
  occupied[inside, inside] = 0
  near = _dilate(occupied, margin)
  return np.stack([occupied.ravel(), near.ravel()])
