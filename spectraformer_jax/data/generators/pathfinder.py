"""Draws Pathfinder pictures by the rules of the public generator, fast.

A snake is a chain of bars. Two long snakes start at a fixed distance from each
other and grow in turn, bar by bar. The angle between a bar and its predecessor
is drawn with weight cos^2, and a bar keeps its margin from everything but its
predecessor. A picture is dropped if a snake finds no room three times in a row.
Short snakes are then placed where they have room. Two discs mark both ends of
one long snake (label 1), or the start of one and the end of the other (label
0).

Two rules are stricter than in the public generator, so that no snake touches
another and the label depends on connectivity only: a bar keeps its margin from
the last bar of the other snake as well, and from the gaps between bars (see
`pathfinder_shapes`).

All pictures of a batch grow together, so that numpy does the work, and dropped
pictures leave the batch. This is rejection sampling: the other pictures have
the same distribution as if dropped ones were started again.

With ``seeding="upstream"`` the first long snake and all short ones start
towards the top left, within 15 degrees, as in the public generator with a
current OpenCV. That generator looks for the room of a first bar with a kernel.
In all other directions this kernel misses its centre, so that the generator
takes them for occupied. With ``"any"`` all directions are equally likely.

Sources: Linsley et al., "Learning long-range spatial dependencies with
horizontal gated recurrent units", 2018; Kim et al., "Disentangling neural
mechanisms for perceptual grouping", 2020 (generator: drewlinsley/pathfinder);
Tay et al., "Long Range Arena", 2021, section 2.2.5.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from spectraformer_jax.data.generators.pathfinder_shapes import (
  DEGREES,
  FULL,
  Patches,
  Settings,
  Shapes,
  make_shapes,
)

VERSION = 1
"""Part of the token cache's key; increase it if a seed's pictures change."""

SEEDINGS = ("upstream", "any")

# Directions of a first bar in degrees, from the first to below the second.
_ALLOWED = {"upstream": (210, 240), "any": (0, DEGREES)}
_TRIES = 3  # ends drawn for a bar before its snake is dropped
_SNAKE_TRIES = 5  # tries of a short snake before it is left out
_PLACES = 64  # places drawn for a short snake in one try
# A bar collides where its pixel and an occupied one add up to this: both are
# then nearly full, not only touched.
_OVERLAP = 1.8 * FULL
_STATE_BYTES = 2**24  # bytes of `_Grid.occupied` and `_Grid.near` together


class Pictures(NamedTuple):
  """Holds a batch of pictures, with the geometry of their discs and snakes.

  Attributes:
    pixels: [count, side * side] uint8.
    labels: 1 if both discs are on one snake, [count] uint8.
    discs: centres, (row, column), [count, 2, 2] int32.
    snakes: start and end of each bar, (row, column) twice, [count, 2 + short,
      bars, 4]: the two long snakes, then the short ones; NaN for missing snakes
      and bars.
  """

  pixels: np.ndarray
  labels: np.ndarray
  discs: np.ndarray
  snakes: np.ndarray


def sample(
  rng: np.random.Generator, settings: Settings, *, bars: int, seeding: str
) -> Iterator[Pictures]:
  """Yields batches of pictures without end.

  Args:
    rng: source of all randomness.
    settings: sizes of the pictures and their parts.
    bars: number of bars of a long snake, at least 6; a short snake has a third
      of them, rounded down.
    seeding: ``"upstream"`` or ``"any"``.

  Yields:
    :class:`Pictures`, whose count varies.

  Example:
    >>> from spectraformer_jax.data.generators.pathfinder_shapes import SETTINGS
    >>> rng = np.random.default_rng(0)
    >>> stream = sample(rng, SETTINGS[32], bars=6, seeding="any")
    >>> next(stream).pixels.shape[1]
    1024
  """
  streams = [
    _of_margin(rng, settings, margin, bars, _ALLOWED[seeding])
    for margin in settings.margins
  ]
  if len(streams) == 1:
    yield from streams[0]  # without end
  # Makes all margins equally frequent, though some lose more pictures.
  stocks = [next(stream) for stream in streams]
  while True:
    chosen = rng.integers(len(streams))
    yield _take(stocks[chosen], 0, 1)
    stocks[chosen] = _take(stocks[chosen], 1, None)
    if not len(stocks[chosen].labels):
      stocks[chosen] = next(streams[chosen])


def _take(pictures: Pictures, start: int, stop: int | None) -> Pictures:
  """Returns a part of a batch."""
  return Pictures(*(array[start:stop] for array in pictures))


class _Grid:
  """Holds pictures that grow together, on pages of a flat array.

  A page is a picture with its frame. While its long snakes grow, a picture has
  two pages, then only the first. A pivot is a position in the flat array, which
  also tells the page; a direction is an index of the tables of `Shapes`.

  Attributes:
    occupied: pixels that bars and the border occupy, [pages, pixels].
    near: pixels where no bar may end, [pages, pixels].
  """

  def __init__(
    self, rng: np.random.Generator, shapes: Shapes, pages: int
  ) -> None:
    self.rng, self.shapes = rng, shapes
    self.occupied = np.repeat(shapes.border[:1], pages, axis=0)
    self.near = np.repeat(shapes.border[1:], pages, axis=0)

  def at(
    self, pages: np.ndarray, rows: np.ndarray, columns: np.ndarray
  ) -> np.ndarray:
    """Returns the positions of pixels in the flat array."""
    width, frame = self.shapes.width, self.shapes.frame
    return (pages * width + rows + frame) * width + columns + frame

  def occupy(self, pivots: np.ndarray, directions: np.ndarray) -> None:
    """Marks the room of bars, each on a different page, as occupied."""
    _paint(self.occupied, pivots, directions, self.shapes.room)
    _paint(self.near, pivots, directions, self.shapes.near)

  def collide(self, pivots: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Returns whether each bar overlaps occupied pixels."""
    offsets, values = self.shapes.room
    pixels = pivots[:, None] + offsets[directions]
    there = self.occupied.reshape(-1)[pixels]
    return np.any(there + values[directions] >= _OVERLAP, axis=1)

  def extend(
    self, pivots: np.ndarray, directions: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws the next bar of each snake.

    Returns:
      Which snakes found room, and the pivots and directions of their bars.
    """
    shapes = self.shapes
    following = pivots + shapes.steps[directions]
    near = self.near.reshape(-1)[following[:, None] + shapes.ends]
    weights = shapes.turns[directions] * (FULL - near)
    sums = np.cumsum(weights, axis=1)
    found = np.zeros(len(pivots), bool)
    chosen = np.zeros(len(pivots), np.int64)
    # A free end straight ahead weighs FULL. A snake has no room if its weights
    # add up to less than 1e-4 of that.
    pending = np.flatnonzero(sums[:, -1] > 1e-4 * FULL)
    for _ in range(_TRIES):
      drawn = self.rng.random(len(pending), np.float32) * sums[pending, -1]
      end = (sums[pending] <= drawn[:, None]).sum(axis=1)
      # By rounding, the draw may equal the total.
      end = np.minimum(end, len(shapes.ends) - 1)
      free = ~self.collide(following[pending], end)
      found[pending[free]], chosen[pending[free]] = True, end[free]
      pending = pending[~free]
    return found, following, chosen


def _paint(
  pages: np.ndarray,
  centres: np.ndarray,
  indices: np.ndarray,
  patches: Patches,
  factor: float = 1,
) -> None:
  """Sets pixels to the maximum of themselves and patches, in place.

  Args:
    pages: a flat array of pictures, or one that becomes flat.
    centres: position of each patch's centre in the flat array.
    indices: index of each patch in `patches`.
    patches: the patches.
    factor: brightness of the patches.
  """
  flat = pages.reshape(-1)
  pixels = centres[:, None] + patches.offsets[indices]
  values = patches.values[indices]
  if factor != 1:
    values = values * np.float32(factor)
  flat[pixels] = np.maximum(flat[pixels], values)


def _of_margin(
  rng: np.random.Generator,
  settings: Settings,
  margin: int,
  bars: int,
  allowed: tuple[int, int],
) -> Iterator[Pictures]:
  """Yields batches of pictures of one margin, see :func:`sample`."""
  shapes = make_shapes(settings, margin)
  pairs = max(1, _STATE_BYTES // (4 * shapes.width**2))
  grid = _Grid(rng, shapes, 2 * pairs)
  while True:
    grid.occupied[:], grid.near[:] = shapes.border[:, None]
    kept, long = _grow_long(grid, settings, bars, allowed)
    if len(kept):
      short = _grow_short(grid, kept, settings, bars, allowed)
      yield _finish(grid, settings, kept, long, short)


def _grow_long(
  grid: _Grid, settings: Settings, bars: int, allowed: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
  """Grows two long snakes in each picture.

  A picture has two pages, one per snake. The page of a snake holds all bars but
  the last one of this snake, from which the next bar need not keep its margin.

  Returns:
    The number of the first page of each picture that is kept, [count], which
    holds all bars in the end; and pivot (on that page) and direction of each
    bar, [count, 2 snakes, bars, 2].
  """
  rng, shapes = grid.rng, grid.shapes
  pages = np.arange(0, len(grid.occupied), 2)
  area = shapes.width**2
  distance = settings.seed_distance
  # With this bound, both starts are at least `distance` from the edge.
  low = 2 * distance
  tail = rng.integers(low, settings.side - low, (2, len(pages)))
  angle = np.deg2rad(rng.integers(0, DEGREES, len(pages)))
  away = np.rint(distance * np.stack([np.sin(angle), np.cos(angle)]))
  tails = [tail, tail + away.astype(int)]
  bars_of = np.zeros((len(pages), 2, bars, 2), np.int64)
  index = np.arange(len(pages))
  for snake, degrees in enumerate((allowed, (0, DEGREES))):
    direction = len(shapes.ends) + rng.integers(*degrees, len(pages))
    start = grid.at(pages, *tails[snake])
    bars_of[:, snake, 0, 0] = start - shapes.tails[direction]
    bars_of[:, snake, 0, 1] = direction
  grid.occupy(bars_of[:, 0, 0, 0] + area, bars_of[:, 0, 0, 1])
  grid.occupy(bars_of[:, 1, 0, 0], bars_of[:, 1, 0, 1])
  for bar in range(1, bars):
    for snake in range(2):
      own, other = snake * area, (1 - snake) * area
      pivots, directions = bars_of[index, snake, bar - 1].T
      found, following, chosen = grid.extend(pivots + own, directions)
      index, following, chosen = index[found], following[found], chosen[found]
      # Marks the predecessor only now: a bar may lie within its margin.
      grid.occupy(pivots[found] + own, directions[found])
      grid.occupy(following - own + other, chosen)
      bars_of[index, snake, bar, 0] = following - own
      bars_of[index, snake, bar, 1] = chosen
  # The first page lacks only the last bar of its own snake.
  grid.occupy(*bars_of[index, 0, -1].T)
  return pages[index], bars_of[index]


def _grow_short(
  grid: _Grid,
  kept: np.ndarray,
  settings: Settings,
  bars: int,
  allowed: tuple[int, int],
) -> np.ndarray:
  """Grows the short snakes of the pictures on the pages `kept`.

  Returns:
    Pivot and direction of each bar, [count, short snakes, bars // 3, 2]; -1 for
    missing snakes.
  """
  length = bars // 3
  count = settings.distractor_bars // length
  history = np.full((len(kept), count, length, 2), -1)
  for snake in range(count):
    pending = np.arange(len(kept))
    for _ in range(_SNAKE_TRIES):
      degrees = grid.rng.integers(0, DEGREES, len(pending))
      # A direction that is not allowed makes the try fail.
      able = (allowed[0] <= degrees) & (degrees < allowed[1])
      tried, directions = pending[able], degrees[able]
      directions += len(grid.shapes.ends)
      grown, places = _grow_one(grid, kept[tried], directions, length)
      history[tried[grown], snake] = places
      pending = np.setdiff1d(pending, tried[grown])
  return history


def _grow_one(
  grid: _Grid, pages: np.ndarray, directions: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
  """Grows one short snake on each page; leaves a page unchanged if it fails.

  Returns:
    The indices in `pages` where it succeeded, and pivot and direction of each
    bar of those snakes, [count, bars, 2].
  """
  pivots, free = _find_room(grid, pages, directions)
  index = np.flatnonzero(free)
  saved = grid.occupied[pages], grid.near[pages]
  history = np.zeros((len(pages), length, 2), np.int64)
  history[:, 0, 0], history[:, 0, 1] = pivots, directions
  for bar in range(1, length):
    before = history[index, bar - 1]
    found, pivot, direction = grid.extend(*before.T)
    index, before = index[found], before[found]
    grid.occupy(*before.T)
    history[index, bar, 0] = pivot[found]
    history[index, bar, 1] = direction[found]
  grid.occupy(*history[index, -1].T)
  failed = np.setdiff1d(np.arange(len(pages)), index)
  grid.occupied[pages[failed]] = saved[0][failed]
  grid.near[pages[failed]] = saved[1][failed]
  return index, history[index]


def _find_room(
  grid: _Grid, pages: np.ndarray, directions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Finds a pivot on each page from which a bar has room.

  Draws `_PLACES` pivots and takes the first that has room, so all pivots with
  room are equally likely.

  Returns:
    The pivots, and whether each has room.
  """
  shapes = grid.shapes
  size = (2, len(pages), _PLACES)
  # Nearer to the edge no bar has room, and patches would not fit the frame.
  low, high = shapes.margin, shapes.side - shapes.margin
  tails = grid.rng.integers(low, high, size)
  pivots = grid.at(pages[:, None], *tails)
  pivots -= shapes.tails[directions][:, None]
  collide = grid.collide(pivots.ravel(), np.repeat(directions, _PLACES))
  free = ~collide.reshape(-1, _PLACES)
  first = free.argmax(axis=1)
  return pivots[np.arange(len(pages)), first], np.any(free, axis=1)


def _finish(
  grid: _Grid,
  settings: Settings,
  kept: np.ndarray,
  long: np.ndarray,
  short: np.ndarray,
) -> Pictures:
  """Chooses labels at random, places the discs, and paints the pictures."""
  rng, shapes = grid.rng, grid.shapes
  count, area = len(kept), shapes.width**2
  pages = np.arange(count)
  # The canvas has one page per kept picture: moves the positions to it.
  shift = (pages - kept) * area
  long[..., 0] += shift[:, None, None]
  short[..., 0] += np.where(short[..., 0] < 0, 0, shift[:, None, None])
  labels = rng.integers(0, 2, count, np.uint8)
  start = rng.integers(0, 2, count)
  end = np.where(labels == 1, start, 1 - start)
  first, last = long[pages, start, 0].T, long[pages, end, -1].T
  discs = np.stack(
    [first[0] + shapes.tails[first[1]], last[0] + shapes.ends[last[1]]], axis=1
  )
  canvas = np.zeros((count, area), np.float32)
  for bars, light in ((long, settings.target), (short, settings.distractor)):
    for pivots, directions in bars.reshape(count, -1, 2).transpose(1, 2, 0):
      there = pivots >= 0
      _paint(canvas, pivots[there], directions[there], shapes.bar, light)
  for disc in discs.T:
    _paint(canvas, disc, np.zeros(count, int), shapes.disc)
  inside = slice(shapes.frame, -shapes.frame)
  canvas = canvas.reshape(count, shapes.width, shapes.width)[:, inside, inside]
  canvas = canvas / canvas.max(axis=(1, 2), keepdims=True)
  # Short snakes have fewer bars; the rest stays NaN.
  snakes_bars = np.full(
    (count, 2 + short.shape[1], long.shape[2], 4), np.nan, np.float32
  )
  snakes_bars[:, :2] = _segments(shapes, long)
  snakes_bars[:, 2:, : short.shape[2]] = _segments(shapes, short)
  return Pictures(
    pixels=np.rint(canvas * 255).astype(np.uint8).reshape(count, -1),
    labels=labels,
    discs=_coordinates(shapes, discs),
    snakes=snakes_bars,
  )


def _segments(shapes: Shapes, bars: np.ndarray) -> np.ndarray:
  """Returns start and end of bars from pivots and directions, [..., 4]."""
  pivots = _coordinates(shapes, bars[..., 0])
  segments = shapes.segments[bars[..., 1]] + np.tile(pivots, 2)
  return np.where(bars[..., :1] < 0, np.nan, segments)


def _coordinates(shapes: Shapes, flat: np.ndarray) -> np.ndarray:
  """Returns row and column in the picture of flat positions, [..., 2] int32."""
  rows, columns = np.divmod(flat % shapes.width**2, shapes.width)
  return (np.stack([rows, columns], axis=-1) - shapes.frame).astype(np.int32)
