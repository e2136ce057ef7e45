import math

import pytest

from spectraformer_jax.data import split_by_content

SHARES = {"train": 0.8, "dev": 0.1, "test": 0.1}


def assign(contents, seed=0):
  """Content to the name of its split."""
  parts = split_by_content(contents, SHARES, seed)
  return {contents[i]: name for name, rows in parts.items() for i in rows}


def test_shares_are_met():
  contents = [str(i).encode() for i in range(10_000)]
  parts = split_by_content(contents, SHARES, seed=3)
  everything = sorted(i for rows in parts.values() for i in rows)
  assert everything == list(range(10_000))
  for name, share in SHARES.items():
    # Four standard deviations of a binomial count.
    slack = 4 * math.sqrt(10_000 * share * (1 - share))
    assert abs(len(parts[name]) - 10_000 * share) < slack


def test_only_content_and_seed_decide():
  contents = [str(i).encode() for i in range(200)]
  alone = assign(contents)
  assert assign(contents[::-1]) == alone
  few = assign(contents[:50])
  assert few == {content: alone[content] for content in contents[:50]}
  assert assign(contents, seed=1) != alone


def test_equal_contents_stay_together():
  parts = split_by_content([b"a", b"b"] * 20, SHARES, seed=0)
  for rows in parts.values():
    assert len(rows) in (0, 20, 40)


def test_bad_arguments_are_refused():
  with pytest.raises(ValueError, match="shares must be >= 0 and add up to 1"):
    split_by_content([], {"train": 0.8, "dev": 0.1}, 0)
  with pytest.raises(ValueError, match="seed must be an integer >= 0, got -1"):
    split_by_content([], SHARES, -1)
