"""Far and exact weights share one scale, in the mean and at any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from spectraformer_jax import attention
from tests.helpers import standard_scores
from tests.hybrid_attention.helpers import (
  HEAD_DIM,
  assert_close,
  build_map,
  definition,
  draw,
  hide,
)


def log_kernel(name, x, y):
  """Returns the logarithm of the kernel, ``[..., T, S]`` float64."""
  products = np.einsum("bthd,bshd->bhts", x, y)
  if name == "softmax":
    return products
  half = [0.5 * np.sum(z**2, axis=-1).swapaxes(1, 2) for z in (x, y)]
  return products - half[0][..., None] - half[1][:, :, None]


@pytest.mark.parametrize("name", ["softmax", "gaussian"])
@pytest.mark.quick_every(2)
def test_factors_of_a_query_are_not_dropped(name, monkeypatch):
  # Rows of zeros: features are e^(-|x|^2 / 2), or its square, over sqrt(M).
  maps = build_map(name)
  zeros = jax.tree.map(jnp.zeros_like, maps["variables"])
  arrays = draw(30, scale=3.0)
  attend = lambda: sf.spectral_attention(
    *arrays, feature_map=maps["feature_map"], variables=zeros, window=2
  )
  query, key, value = (np.asarray(x, np.float64) for x in arrays)
  x, y = (HEAD_DIM**-0.25 * z for z in (query, key))
  offset = np.arange(30)[:, None] - np.arange(30)[None]
  power = {"softmax": 0.5, "gaussian": 1.0}[name]
  of_far = [-power * np.sum(z**2, axis=-1).swapaxes(1, 2) for z in (x, y)]
  weights = np.exp(
    np.where(
      np.abs(offset) <= 2,
      log_kernel(name, x, y),
      of_far[0][..., None] + of_far[1][:, :, None],
    )
  )
  weights /= weights.sum(axis=-1, keepdims=True)
  expected = np.einsum("bhts,bshv->bthv", weights, value)
  assert_close(attend(), expected)

  # The features that suffice without exact keys do not suffice here.
  complete = attention.maps_of
  monkeypatch.setattr(
    attention, "maps_of", lambda *args, is_complete: complete(*args)
  )
  attention._spectral_attention.clear_cache()
  wrong = attend()
  attention._spectral_attention.clear_cache()
  assert np.abs(wrong - expected).max() > 0.1


@pytest.mark.parametrize("name", ["softmax", "gaussian", "signed"])
@pytest.mark.quick_every(3)
def test_sums_are_right_in_the_mean(name):
  # Key 0 is a sink whose value alone has a 1 in the last column, so the output
  # tells the divisor: the weight of key 0 is known.
  query, key, value = draw(6, scale=0.7, batch=1)
  value = np.concatenate([value, np.zeros((1, 6, 2, 1))], axis=-1)
  value[:, 0, :, -1] = 1.0
  fm = build_map(name)["feature_map"]

  def draw_out(rng):
    variables = fm.init(rng, head_dim=HEAD_DIM, num_heads=2)
    return sf.spectral_attention(
      query,
      key,
      jnp.asarray(value, jnp.float32),
      feature_map=fm,
      variables=variables,
      window=1,
      num_sinks=1,
      num_heavy=1,
      chunk_size=4,
    )

  rngs = jax.random.split(jax.random.key(3), 4000)
  out = np.asarray(jax.jit(jax.vmap(draw_out))(rngs), np.float64)
  x, y = (HEAD_DIM**-0.25 * np.asarray(z, np.float64) for z in (query, key))
  weights = np.exp(log_kernel(fm.component.kernel, x, y))
  divisors = weights[..., 0].swapaxes(1, 2)[..., None] / out[..., -1:]
  expected = np.einsum("bhts,bshv->bthv", weights, value)[..., :-1]
  total = weights.sum(-1).swapaxes(1, 2)[..., None]
  scores = standard_scores(
    np.concatenate([out[..., :-1] * divisors, divisors], axis=-1),
    np.concatenate([expected, total], axis=-1),
  )
  # A signed far sum that is mostly noise is dropped: at these norms, seldom.
  assert np.abs(scores).max() < (8.0 if name == "signed" else 4.0)
  # Draws do differ.
  assert (divisors.std(axis=0) > 1e-3 * total).any()


@pytest.mark.parametrize(
  ("name", "case"),
  [
    ("softmax", {"window": 3, "num_sinks": 2, "num_heavy": 2}),
    ("signed", {"window": 3, "num_sinks": 2, "is_causal": True}),
    ("gaussian", {"window": 3, "num_sinks": 2, "is_causal": True}),
    ("softmax", {"window": 3, "is_causal": True}),
    ("gaussian", {"window": (0, 3)}),
    ("signed gaussian", {"num_heavy": 2}),
  ],
)
@pytest.mark.quick_every(6)
def test_scores_of_ten_thousand(name, case):
  query, key, value = draw(30)
  scores = np.einsum("bthd,bshd->bhts", query, key) * HEAD_DIM**-0.5
  factor = (1e4 / np.abs(scores).max()) ** 0.5
  arrays = factor * query, factor * key, value
  case = {**case, "key_mask": hide(30, [4])}
  expected = definition(arrays, **build_map(name), **case)
  for implementation in ("xla", "reference"):
    got = sf.spectral_attention(
      *arrays,
      chunk_size=8,
      implementation=implementation,
      **build_map(name),
      **case,
    )
    # One unit in the last place of such a score is 0.001.
    assert_close(got, expected, 1e-2)


def test_a_far_part_that_underflows_is_dropped_only_where_it_is_nothing():
  # In one chunk, keys of very different size share a scale of features.
  query, key, value = draw(30)
  case = {"num_sinks": 2, "is_causal": True}
  num_nan = 0
  for scale in (1.0, 5.0, 15.0, 40.0):
    arrays = scale * query, scale * key, value
    expected = definition(arrays, **build_map(), **case)
    for implementation in ("xla", "reference"):
      got = sf.spectral_attention(
        *arrays, implementation=implementation, **build_map(), **case
      )
      is_nan = np.isnan(got).any(-1)
      num_nan += is_nan.sum()
      assert not is_nan.any() or scale > 5.0
      assert_close(np.where(is_nan[..., None], expected, got), expected, 1e-2)
  assert num_nan
