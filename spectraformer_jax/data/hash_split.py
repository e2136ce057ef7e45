"""Splits by content: equal examples never stand on both sides."""

import hashlib
import itertools
from collections.abc import Iterable, Mapping

import numpy as np

from spectraformer_jax.seeds import check_seed


def split_by_content(
  contents: Iterable[bytes], shares: Mapping[str, float], seed: int
) -> dict[str, np.ndarray]:
  """Assigns each content to a split by its hash.

  Nothing but the content and the seed decides, neither order nor company, so
  the sizes are only about the shares.

  Args:
    contents: what identifies each example.
    shares: split name to the expected share; they add up to 1.
    seed: another seed gives an independent split.

  Returns:
    Split name to the indices that fall into it, in order, int64.

  Raises:
    ValueError: if a share is negative or they do not add up to 1, or the seed
      is not an integer >= 0 and below 2**64.

  Example:
    >>> parts = split_by_content([b"a", b"b", b"a"], {"x": 0.5, "y": 0.5}, 0)
    >>> sorted(parts["x"].tolist() + parts["y"].tolist())
    [0, 1, 2]
  """
  seed = check_seed("seed", seed)
  total = sum(shares.values())
  if min(shares.values()) < 0 or abs(total - 1) > 1e-9:
    raise ValueError(f"shares must be >= 0 and add up to 1, got {shares!r}.")
  salt = f"{seed}:".encode()
  position = np.array([_unit_interval(salt + c) for c in contents])
  ends = list(itertools.accumulate(shares.values()))
  chosen = np.searchsorted(ends[:-1], position, side="right")
  return {split: np.flatnonzero(chosen == i) for i, split in enumerate(shares)}


def _unit_interval(content: bytes) -> float:
  """A number in [0, 1) that depends on every bit of the content."""
  return int.from_bytes(hashlib.sha256(content).digest()[:6]) / 2**48
