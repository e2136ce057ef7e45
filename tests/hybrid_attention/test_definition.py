"""Hybrid attention equals its definition, for every way to choose keys."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from tests.hybrid_attention.helpers import (
  MAPS,
  assert_close,
  build_map,
  definition,
  draw,
)
from tests.hybrid_attention.helpers import hide as mask

LENGTH, CHUNK = 45, 16
# Sorted, with a segment of one position; and interleaved.
IDS = np.stack(
  [np.digitize(np.arange(LENGTH), [13, 14, 30]), np.arange(LENGTH) % 3]
)
HIDDEN = {"key_mask": mask(LENGTH, [0, 7, 8])}
CASES = {
  "everything": {
    **HIDDEN,
    "window": 5,
    "num_sinks": 2,
    "num_heavy": 4,
    "query_mask": mask(LENGTH, [3]),
  },
  "causal": {**HIDDEN, "window": 7, "num_sinks": 2, "is_causal": True},
  "packed": {**HIDDEN, "window": 4, "num_sinks": 2, "segment_ids": IDS},
  "packed causal": {
    **HIDDEN,
    "window": 4,
    "num_sinks": 2,
    "segment_ids": IDS,
    "is_causal": True,
  },
  "packed sinks": {**HIDDEN, "num_sinks": 2, "segment_ids": (IDS, IDS[::-1])},
  "packed causal sinks": {
    **HIDDEN,
    "num_sinks": 2,
    "segment_ids": IDS,
    "is_causal": True,
  },
  "sinks": {**HIDDEN, "num_sinks": 3},
  "causal sinks": {**HIDDEN, "num_sinks": 3, "is_causal": True},
  "heavy": {**HIDDEN, "num_heavy": 5},
  "heavy window": {"num_heavy": 3, "window": 2},
} | {
  f"window {window} {is_causal}": {"window": window, "is_causal": is_causal}
  for window in (CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, (2, 11), (16, 2), 0)
  for is_causal in (False, True)
}


def attend(arrays, maps, implementation="xla", **case):
  case = {"chunk_size": CHUNK} | case
  return sf.spectral_attention(
    *arrays, **maps, implementation=implementation, **case
  )


def gradients(arrays, maps, **case):
  """Returns output, gradients of the arrays, and the weights of the loss."""
  shape = (*arrays[0].shape[:3], arrays[2].shape[-1])
  weights = np.cos(np.arange(np.prod(shape), dtype=np.float32)).reshape(shape)

  def loss(arrays):
    out = attend(arrays, maps, **case)
    return jnp.sum(out * weights), out

  found, out = jax.grad(loss, has_aux=True)(arrays)
  return out, found, weights


# Every case with one map and once with grouped queries.
@pytest.mark.parametrize(
  ("name", "case", "groups"),
  [
    (name, case, 1 + index % 2)
    for index, (name, case) in enumerate(zip(itertools.cycle(MAPS), CASES))
  ],
)
@pytest.mark.quick_every(7)
def test_output_is_that_of_the_definition(name, case, groups):
  arrays, maps = draw(LENGTH, groups=groups), build_map(name)
  expected = definition(arrays, **maps, **CASES[case])
  assert_close(attend(arrays, maps, **CASES[case]), expected)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MAPS)
def test_every_map(name, case, groups):
  arrays, maps = draw(LENGTH, groups=groups), build_map(name)
  expected = definition(arrays, **maps, **CASES[case])
  for implementation in ("xla", "reference"):
    got = attend(arrays, maps, implementation, **CASES[case])
    assert_close(got, expected)


@pytest.mark.parametrize("keys", [30, 60])
@pytest.mark.parametrize(
  "case",
  [
    {"num_sinks": 2, "is_causal": True},
    {"num_sinks": 2, "num_heavy": 3},
  ],
)
@pytest.mark.quick_every(4)
def test_queries_and_keys_of_other_lengths(case, keys):
  arrays, maps = draw(LENGTH, keys, groups=2), build_map()
  case = {**case, "key_mask": mask(keys, [0, 9])}
  expected = definition(arrays, **maps, **case)
  for implementation in ("xla", "reference"):
    assert_close(attend(arrays, maps, implementation, **case), expected)


@pytest.mark.parametrize("case", ["causal", "everything", "packed"])
@pytest.mark.quick_every(3)
def test_chunk_size_does_not_matter(case):
  arrays, maps = draw(LENGTH), build_map()
  expected = attend(arrays, maps, **CASES[case])
  for chunk_size in (7, None):
    got = attend(arrays, maps, **{**CASES[case], "chunk_size": chunk_size})
    assert_close(got, expected, 1e-5)


@pytest.mark.parametrize(
  ("name", "case"),
  [
    ("softmax", "everything"),
    ("gaussian", "heavy"),
    ("tuned", "causal"),
    ("gaussian", "packed"),
    ("softmax", "packed causal"),
    ("gaussian", "packed sinks"),
    ("softmax", "causal sinks"),
    ("tuned", "sinks"),
    ("gaussian", "window (2, 11) False"),
    ("softmax", "window 0 False"),
  ],
)
@pytest.mark.quick_every(9)
def test_gradients_are_those_of_the_definition(name, case):
  arrays, maps = draw(LENGTH, groups=2), build_map(name)
  case, step = CASES[case], 3e-3
  out, found, weights = gradients(arrays, maps, **case)
  value = lambda arrays_: definition(arrays_, **maps, chosen_by=arrays, **case)
  assert_close(out, value(arrays))
  # Central differences of float64 sums over float32 features. The package is
  # float32 throughout; with float64 features, 1e-6 would do.
  move = draw(LENGTH, groups=2, seed=1)
  moved = lambda t: [
    np.asarray(x, np.float64) + t * np.asarray(d, np.float64)
    for x, d in zip(arrays, move, strict=True)
  ]
  up, down = (np.sum(value(moved(t)) * weights) for t in (step, -step))
  products = [g * d for g, d in zip(found, move, strict=True)]
  got, size = (
    sum(np.sum(function(x)) for x in products)
    for function in (np.array, np.abs)
  )
  assert abs(got - (up - down) / (2 * step)) < 2e-5 * size


@pytest.mark.parametrize(
  "case",
  [
    "everything",
    "causal",
    "packed",
    "packed causal sinks",
    "heavy",
    "window (16, 2) False",
  ],
)
@pytest.mark.parametrize("name", list(MAPS)[::-1])
@pytest.mark.quick_every(30)
def test_gradients_are_those_of_the_reference(name, case):
  arrays, maps = draw(LENGTH, groups=2), build_map(name)
  got = gradients(arrays, maps, **CASES[case])
  plain = gradients(arrays, maps, **CASES[case], implementation="reference")
  # Both are float32; float64 would allow 1e-6.
  assert_close(got, plain, 1e-5)
