"""Splits data by content: equal examples always belong to the same split."""

import hashlib
import itertools
from collections.abc import Iterable, Mapping

import numpy as np

from spectraformer_jax.seeds import check_seed

SHARES = {"train": 0.8, "dev": 0.1, "test": 0.1}
"""Shares of the splits for data that come without splits."""


def split_by_content(
  contents: Iterable[bytes], shares: Mapping[str, float], seed: int
) -> dict[str, np.ndarray]:
  """Assigns each example to a split by the hash of its content.

  The split of an example depends on its content and the seed only, not on its
  position or the other examples, so the sizes only approximate the shares.

  Args:
    contents: the bytes that identify each example.
    shares: maps each split to its expected share; the shares add up to 1.
    seed: different seeds give independent splits.

  Returns:
    For each split, the sorted indices of its examples, int64.

  Raises:
    ValueError: if a share is negative, if the shares do not add up to 1, or if
      the seed is not an integer >= 0 and below 2**64.

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
  """Returns a number in [0, 1) that depends on every bit of the content."""
  return int.from_bytes(hashlib.sha256(content).digest()[:6]) / 2**48
