"""Exponential components through attention: accuracy, extremes, isolation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from tests.components.helpers import (
  CASES,
  as_matrix,
  build_case,
  case_component,
)

HEAD_DIM = 8

# The contract battery tries every component as it is; these have options.
WITH_OPTIONS = (
  "gerf_complex",
  "gerf_minus_complex",
  "gerf_learn_sigmoid",
  "perdim",
  "c_posrf",
  "c_asderf",
)


def draw_inputs(length=12, keys=None, batch=2, heads=2, dtype=jnp.float32):
  """Draws query, key and value; keys have other scales than queries."""
  rngs = jax.random.split(jax.random.key(5), 3)
  keys = keys or length
  query, key, value = (
    jax.random.normal(rng, (batch, n, heads, HEAD_DIM))
    for rng, n in zip(rngs, (length, keys, keys), strict=True)
  )
  key = key * jnp.linspace(0.5, 1.5, HEAD_DIM)[None, None, None, :] + 0.3
  return query.astype(dtype), key.astype(dtype), value.astype(dtype)


def features64(case, x, w, side, stats):
  """Computes features ``[T, F]`` of a positive map, in float64."""
  hyperbolic = "hyp" in case
  head_dim = x.shape[-1]
  factor = np.zeros(len(x))
  if case.startswith("c_"):
    centre = [
      np.float64(stats["centre"][f"{s}_mean"]) for s in ("query", "key")
    ]
    own, other = centre if side == "query" else centre[::-1]
    factor = (x - own if side == "query" else x) @ other
    x, stats = x - own, stats["base"] or {}
  if case == "gerf_default":
    a = np.full(
      head_dim, case_component(case).coefficients(None, head_dim).a[0]
    )
  elif "rho" in stats:
    a = (1.0 - 1.0 / np.float64(stats["rho"])) / 8.0 * np.ones(head_dim)
  else:
    a = np.zeros(head_dim)
  if "axes" in stats:
    w = w @ np.float64(stats["axes"])
  if "query_map" in stats:
    query_map = as_matrix(stats["query_map"])
    # The exact inverse, not the float32 one that the map uses.
    exact = query_map if side == "query" else np.linalg.inv(query_map).T
    x = x @ exact.T
  common = (
    0.25 * np.sum(np.log(1.0 - 4.0 * a))
    + (w**2 @ a)[None, :]
    + (factor - 0.5 * np.sum(x**2, -1))[:, None]
  )
  projected = (x * np.sqrt(1.0 - 4.0 * a)) @ w.T
  parts = [projected, -projected] if hyperbolic else [projected]
  return np.concatenate([np.exp(common + part) for part in parts], axis=-1)


@pytest.mark.parametrize(
  "case",
  [
    "posrf",
    "posrf_hyp",
    "oprf",
    "oprf_hyp",
    "gerf_default",
    "saderf",
    "perdim",
    "sderf",
    "aderf",
    "asderf",
    "c_posrf",
    "c_oprf_hyp",
    "c_asderf",
  ],
)
@pytest.mark.quick_every(4)
def test_large_norms_stay_accurate(case):
  # T11: |x|^2 about 200, float32 against the naive formula in float64.
  fm = build_case(case, 128, "orf")
  query, key, value = draw_inputs(length=20, batch=1, heads=1)
  x, y = (
    a * jnp.sqrt(200.0 / jnp.mean(jnp.sum(a**2, -1))) for a in (query, key)
  )
  variables = fm.init(jax.random.key(7), head_dim=HEAD_DIM)
  stats = fm.calibrate(variables, x, y) or None
  own = jax.tree.map(
    lambda leaf: leaf[0, 0], (stats or {}).get("component", {})
  )
  w = np.float64(variables.projection["rows"]["w"][0])
  phi, psi = (
    features64(case, np.float64(a[0, :, 0]), w, side, own)
    for a, side in ((x, "query"), (y, "key"))
  )
  weights = phi @ psi.T
  expected = weights @ np.float64(value[0, :, 0])
  expected /= weights.sum(-1, keepdims=True)
  out = sf.spectral_attention(
    x, y, value, feature_map=fm, variables=variables, stats=stats, scale=1.0
  )[0, :, 0]
  scale = np.abs(expected).max()
  np.testing.assert_allclose(out / scale, expected / scale, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
  "case",
  [
    case if case in WITH_OPTIONS else pytest.param(case, marks=pytest.mark.slow)
    for case in CASES
  ],
)
@pytest.mark.quick_every(6)
def test_no_nan_at_any_scale(case, dtype):
  # One example per scale: examples do not see each other.
  scales = jnp.asarray([0.0, 1e-3, 1.0, 10.0, 30.0])
  fm = build_case(case, 8, "orf")
  query, key, value = draw_inputs(
    length=6, keys=5, batch=len(scales), dtype=dtype
  )
  query, key = (
    (x * scales[:, None, None, None]).astype(dtype) for x in (query, key)
  )
  variables = fm.init(jax.random.key(7), head_dim=HEAD_DIM, num_heads=2)
  mask = jnp.arange(5)[None, :] < jnp.asarray([[5], [4], [0], [5], [2]])

  @jax.jit
  def run(params, query, key, value):
    def loss(params, query, key, value):
      out = sf.spectral_attention(
        query,
        key,
        value,
        feature_map=fm,
        variables=variables._replace(params=params),
        key_mask=mask,
      )
      return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    return jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(
      params, query, key, value
    )

  grads, out = run(variables.params, query, key, value)
  assert out.dtype == value.dtype
  assert bool(jnp.all(jnp.isfinite(out)))
  for leaf in jax.tree.leaves(grads):
    assert bool(jnp.all(jnp.isfinite(leaf)))
  assert not np.any(np.asarray(out[2])), "no visible key gives zeros"
  if fm.info.positive:
    bound = jnp.max(jnp.abs(value), axis=(1, 3))[:, None, :, None]
    # A weighted mean of values stays among them, up to rounding of the output.
    assert bool(jnp.all(jnp.abs(out) <= bound * 1.01))


@pytest.mark.parametrize("case", ["gerf_complex", "perdim", "c_asderf"])
@pytest.mark.quick_every(3)
def test_padding_and_neighbours_do_not_matter(case):
  # T6, T7, T9, T10: hidden keys, other examples, T != S.
  fm = build_case(case, 16, "orf")
  query, key, value = draw_inputs(length=9, keys=7)
  variables = fm.init(jax.random.key(7), head_dim=HEAD_DIM, num_heads=2)
  attend = lambda q, k, v, **kwargs: sf.spectral_attention(
    q, k, v, feature_map=fm, variables=variables, **kwargs
  )
  mask = jnp.asarray([[True] * 5 + [False] * 2, [True] * 7])
  noisy = jnp.where(mask[:, :, None, None], key, 1e3)
  both = attend(query, noisy, value, key_mask=mask)
  # Rounding of sums of other lengths; five keys leave asderf singular moments,
  # of which it takes fourth roots.
  tolerance = (
    {"rtol": 1e-3, "atol": 1e-4}
    if case == "c_asderf"
    else {"rtol": 1e-4, "atol": 1e-5}
  )
  alone = attend(query[:1], key[:1, :5], value[:1, :5])
  np.testing.assert_allclose(both[:1], alone, **tolerance)
  loud = query.at[1].multiply(20.0), key.at[1].multiply(20.0)
  np.testing.assert_allclose(
    attend(*loud, value, key_mask=mask)[:1], both[:1], rtol=1e-5, atol=1e-6
  )


@pytest.mark.parametrize(
  "case", ["posrf_hyp", "gerf_complex", "perdim", "sderf", "aderf", "c_posrf"]
)
@pytest.mark.quick_every(6)
def test_causal_sources_of_statistics(case):
  query, _, value = draw_inputs()
  component = case_component(case)
  if component.needs_stats:
    fm = build_case(case)
    variables = fm.init(jax.random.key(7), head_dim=HEAD_DIM, num_heads=2)
    with pytest.raises(ValueError, match="'learned' or 'constant'"):
      sf.spectral_attention(
        query, query, value, feature_map=fm, variables=variables, is_causal=True
      )
    # Statistics of the whole sequence do leak: why it is refused.
    stats = lambda x: fm.calibrate(variables, x, x)
    assert changed_past(fm, variables, query, value, stats) > 1e-4
    fixed = stats(query[:, :4])
    assert changed_past(fm, variables, query, value, lambda x: fixed) < 1e-5
    fm = build_case(case, statistics="learned")
  else:
    fm = build_case(case)
  variables = fm.init(jax.random.key(7), head_dim=HEAD_DIM, num_heads=2)
  assert changed_past(fm, variables, query, value, lambda x: None) < 1e-5


def changed_past(fm, variables, x, value, stats):
  """Returns the largest change of outputs before a token that changes."""
  other = x.at[:, -1].multiply(-3.0)
  outs = [
    sf.spectral_attention(
      a,
      a,
      value,
      feature_map=fm,
      variables=variables,
      stats=stats(a * HEAD_DIM**-0.25),
      is_causal=True,
    )[:, :-1]
    for a in (x, other)
  ]
  return float(jnp.abs(outs[0] - outs[1]).max())


@pytest.mark.parametrize("case", ["aderf", "c_oprf_hyp"])
@pytest.mark.quick_every(2)
def test_running_statistics_in_a_layer(case):
  fm = build_case(case, statistics="ema")
  layer = sf.nn.SpectralSelfAttention(
    num_heads=2, head_dim=HEAD_DIM, feature_map=fm, is_causal=True
  )
  x = jax.random.normal(jax.random.key(2), (3, 10, 16)) + 0.5
  variables = jax.jit(layer.init)(jax.random.key(0), x)
  apply = jax.jit(layer.apply, static_argnames=("deterministic", "mutable"))
  out, new = apply(
    variables, x, deterministic=False, mutable=("feature_stats",)
  )
  moved = jax.tree.map(
    lambda a, b: float(jnp.abs(a - b).max()),
    variables["feature_stats"],
    new["feature_stats"],
  )
  assert all(change > 0.0 for change in jax.tree.leaves(moved))
  later = apply({**variables, **new}, x)
  assert float(jnp.abs(later - out).max()) > 1e-6
  shapes = jax.tree.map(jnp.shape, new["feature_stats"])
  assert all(
    shape[:2] == (1, 2)
    for shape in jax.tree.leaves(shapes, is_leaf=lambda s: isinstance(s, tuple))
  )
