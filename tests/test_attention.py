"""Spectral attention against naive float64 and against its own contract."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from spectraformer_jax.components import OPRF

COMPONENTS = ["trigrf", "posrf", "oprf"]
DATA_DEPENDENT = ["oprf", "oprf_hyp", "saderf", "aderf", "sderf", "asderf"]
CONSTANT = {"oprf": {"statistics": "constant"}}


def build(component, matrix="orf", num_features=32, **kwargs):
  """Builds a map, and its variables for 2 heads of 8."""
  fm = sf.feature_map(
    component, matrix, num_features=num_features, component_kwargs=kwargs
  )
  return fm, fm.init(jax.random.key(7), head_dim=8, num_heads=2)


def draw_inputs(length=20, keys=None, scale=1.0, batch=2, dtype=jnp.float32):
  """Draws query, key and value."""
  rngs = jax.random.split(jax.random.key(5), 3)
  keys = keys or length
  return tuple(
    (scale * jax.random.normal(r, (batch, n, 2, 8))).astype(dtype)
    for r, n in zip(rngs, (length, keys, keys), strict=True)
  )


def naive64(component, w, query, key, value, rho=None, visible=None):
  """Computes attention as in the papers, in float64 and unstabilised."""
  query, key, value, w = (
    np.asarray(a, np.float64) for a in (query, key, value, w)
  )
  dim = query.shape[-1]

  def features(x, head, b):
    p, half = x @ w[head].T, 0.5 * np.sum(x**2, -1, keepdims=True)
    if component == "trigrf":
      return np.exp(half) * np.concatenate([np.cos(p), np.sin(p)], -1)
    if component == "posrf":
      return np.exp(p - half)
    a = (1.0 - 1.0 / np.float64(rho[b, head])) / 8.0
    norms = np.sum(w[head] ** 2, -1)
    return np.exp(a * norms[None] + np.sqrt(1.0 - 4.0 * a) * p - half)

  out = np.zeros((*query.shape[:3], value.shape[-1]))
  for b, n in np.ndindex(query.shape[0], query.shape[2]):
    phi = features(query[b, :, n] * dim**-0.25, n, b)
    psi = features(key[b, :, n] * dim**-0.25, n, b)
    weights = phi @ psi.T
    if visible is not None:
      weights = np.where(visible[b], weights, 0.0)
    weights /= weights.sum(-1, keepdims=True)
    out[b, :, n] = weights @ value[b, :, n]
  return out


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("case", ["plain", "causal", "mask"])
@pytest.mark.quick_every(4)
def test_stabilised_equals_naive_float64(component, case):
  fm, variables = build(component, **CONSTANT.get(component, {}))
  query, key, value = draw_inputs(keys=None if case == "causal" else 13)
  visible, kwargs = None, {}
  if case == "causal":
    kwargs["is_causal"] = True
    visible = np.tril(np.ones((2, 20, 20), bool))
  if case == "mask":
    mask = np.arange(13)[None] < np.array([[9], [13]])
    kwargs["key_mask"] = jnp.asarray(mask)
    visible = np.broadcast_to(mask[:, None, :], (2, 20, 13))
  rho = np.full((2, 2), OPRF().constant(8)["rho"])
  w = variables.projection["rows"]["w"]
  expected = naive64(component, w, query, key, value, rho, visible)
  out = sf.spectral_attention(
    query, key, value, feature_map=fm, variables=variables, **kwargs
  )
  # float32 against float64; a signed normalizer that nearly cancels amplifies.
  tolerance = 1e-3 if component == "trigrf" else 1e-5
  np.testing.assert_allclose(out, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("component", ["posrf", "oprf"])
def test_large_norms_stay_accurate(component):
  # |x|^2 about 200: one shift for all features would underflow to NaN.
  fm, variables = build(component, num_features=256)
  query, key, value = draw_inputs(scale=8.4)
  x, y = query * 8**-0.25, key * 8**-0.25
  assert 150 < float(jnp.mean(jnp.sum(x**2, -1))) < 250
  stats = rho = None
  if component == "oprf":
    stats = fm.calibrate(variables, x, y)
    rho = stats["component"]["rho"]
  w = variables.projection["rows"]["w"]
  expected = naive64(component, w, query, key, value, rho)
  out = sf.spectral_attention(
    query, key, value, feature_map=fm, variables=variables, stats=stats
  )
  scale = np.abs(expected).max()
  np.testing.assert_allclose(out / scale, expected / scale, atol=1e-4)


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.quick_every(3)
def test_gradients_equal_those_of_the_plain_formula(component):
  fm, variables = build(component)
  query, key, value = draw_inputs(scale=0.5)
  x, y = query * 8**-0.25, key * 8**-0.25
  stats = fm.calibrate(variables, x, y)

  def stabilised(query, key, value):
    out = sf.spectral_attention(
      query, key, value, feature_map=fm, variables=variables
    )
    return jnp.sum(jnp.sin(out))

  def plain(query, key, value):
    phi = fm.apply(variables, query * 8**-0.25, side="query", stats=stats)
    psi = fm.apply(variables, key * 8**-0.25, side="key", stats=stats)
    weights = jnp.einsum("btnf,bsnf->bnts", phi, psi)
    weights /= jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.sum(jnp.sin(jnp.einsum("bnts,bsnv->btnv", weights, value)))

  grads = jax.grad(stabilised, (0, 1, 2))(query, key, value)
  expected = jax.grad(plain, (0, 1, 2))(query, key, value)
  for grad, expected_grad in zip(grads, expected, strict=True):
    np.testing.assert_allclose(grad, expected_grad, atol=2e-5)


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.quick_every(3)
def test_more_features_approach_exact_attention(component, is_causal):
  query, key, value = draw_inputs(scale=0.5)
  exact = sf.exact_attention(query, key, value, is_causal=is_causal)
  errors = []
  for num_features in (32, 8192):
    fm, variables = build(
      component, "iid", num_features, **CONSTANT.get(component, {})
    )
    out = sf.spectral_attention(
      query,
      key,
      value,
      feature_map=fm,
      variables=variables,
      is_causal=is_causal,
    )
    errors.append(float(jnp.sqrt(jnp.mean((out - exact) ** 2))))
  # 256 times the rows: 16 times less error; 8 leaves room for chance.
  assert errors[1] < errors[0] / 8


@pytest.mark.parametrize("component", COMPONENTS)
def test_gaussian_kernel_is_gaussian_attention(component):
  query, key, value = draw_inputs(scale=0.5)
  fm, variables = build(
    component, "iid", 8192, kernel="gaussian", **CONSTANT.get(component, {})
  )
  out = sf.spectral_attention(
    query, key, value, feature_map=fm, variables=variables
  )
  gaussian = sf.exact_attention(query, key, value, kernel="gaussian")
  softmax = sf.exact_attention(query, key, value)
  error = lambda exact: float(jnp.sqrt(jnp.mean((out - exact) ** 2)))
  assert error(gaussian) < 0.5 * error(softmax)


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("poison", [jnp.nan, 1e30])
@pytest.mark.quick_every(3)
def test_padding_has_no_influence(component, poison):
  fm, variables = build(component)
  query, key, value = draw_inputs()
  mask = jnp.arange(20)[None, :] < jnp.array([[13], [20]])
  hidden = ~mask[:, :, None, None]

  def run(fill):
    padded = [jnp.where(hidden, fill, a) for a in (key, value)]
    return jax.value_and_grad(
      lambda q, k, v: jnp.sum(
        sf.spectral_attention(
          jnp.where(hidden, 0.0, q),
          k,
          v,
          feature_map=fm,
          variables=variables,
          key_mask=mask,
        )[0, :13]
        ** 2
      ),
      (0, 1, 2),
    )(query, *padded)

  out, grads = run(poison)
  expected, expected_grads = run(0.0)
  np.testing.assert_array_equal(out, expected)
  for grad, expected_grad in zip(grads, expected_grads, strict=True):
    np.testing.assert_array_equal(grad, expected_grad)
  sliced = sf.spectral_attention(
    *(a[:1, :13] for a in (query, key, value)),
    feature_map=fm,
    variables=variables,
  )
  np.testing.assert_allclose(expected, jnp.sum(sliced**2), rtol=1e-4)


def test_query_mask_keeps_padded_queries_out():
  fm, variables = build("oprf")
  query, key, value = draw_inputs(20, keys=7)
  mask = jnp.arange(20)[None, :] < jnp.array([[13], [20]])

  def run(fill):
    return sf.spectral_attention(
      jnp.where(mask[:, :, None, None], query, fill),
      key,
      value,
      feature_map=fm,
      variables=variables,
      query_mask=mask,
    )

  np.testing.assert_array_equal(run(jnp.nan), run(0.0))
  np.testing.assert_array_equal(run(jnp.nan)[0, 13:], 0.0)


@pytest.mark.parametrize("component", COMPONENTS)
def test_batch_neighbours_have_no_influence(component):
  fm, variables = build(component)
  query, key, value = draw_inputs()
  kwargs = {"feature_map": fm, "variables": variables}
  both = sf.spectral_attention(query, key, value, **kwargs)
  alone = sf.spectral_attention(query[:1], key[:1], value[:1], **kwargs)
  # Other shapes round otherwise; a signed normalizer amplifies that.
  tolerance = 1e-3 if component == "trigrf" else 1e-5
  np.testing.assert_allclose(both[:1], alone, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("component", COMPONENTS)
def test_the_future_has_no_influence(component):
  fm, variables = build(component, **CONSTANT.get(component, {}))
  query, key, value = draw_inputs()
  run = lambda *qkv: sf.spectral_attention(
    *qkv, feature_map=fm, variables=variables, is_causal=True, chunk_size=8
  )
  before = run(query, key, value)
  after = run(*(a.at[:, -1].add(3.0) for a in (query, key, value)))
  # Exact in theory; the shared shift changes the rounding.
  tolerance = 1e-3 if component == "trigrf" else 1e-5
  np.testing.assert_allclose(after[:, :-1], before[:, :-1], atol=tolerance)
  assert float(jnp.abs(after[:, -1] - before[:, -1]).max()) > 0.1


def test_causal_statistics_of_the_whole_sequence_are_refused():
  fm, variables = build("oprf")
  query, key, value = draw_inputs()
  kwargs = {"feature_map": fm, "variables": variables, "is_causal": True}
  with pytest.raises(ValueError, match="'learned' or 'constant'"):
    sf.spectral_attention(query, key, value, **kwargs)
  stats = fm.calibrate(variables, query, key)
  out = sf.spectral_attention(query, key, value, stats=stats, **kwargs)
  assert bool(jnp.isfinite(out).all())


@pytest.mark.parametrize(
  ("component", "matrix"),
  [
    *[(name, "orf") for name in DATA_DEPENDENT],
    *[(name, "iid") for name in ("poisrf_plus", "geomrf")],
    ("posrf", "variational"),
  ],
)
@pytest.mark.parametrize("keys", [8, 5])
@pytest.mark.quick_every(5)
def test_queries_do_not_depend_on_each_other(component, matrix, keys):
  # As in a decoder's cross-attention, of the same length as its keys or not.
  fm, variables = build(component, matrix)
  query, key, value = draw_inputs(8, keys=keys)
  kwargs = {"feature_map": fm, "variables": variables}
  attend = lambda query: sf.spectral_attention(query, key, value, **kwargs)
  out = attend(query)
  again = attend(query.at[:, 7].mul(5.0))
  np.testing.assert_array_equal(again[:, :7], out[:, :7])
  # One query after the other is the same, as decoding needs it.
  steps = [attend(query[:, i : i + 1]) for i in range(8)]
  np.testing.assert_allclose(
    jnp.concatenate(steps, axis=1), out, rtol=1e-4, atol=1e-5
  )


def test_grouped_and_masked_queries_do_not_depend_on_each_other():
  fm, variables = build("oprf")
  shared = jax.tree.map(lambda leaf: leaf[:1], variables)
  query, key, value = draw_inputs(8)
  attend = lambda query, mask: sf.spectral_attention(
    query,
    key[:, :, :1],
    value[:, :, :1],
    feature_map=fm,
    variables=shared,
    query_mask=mask,
  )
  mask = jnp.ones((2, 8), bool)
  out = attend(query, mask)
  for changed in (mask, mask.at[:, 7].set(False)):
    again = attend(query.at[:, 7, 1].mul(5.0), changed)
    np.testing.assert_array_equal(again[:, :7], out[:, :7])


def test_weights_are_positive_if_the_map_says_so():
  # Statistics of keys alone do not know the least coordinate of a query.
  fm, variables = build("poisrf_plus", "iid")
  query, key, _ = draw_inputs()
  weights = sf.implied_attention_weights(
    4.0 * query, key, feature_map=fm, variables=variables
  )
  assert bool((weights >= 0.0).all()), "attention moves such queries"
  assert not fm.info.positive


def test_states_need_explicit_stats():
  # The next call's statistics would be others.
  fm, variables = build("oprf")
  query, key, value = draw_inputs()
  kwargs = {"feature_map": fm, "variables": variables, "return_state": True}
  with pytest.raises(ValueError, match="a state with component 'oprf'"):
    sf.spectral_attention(query, key, value, **kwargs)
  stats = fm.calibrate(variables, key, key)
  _, state = sf.spectral_attention(query, key, value, stats=stats, **kwargs)
  del kwargs["return_state"]
  with pytest.raises(ValueError, match="a state with component 'oprf'"):
    sf.spectral_attention(query, key, value, initial_state=state, **kwargs)


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 10.0, 30.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_nan_at_any_scale(component, scale, dtype):
  fm, variables = build(component)
  arrays = draw_inputs(scale=scale, dtype=dtype)

  def loss(*qkv):
    out = sf.spectral_attention(*qkv, feature_map=fm, variables=variables)
    return jnp.sum(out.astype(jnp.float32)), out

  grads, out = jax.grad(loss, (0, 1, 2), has_aux=True)(*arrays)
  assert out.dtype == dtype
  for leaf in (out, *grads):
    assert bool(jnp.isfinite(leaf.astype(jnp.float32)).all())


def test_shared_projection_equals_equal_heads():
  fm, _ = build("posrf")
  shared = fm.init(jax.random.key(1), head_dim=8)
  copied = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=0), shared)
  arrays = draw_inputs()
  outs = [
    sf.spectral_attention(*arrays, feature_map=fm, variables=v)
    for v in (shared, copied)
  ]
  np.testing.assert_allclose(*outs, atol=1e-6)


def test_feature_map_is_a_static_argument_that_never_recompiles():
  traces = []

  @jax.jit(static_argnames="feature_map")
  def attend(query, variables, feature_map):
    traces.append(1)
    return sf.spectral_attention(
      query, query, query, feature_map=feature_map, variables=variables
    )

  query, *_ = draw_inputs()
  for _ in range(3):
    fm, variables = build("oprf", statistics="constant")
    attend(query, variables, feature_map=fm)
  assert len(traces) == 1


def test_implied_weights_reproduce_the_output():
  fm, variables = build("oprf")
  query, key, value = draw_inputs()
  kwargs = {"feature_map": fm, "variables": variables}
  weights = sf.implied_attention_weights(query, key, **kwargs)
  out = sf.spectral_attention(query, key, value, **kwargs)
  np.testing.assert_allclose(
    jnp.einsum("bnts,bsnv->btnv", weights, value), out, atol=1e-5
  )


@pytest.mark.parametrize(
  ("kwargs", "words"),
  [
    ({"component": "oprv"}, "Did you mean 'oprf'"),
    ({"weight_matrix": "orff"}, "Did you mean 'orf'"),
    ({"num_features": 0}, "num_features must be a positive integer, got 0"),
    ({"num_features": 2.0}, "num_features must be a positive integer"),
    ({"component_kwargs": {"kernl": "gaussian"}}, "Did you mean 'kernel'"),
    ({"component_kwargs": {"kernel": "sofmax"}}, "Did you mean 'softmax'"),
    ({"weight_matrix_kwargs": {"norm": "chi"}}, "Did you mean 'norms'"),
    ({"weight_matrix_kwargs": {"norms": "ch"}}, "norms must be one of"),
    ({"component_kwargs": {"statistics": "emma"}}, "Did you mean 'ema'"),
  ],
)
def test_building_errors(kwargs, words):
  arguments = {"component": "oprf", "weight_matrix": "orf", "num_features": 8}
  with pytest.raises(ValueError, match=words) as error:
    sf.feature_map(**(arguments | kwargs))
  assert "\n" not in str(error.value)


def test_size_errors():
  fm = sf.feature_map("posrf", "mm", num_features=8)
  with pytest.raises(ValueError, match="'mm' needs num_features > head_dim"):
    fm.init(jax.random.key(0), head_dim=8)
  with pytest.raises(ValueError, match="head_dim must be a positive integer"):
    fm.init(jax.random.key(0), head_dim=0)
  fm, variables = build("posrf")
  query, key, value = draw_inputs()
  with pytest.raises(ValueError, match="made for head_dim=8"):
    sf.spectral_attention(
      query[..., :4],
      key[..., :4],
      value,
      feature_map=fm,
      variables=variables,
    )
  with pytest.raises(ValueError, match="variables hold 2 heads"):
    fm.log_features(variables, jnp.ones((1, 5, 3, 8)), side="query")
  with pytest.raises(ValueError, match="side must be one of"):
    fm.log_features(variables, query, side="q")
  fm, variables = build("oprf")
  with pytest.raises(ValueError, match=r"pass stats=fm\.calibrate"):
    fm.apply(variables, query, side="query")
  with pytest.raises(ValueError, match="stats must lead with"):
    fm.apply(
      variables,
      query,
      side="query",
      stats={"component": {"rho": jnp.ones((3, 2))}},
    )
