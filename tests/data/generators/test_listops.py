"""The law of the sequences, against the published grammar's own figures."""

import random

import numpy as np
import pytest

from spectraformer_jax.data.formats.listops_text import CLOSE, MIN, SM, evaluate
from spectraformer_jax.data.generators.listops import sample

PUBLISHED = dict(min_len=500, max_len=2000, max_depth=10)
SHORT = dict(min_len=5, max_len=60, max_depth=4)

# Measured on 100,000 sequences of the published grammar.
REFERENCE_COUNT = 100_000
LABEL_SHARES = np.array(
  [0.1685, 0.0909, 0.0775, 0.0825, 0.0907, 0.0854, 0.0757, 0.0717, 0.0873]
  + [0.1698]
)
MEAN_LENGTH, SD_LENGTH = 1035.5, 394
PERCENTILES = {5: 539, 25: 703, 50: 956, 75: 1310, 90: 1642, 95: 1797, 99: 1953}


def draw(count, seed, **window):
  """The first `count` sequences, one array each, and their values."""
  sequences, values = [], []
  for batch in sample(np.random.default_rng(seed), **window):
    ends = np.cumsum(batch.lengths)
    assert ends[-1] == len(batch.tokens)
    sequences += np.split(batch.tokens, ends[:-1])
    values += batch.values.tolist()
    if len(values) >= count:
      return sequences[:count], np.array(values[:count])


@pytest.fixture(scope="module")
def published():
  return draw(20_000, 0, **PUBLISHED)


def depth(sequence):
  """Depth of the deepest node; the root has depth 1."""
  opened = (sequence >= MIN) & (sequence <= SM)
  steps = opened.astype(int) - (sequence == CLOSE)
  return np.cumsum(steps).max() + 1


def scalar_tree(rng, max_depth, level=1):
  """One tree of the grammar, node by node."""
  if level == max_depth or rng.random() >= 0.25:
    return [rng.randint(1, 10)]
  tokens = [rng.randint(MIN, SM)]
  for _ in range(rng.randint(2, 10)):
    tokens += scalar_tree(rng, max_depth, level + 1)
  return [*tokens, CLOSE]


def scalar_draw(count, seed, *, min_len, max_len, max_depth):
  """As `draw`, by rejection of whole trees."""
  rng, kept = random.Random(seed), []
  while len(kept) < count:
    tree = scalar_tree(rng, max_depth)
    if min_len < len(tree) < max_len:
      kept.append(tree)
  return kept, np.array([evaluate(tree) for tree in kept])


def share_error(shares, *counts):
  """Standard error of the difference of shares measured on such samples."""
  return np.sqrt(shares * (1 - shares) * sum(1 / count for count in counts))


def test_values_agree_with_the_scalar_evaluator(published):
  sequences, values = published
  expected = [evaluate(sequence.tolist()) for sequence in sequences[:3000]]
  assert values[:3000].tolist() == expected


def test_length_window_is_strict_on_both_sides(published):
  lengths = [len(sequence) for sequence in published[0]]
  assert min(lengths) > 500 and max(lengths) < 2000
  short, _ = draw(2000, 0, min_len=4, max_len=7, max_depth=3)
  assert {len(sequence) for sequence in short} == {5, 6}


def test_depth_limit(published):
  # At these lengths every tree reaches the limit, and none exceeds it.
  assert {depth(sequence) for sequence in published[0]} == {10}
  shallow, values = draw(500, 0, min_len=3, max_len=100, max_depth=2)
  assert {depth(sequence) for sequence in shallow} == {2}
  assert values.tolist() == [evaluate(sequence) for sequence in shallow]


def test_label_shares(published):
  _, values = published
  shares = np.bincount(values, minlength=10) / len(values)
  error = share_error(LABEL_SHARES, len(values), REFERENCE_COUNT)
  assert (np.abs(shares - LABEL_SHARES) < 4 * error).all()


def test_length_statistics(published):
  lengths = np.array([len(sequence) for sequence in published[0]])
  count = len(lengths)
  error = SD_LENGTH * np.sqrt(1 / count + 1 / REFERENCE_COUNT)
  assert abs(lengths.mean() - MEAN_LENGTH) < 4 * error
  # The spread of a standard deviation is at most that of a normal law here.
  assert abs(lengths.std() - SD_LENGTH) < 4 * SD_LENGTH / np.sqrt(2 * count)
  for percent, reference in PERCENTILES.items():
    below = (lengths < reference).mean()
    error = share_error(percent / 100, count, REFERENCE_COUNT)
    # 0.002: the reference is rounded to a token, at a density below 0.0015.
    assert abs(below - percent / 100) < 4 * error + 0.002


def test_token_shares(published):
  tokens = np.concatenate(published[0])
  shares = np.bincount(tokens, minlength=16) / len(tokens)
  # The reference has three decimals; 0.001 is twice their rounding.
  assert np.abs(shares[1:11] - 0.072).max() < 0.001
  assert np.abs(shares[11:15] - 0.036).max() < 0.001
  assert abs(shares[15] - 0.142) < 0.001
  assert shares[0] == 0


def test_root_operator_alone_predicts_as_well_as_it_should(published):
  sequences, values = published
  roots = np.array([sequence[0] for sequence in sequences])
  table = np.zeros((16, 10))
  np.add.at(table, (roots, values), 1)
  # Standard error 0.0034 on 20,000.
  assert abs(table.max(axis=1).sum() / len(values) - 0.362) < 0.01


def test_same_law_as_a_scalar_sampler():
  count = 3000
  fast, fast_values = draw(count, 1, **SHORT)
  slow, slow_values = scalar_draw(count, 1, **SHORT)
  for quantity in (
    lambda tree, value: value,
    lambda tree, value: tree[0],
    lambda tree, value: depth(np.asarray(tree)),
    lambda tree, value: len(tree) // 6,
    lambda tree, value: sum(MIN <= token <= SM for token in tree),
  ):
    ours, theirs = (
      np.bincount([quantity(t, v) for t, v in zip(*pair, strict=True)])
      for pair in ((fast, fast_values), (slow, slow_values))
    )
    size = max(len(ours), len(theirs))
    ours = np.pad(ours, (0, size - len(ours)))
    theirs = np.pad(theirs, (0, size - len(theirs)))
    pooled = (ours + theirs) / (2 * count)
    # Four standard errors; one count where nearly none is expected.
    slack = 4 * share_error(pooled, count, count) + 1 / count
    assert (np.abs(ours - theirs) / count < slack).all()


def test_stream_depends_on_the_seed_alone():
  first, _ = draw(50, 5, **PUBLISHED)
  again, _ = draw(50, 5, **PUBLISHED)
  other, _ = draw(50, 6, **PUBLISHED)
  assert [s.tolist() for s in first] == [s.tolist() for s in again]
  assert first[0].tolist() != other[0].tolist()
