"""Measures speed, statistics and labels of synthetic Pathfinder pictures.

    python -m benchmarks.pathfinder_synthetic [--seconds=8] [--flood=3000]

Prints the table of docs/data.md: pictures a second on one core, the share of
label 1, short chains in a picture, how many labels a flood fill of the paths
did not confirm, in how many pictures two paths touched, and statistics of
pixels. Then prints how well simple models guess the label of a picture of
32 x 32 without its paths. Run it from the repository: the flood fill is a
module of the tests, and needs their extra.
"""

import argparse
import time
from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression

from spectraformer_jax.data.generators.pathfinder import (
  SEEDINGS,
  Pictures,
  sample,
)
from spectraformer_jax.data.generators.pathfinder_shapes import SETTINGS
from tests.data import flood

HEADER = (
  "| side | bars | seeding | pictures/s | pictures | label 1 | short chains "
  "| flooded: wrong, touching | pixels |\n|" + "---|" * 9
)
LEAK_PICTURES = 6000


def draw(side: int, bars: int, seeding: str, seconds: float) -> tuple:
  """Draws pictures; returns them and the number drawn per second."""
  batches, rng = [], np.random.default_rng(0)
  start = time.perf_counter()
  for batch in sample(rng, SETTINGS[side], bars=bars, seeding=seeding):
    batches.append(batch)
    elapsed = time.perf_counter() - start
    if elapsed > seconds:
      break
  joined = map(np.concatenate, zip(*batches, strict=True))
  pictures = Pictures(*joined)
  return pictures, len(pictures.labels) / elapsed


def row(side: int, bars: int, seeding: str, rate: float, pictures, most: int):
  """Measures and formats a line of the table."""
  some = Pictures(*(array[:most] for array in pictures))
  joined, touching = flood.check(some, side)
  pixels = pictures.pixels
  values = [f"{pixels.mean():.1f}", f"{pixels.std(axis=1).mean():.1f}"]
  values += [f"{(pixels >= x).mean():.3f}"[1:] for x in (32, 64, 128, 192)]
  short = np.isfinite(pictures.snakes[:, 2:, 0, 0]).sum(axis=1).mean()
  return (
    f"| {side} | {bars} | `{seeding}` | {rate:,.0f} | {len(pixels):,} "
    f"| {pictures.labels.mean():.3f} | {short:.1f} | {len(joined):,}: "
    f"{(joined != some.labels).sum()}, {touching.sum()} "
    f"| {', '.join(values)} |"
  )


def leak(pictures) -> str:
  """Scores linear models of the pixels, and of disc distance and brightness."""
  labels = pictures.labels[:LEAK_PICTURES]
  half = len(labels) // 2
  pixels = pictures.pixels[: 2 * half].astype(np.float32) / 255
  discs = pictures.discs[: 2 * half]
  plain = np.stack(
    [np.linalg.norm(discs[:, 0] - discs[:, 1], axis=1), pixels.mean(axis=1)],
    axis=1,
  )
  plain = (plain - plain.mean(axis=0)) / plain.std(axis=0)
  plain = np.concatenate([plain, plain**2], axis=1)
  scores = [
    LogisticRegression(C=0.01, max_iter=1000)
    .fit(inputs[:half], labels[:half])
    .score(inputs[half:], labels[half : 2 * half])
    for inputs in (pixels, plain)
  ]
  share = labels[half : 2 * half].mean()
  return (
    f"fitted on {half:,}, scored on as many: pixels {scores[0]:.3f}, distance "
    f"of the discs and brightness {scores[1]:.3f}, commonest label "
    f"{max(share, 1 - share):.3f}"
  )


def main(argv: Sequence[str] | None = None) -> list[str]:
  """Runs the command; returns the printed lines."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--seconds", type=float, default=8, help="for each row")
  parser.add_argument("--flood", type=int, default=3000, help="at most")
  args = parser.parse_args(argv)
  lines = [HEADER]
  kinds = [(side, 14, seeding) for side in SETTINGS for seeding in SEEDINGS]
  for kind in [*kinds, (32, 9, "upstream"), (32, 6, "upstream")]:
    pictures, rate = draw(*kind, args.seconds)
    lines.append(row(*kind, rate, pictures, args.flood))
    if kind == kinds[0]:
      leak_line = leak(pictures)
  lines.append(leak_line)
  print("\n".join(lines))
  return lines


if __name__ == "__main__":
  main()
