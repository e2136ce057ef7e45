"""Discrete, hybrid and own-kernel maps through attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from tests.components.helpers import build

# Components with options, their matrices and numbers of features.
CASES = {
  "poisrf": ("poisrf", "iid", 16, {}),
  "poisrf_gaussian": ("poisrf", "lhs", 16, {"kernel": "gaussian"}),
  "geomrf": ("geomrf", "qmc", 16, {}),
  "poisrf_plus": ("poisrf_plus", "iid", 16, {}),
  "geomrf_plus": ("geomrf_plus", "iid", 16, {}),
  "geomrf_plus_constant": (
    "geomrf_plus",
    "iid",
    16,
    {"statistics": "constant"},
  ),
  "hrf": ("hrf", "orf", 8, {"num_mixing_rows": 2}),
  "hrf_gaussian": (
    "hrf",
    "iid",
    8,
    {"num_mixing_rows": 2, "mixing": "gaussian"},
  ),
  "relu": ("relu", "orf", 16, {"epsilon": 0.0}),
  "relu_none": ("relu", "none", None, {"rows": "none"}),
  "arccos0": ("arccos", "orf", 16, {"order": 0}),
  "arccos2": ("arccos", "orf", 16, {"order": 2}),
  "elu1": ("elu1", "none", None, {}),
  "cosformer": ("cosformer", "none", None, {"max_length": 16}),
  "rfa": ("rfa", "orf", 16, {"learned": "per_dim"}),
  "isotropic_trig": ("isotropic_trig", "orf", 16, {"learned": "per_dim"}),
  "maclaurin": ("maclaurin", "iid", 16, {}),
  "maclaurin_inverse": (
    "maclaurin",
    "lhs",
    16,
    {"coefficients": "inverse", "degrees": "poisson", "max_degree": 24},
  ),
  "maclaurin_log": ("maclaurin", "iid", 16, {"coefficients": "log"}),
  "tensorsketch": ("tensorsketch", "iid", 16, {"degree": 3}),
  "taylor2": ("taylor2", "none", None, {}),
}
STATS = ("poisrf", "poisrf_gaussian", "geomrf", "poisrf_plus", "geomrf_plus")


@functools.cache
def build_case(case):
  """Builds the map of a case, and its variables for 2 heads of 8."""
  name, matrix, num_features, kwargs = CASES[case]
  fm = build(name, matrix, num_features, **kwargs)
  return fm, fm.init(jax.random.key(0), head_dim=8, num_heads=2)


def draw_inputs(num_queries=9, num_keys=9):
  """Draws query, key and value ``[2, L, 2, 8]``."""
  rngs = jax.random.split(jax.random.key(1), 3)
  lengths = (num_queries, num_keys, num_keys)
  return tuple(
    jax.random.normal(rng, (2, length, 2, 8))
    for rng, length in zip(rngs, lengths, strict=True)
  )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.quick_every(12)
def test_no_nan_at_any_scale(case, dtype):
  fm, variables = build_case(case)

  @jax.jit
  def run(scale, params, *arrays):
    def loss(params, *arrays):
      out = sf.spectral_attention(
        *arrays,
        feature_map=fm,
        variables=variables._replace(params=params),
      )
      return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    query, key, value = arrays
    scaled = (scale * query).astype(dtype), (scale * key).astype(dtype)
    return jax.grad(loss, (0, 1, 2, 3), has_aux=True)(
      params, *scaled, value.astype(dtype)
    )

  query, key, value = draw_inputs(9, 6)
  # A zero and the smallest numbers among the others, too.
  query = query.at[:, 0, :, 0].set(0.0).at[:, 1, :, 1].set(1e-38)
  for scale in (0.0, 1e-3, 1.0, 10.0, 30.0):
    grads, out = run(scale, variables.params, query, key, value)
    assert out.dtype == dtype
    for leaf in jax.tree.leaves((out, grads)):
      assert bool(jnp.isfinite(leaf.astype(jnp.float32)).all()), scale


@pytest.mark.parametrize("case", CASES)
@pytest.mark.quick_every(10)
def test_the_future_has_no_influence(case):
  fm, variables = build_case(case)
  arrays = draw_inputs()
  stats = fm.calibrate(variables, *arrays[:2]) if case in STATS else None
  run = lambda *arrays: sf.spectral_attention(
    *arrays,
    feature_map=fm,
    variables=variables,
    stats=stats,
    is_causal=True,
    chunk_size=4,
  )
  before = run(*arrays)
  after = run(*(a.at[:, -1].set(-2.0 * a[:, -1] + 1.0) for a in arrays))
  # A shared shift changes the rounding; a signed normalizer amplifies that.
  error = jnp.abs(after - before)[:, :-1] / (1.0 + jnp.abs(before[:, :-1]))
  assert float(error.max()) < 1e-3
  assert float(jnp.abs(after - before)[:, -1].max()) > 0.1


@pytest.mark.parametrize("case", CASES)
@pytest.mark.quick_every(10)
def test_attention_is_that_of_the_features(case):
  # T != S, a mask, and naive float64 sums of the features themselves, whose
  # statistics are those of the visible keys.
  fm, variables = build_case(case)
  query, key, value = draw_inputs(9, 6)
  mask = jnp.arange(6)[None, :] < jnp.array([[4], [6]])
  x, y = (a * 8**-0.25 for a in (query, key))
  given = None
  stats = fm.calibrate(variables, y, y, key_mask=mask, query_mask=mask)
  if fm.component.info.name.endswith("_plus"):
    # Of queries as well, so that attention moves none of them into the range.
    stats = given = fm.calibrate(variables, x, y, key_mask=mask)
  phi, psi = (
    np.asarray(fm.apply(variables, a, side=side, stats=stats), np.float64)
    for a, side in ((x, "query"), (y, "key"))
  )
  weights = np.einsum("btnf,bsnf->bnts", phi, psi)
  size = np.einsum("btnf,bsnf->bnts", np.abs(phi), np.abs(psi))
  weights, size = (
    np.where(mask[:, None, None], w, 0.0) for w in (weights, size)
  )
  normalizer = weights.sum(-1, keepdims=True)
  expected = np.einsum("bnts,bsnv->btnv", weights / normalizer, value)
  out = sf.spectral_attention(
    *(query, key, value),
    feature_map=fm,
    variables=variables,
    stats=given,
    key_mask=mask,
  )
  # Roundings of the sums, by how much of them cancels in the normalizer.
  lost = size.sum(-1) / np.abs(normalizer[..., 0])
  tolerance = 2e-5 * np.moveaxis(lost * np.maximum(lost, 1.0), 1, 2)[..., None]
  assert np.all(np.abs(out - expected) < tolerance + 1e-4 * np.abs(expected))


@pytest.mark.parametrize("name", ["poisrf", "geomrf", "hrf", "maclaurin"])
@pytest.mark.quick_every(4)
def test_many_features_approach_exact_attention(name):
  matrix, kwargs = "iid", {}
  if name == "hrf":
    kwargs = {"num_mixing_rows": 2}
  query, key, value = (0.4 * a for a in draw_inputs())
  exact = sf.exact_attention(query, key, value)
  errors = []
  for num_features in (16, 4096):
    fm = build(name, matrix, num_features, **kwargs)
    out = sf.spectral_attention(
      query,
      key,
      value,
      feature_map=fm,
      variables=fm.init(jax.random.key(0), head_dim=8),
    )
    errors.append(float(jnp.sqrt(jnp.mean((out - exact) ** 2))))
  # 256 times the rows: 16 times less error; 6 leaves room for chance.
  assert errors[1] < errors[0] / 6
