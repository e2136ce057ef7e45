"""Moments averaged over examples, against pooled data in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from spectraformer_jax.components import Centred, ComponentState
from spectraformer_jax.components.discrete_laws import optimal_p
from tests.components.helpers import build_case

CASES = ("oprf", "oprf_hyp", "saderf", "perdim", "sderf", "aderf", "asderf")


def examples(batch=9, length=7, head_dim=4, offset=0.0, seed=0):
  """Draws queries and keys ``[B, T, 1, H]`` of unlike means and spreads."""
  rng = np.random.default_rng(seed)
  out = []
  for mean in (0.3, -0.2):
    centres = rng.normal(size=(batch, 1, head_dim)) + mean + offset
    spread = rng.uniform(0.1, 0.6, size=(batch, 1, head_dim))
    out.append(centres + spread * rng.normal(size=(batch, length, head_dim)))
  # Means of queries and of keys are alike within an example.
  out[1] += 0.7 * out[0].mean(axis=1, keepdims=True)
  return [jnp.asarray(x, jnp.float32)[:, :, None, :] for x in out]


def averaged_stats(fm, query, key, **masks):
  """Returns the stats from moments averaged over examples, of one head."""
  variables = fm.init(jax.random.key(0), head_dim=query.shape[-1])
  mean, counts = fm.mean_moments(variables, query, key, **masks)
  assert bool(counts)
  stats = fm.solve(mean)["component"]
  return jax.tree.map(lambda leaf: leaf[0, 0], stats)


def pooled_moments(component, query, key, centres=(0.0, 0.0)):
  """Computes moments of all vectors about shared centres, in float64."""
  x, y = (
    np.asarray(z[:, :, 0], np.float64) - c
    for z, c in zip((query, key), centres, strict=True)
  )
  one = component.moments(query[0, :, 0], key[0, :, 0], None, None)
  ndim = one["query_square"].ndim
  outer = lambda a, b: np.einsum("eth,etg->hg", a, b) / np.prod(a.shape[:2])
  mean_x, mean_y = (z.mean(axis=1, keepdims=True) for z in (x, y))
  shrink = (np.trace, np.diag, np.asarray)[ndim]
  moments = {
    "query_square": shrink(outer(x, x)),
    "key_square": shrink(outer(y, y)),
    "query_mean": x.mean(axis=(0, 1)),
    "key_mean": y.mean(axis=(0, 1)),
    "cross": shrink(outer(mean_x, mean_y)),
  }
  return {k: jnp.asarray(v, jnp.float32) for k, v in moments.items()}


@pytest.mark.parametrize("kernel", ["softmax", "gaussian"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.quick_every(3)
def test_centring_takes_one_centre_for_all_examples(case, kernel):
  query, key = examples(offset=1.0)
  base = build_case(case, statistics="ema", kernel=kernel).component
  fm = sf.compose(Centred(base), build_case(case).weight_matrix, num_features=8)
  stats = averaged_stats(fm, query, key)
  means = [np.asarray(z, np.float64).mean(axis=(0, 1, 2)) for z in (query, key)]
  if kernel == "gaussian":
    means = [0.5 * (means[0] + means[1])] * 2
  expected = base.solve(pooled_moments(base, query, key, means))
  for name in expected:
    np.testing.assert_allclose(
      stats["base"][name], expected[name], rtol=2e-3, atol=2e-3, err_msg=name
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.quick_every(3)
def test_products_of_means_are_averaged_as_products(case):
  query, key = examples()
  fm = build_case(case, statistics="ema")
  stats = averaged_stats(fm, query, key)
  expected = fm.component.solve(pooled_moments(fm.component, query, key))
  for name in expected:
    np.testing.assert_allclose(
      stats[name], expected[name], rtol=2e-3, atol=2e-3, err_msg=name
    )


def mean_log_second_moment(component, stats, query, key):
  """Returns the mean of log E Z^2 over all examples and pairs."""
  state = lambda stats: ComponentState({}, {}, stats)
  one = lambda stats, x, y: jnp.mean(
    component.log_second_moment(x[:, None], y[None, :], state(stats))
  )
  per_example = jax.tree.leaves(stats)[0].ndim > 2
  moment = jax.vmap(one, in_axes=(0 if per_example else None, 0, 0))
  if per_example:
    stats = jax.tree.map(lambda leaf: leaf[:, 0], stats)
  with jax.numpy_rank_promotion("allow"):
    return float(jnp.mean(moment(stats, query[:, :, 0], key[:, :, 0])))


def test_running_centres_do_not_raise_the_second_moment():
  rng = np.random.default_rng(0)
  means = rng.normal(scale=0.6, size=(32, 1, 1, 32))
  query, key = (
    jnp.asarray(
      means + rng.normal(scale=0.3, size=(32, 40, 1, 32)), jnp.float32
    )
    for _ in range(2)
  )
  value = {}
  for centred in (False, True):
    fm = sf.feature_map(
      "oprf",
      "iid",
      num_features=8,
      component_kwargs={"statistics": "ema", "centred": centred},
    )
    stats = averaged_stats(fm, query, key)
    value[centred] = mean_log_second_moment(fm.component, stats, query, key)
  # Means that scatter about zero: a common centre gains nothing and loses
  # nothing. Moments of each example about its own centre give 52.6, not 40.6.
  assert abs(value[True] - value[False]) < 0.5


@pytest.mark.parametrize("name", ["poisrf", "poisrf_plus"])
@pytest.mark.parametrize("centred", [False, True])
def test_rate_is_the_best_for_all_examples(name, centred):
  query, key = examples(offset=0.5, batch=5)
  fm = sf.feature_map(
    name,
    "iid",
    num_features=8,
    component_kwargs={"statistics": "ema", "centred": centred},
  )
  stats = averaged_stats(fm, query, key)
  own = stats["base"] if centred else stats
  x, y = (np.asarray(z[:, :, 0], np.float64) for z in (query, key))
  if centred:
    x, y = (z - z.mean(axis=(0, 1)) for z in (x, y))
  shift = np.asarray(own.get("shift", 0.0), np.float64)
  products = np.mean((x - shift) ** 2, 1) * np.mean((y - shift) ** 2, 1)
  # Exact but for centring, which takes scatter as independent of spread.
  tolerance = 0.25 if centred else 1e-3
  np.testing.assert_allclose(
    own["rate"], np.sqrt(products.mean()), rtol=tolerance
  )


@pytest.mark.parametrize("name", ["geomrf", "geomrf_plus"])
def test_sizes_are_averaged_as_products(name):
  query, key = examples(offset=0.5, batch=5)
  fm = sf.feature_map(
    name, "iid", num_features=8, component_kwargs={"statistics": "ema"}
  )
  stats = averaged_stats(fm, query, key)
  shift = np.asarray(stats.get("shift", 0.0), np.float64)
  x, y = (np.asarray(z[:, :, 0], np.float64) - shift for z in (query, key))
  # Shifted, an example's mean stands for its size.
  size = (lambda z: z) if "shift" in stats else np.abs
  sizes = [size(z).mean(axis=1) for z in (x, y)]
  product = jnp.asarray((sizes[0] * sizes[1]).mean(0), jnp.float32)
  with jax.numpy_rank_promotion("allow"):
    np.testing.assert_allclose(stats["p"], optimal_p(product), rtol=1e-4)


@pytest.mark.parametrize("case", ["oprf", "c_asderf"])
def test_examples_without_visible_tokens_do_not_count(case):
  query, key = examples(batch=4)
  fm = build_case(case, statistics="ema")
  mask = jnp.ones(query.shape[:2], bool).at[2].set(False)
  hidden = averaged_stats(fm, query, key, key_mask=mask, query_mask=mask)
  others = jnp.array([0, 1, 3])
  shown = averaged_stats(fm, query[others], key[others])
  for got, expected in zip(
    jax.tree.leaves(hidden), jax.tree.leaves(shown), strict=True
  ):
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_a_layer_keeps_its_statistics_where_all_is_padding():
  fm = build_case("oprf", statistics="ema")
  layer = sf.nn.SpectralSelfAttention(num_heads=2, head_dim=4, feature_map=fm)
  x = jax.random.normal(jax.random.key(2), (3, 5, 8)) + 0.5
  variables = layer.init(jax.random.key(0), x)

  def updated(x, mask):
    _, new = layer.apply(
      variables, x, mask, deterministic=False, mutable=("feature_stats",)
    )
    return new["feature_stats"]

  none = updated(x, jnp.zeros((3, 5), bool))
  jax.tree.map(np.testing.assert_array_equal, none, variables["feature_stats"])
  one_empty = updated(x, jnp.ones((3, 5), bool).at[1].set(False))
  without = updated(x[jnp.array([0, 2])], jnp.ones((2, 5), bool))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    one_empty,
    without,
  )


def test_moments_of_earlier_versions_are_refused():
  query, key = examples(batch=2)
  fm = build_case("oprf", statistics="ema")
  variables = fm.init(jax.random.key(0), head_dim=4)
  moments, _ = fm.mean_moments(variables, query, key)
  del moments["component"]["cross"]
  with pytest.raises(ValueError, match="lack 'cross': running statistics"):
    fm.solve(moments)
