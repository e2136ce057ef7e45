import numpy as np
import pytest

from spectraformer_jax.data import Dataset


@pytest.fixture
def make_toy():
  """A function that makes a dataset of n examples, each unlike the others."""

  def make(count=23, seed=0, **facts):
    rng = np.random.default_rng(seed)
    sequences = [
      np.append(rng.integers(1, 200, rng.integers(1, 8)), i + 1)
      for i in range(count)
    ]
    labels = rng.integers(0, 3, count)
    facts = dict(name="toy", vocab_size=256, num_classes=3, length=9) | facts
    return Dataset.from_sequences(sequences, labels, **facts)

  return make
