"""Whether paths join discs, found by flooding a fine drawing of them."""

import numpy as np
from scipy import ndimage

FINE = 8  # points per pixel


def present(snake):
  """The bars of a snake, [bars, 4]."""
  return snake[~np.isnan(snake[:, 0])]


def flooded(snakes, side):
  """Connected pieces of all snakes, as fine lines with their gaps closed."""
  canvas = np.zeros((side * FINE, side * FINE), bool)
  for snake in snakes:
    joints = present(snake).reshape(-1, 2)
    for start, end in zip(joints[:-1], joints[1:], strict=True):
      part = np.linspace(0, 1, 1 + int(2 * FINE * np.abs(end - start).max()))
      points = start + (end - start) * part[:, None]
      canvas[tuple(np.rint(FINE * points).astype(int).T)] = True
  return ndimage.label(canvas, structure=np.ones((3, 3)))


def piece_at(pieces, disc):
  """The piece that begins or ends at the centre of a disc."""
  points = np.argwhere(pieces)
  distances = np.linalg.norm(points - FINE * disc, axis=1)
  # Centres are pixels, ends of bars are not: at most half a diagonal apart.
  assert distances.min() <= 0.71 * FINE + 1
  return pieces[tuple(points[distances.argmin()])]


def check(pictures, side):
  """For each picture: whether a path joins the discs, whether snakes touch."""
  joined, touching = [], []
  for snakes, discs in zip(pictures.snakes, pictures.discs, strict=True):
    pieces, found = flooded(snakes, side)
    touching.append(found != sum(len(present(snake)) > 0 for snake in snakes))
    joined.append(piece_at(pieces, discs[0]) == piece_at(pieces, discs[1]))
  return np.array(joined), np.array(touching)
