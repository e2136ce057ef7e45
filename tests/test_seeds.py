"""Seeds below 2**64 differ; below 2**32 they give the keys of JAX."""

import itertools

import jax
import numpy as np
import pytest

from spectraformer_jax import seeds
from spectraformer_jax.data.batches import epoch_order
from spectraformer_jax.train.step.state import run_keys

WORD = 2**32
SEEDS = (0, 1, 5, WORD - 1, WORD, WORD + 5, 5 * WORD, 2**63, 2**63 + 5)
SEEDS = (*SEEDS, 2**64 - WORD, 2**64 - 1)


def words(keys):
  return tuple(map(int, np.ravel([jax.random.key_data(key) for key in keys])))


def test_seeds_give_different_keys():
  keys_of_seeds = [words(run_keys(seed)) for seed in SEEDS]
  for one, two in itertools.combinations(range(len(SEEDS)), 2):
    # Not only all four together: each of parameters, projections, dropout and
    # redraws differs.
    for i in range(0, 8, 2):
      assert keys_of_seeds[one][i : i + 2] != keys_of_seeds[two][i : i + 2]


@pytest.mark.parametrize("seed", [0, 1, 5, 2**31, WORD - 1])
def test_seeds_below_2_32_give_the_keys_of_jax(seed):
  before = jax.random.split(jax.random.key(np.uint32(seed)), 4)
  assert words(run_keys(seed)) == words(before)


def test_keys_do_not_depend_on_x64():
  plain = [words(run_keys(seed)) for seed in SEEDS]
  with jax.enable_x64(True):
    assert [words(run_keys(seed)) for seed in SEEDS] == plain
    # What JAX itself makes of a seed where it has the room.
    assert words([seeds.make_key(WORD + 5)]) == words(
      [jax.random.key(WORD + 5)]
    )


def test_streams_differ():
  draw = lambda *args: seeds.make_generator(*args).bytes(8)
  streams = [*itertools.product(SEEDS, range(3)), (1, 5), (2, 5)]
  assert len({draw(*stream) for stream in streams}) == len(streams)
  for seed, index in itertools.product((0, 5, WORD - 1), range(3)):
    assert draw(seed, index) == np.random.default_rng([seed, index]).bytes(8)


def test_orders_of_large_seeds_differ():
  orders = {epoch_order(50, seed, 0).tobytes() for seed in SEEDS}
  assert len(orders) == len(SEEDS)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, None, "1"])
def test_wrong_seeds_are_refused(seed):
  right = "below 2\\*\\*64" if seed == 2**64 else "an integer >= 0"
  with pytest.raises(ValueError, match=f"seed must be {right}, got"):
    run_keys(seed)
