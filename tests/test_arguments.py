"""Odd arguments of attention: empty arrays, other types, traced numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from spectraformer_jax.baselines import BASELINES

FM = sf.feature_map("posrf", "orf", num_features=16)
HEADS, HEAD_DIM = 2, 8


@pytest.fixture(scope="module")
def variables():
  return FM.init(jax.random.key(1), head_dim=HEAD_DIM)


@pytest.fixture(scope="module")
def x():
  return jax.random.normal(jax.random.key(0), (2, 7, HEADS, HEAD_DIM))


@pytest.fixture(scope="module")
def operations(variables):
  """Every public function of query, key and value."""
  maps = {"feature_map": FM, "variables": variables}
  return {
    "spectral": lambda *a, **k: sf.spectral_attention(*a, **maps, **k),
    "linear": lambda q, k, v, **kwargs: sf.linear_attention(q, k, v, **kwargs),
    "exact": sf.exact_attention,
  }


SIZES = [
  (0, 7, 7, 8),
  (2, 0, 7, 8),
  (2, 7, 0, 8),
  (2, 0, 0, 8),
  (0, 0, 0, 0),
  (2, 7, 7, 0),
]


@pytest.mark.quick_every(5)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", ["spectral", "linear", "exact"])
def test_empty_arrays_are_those_of_jax(operations, name, size, is_causal):
  batch, length, num_keys, depth = size
  query = jnp.ones((batch, length, HEADS, HEAD_DIM))
  key = jnp.ones((batch, num_keys, HEADS, HEAD_DIM))
  value = jnp.ones((batch, num_keys, HEADS, depth))

  def loss(*arrays):
    out = operations[name](*arrays, is_causal=is_causal)
    return jnp.sum(out), out

  gradients, out = jax.grad(loss, (0, 1, 2), has_aux=True)(query, key, value)
  assert out.shape == (batch, length, HEADS, depth)
  assert not num_keys or np.array_equal(out, jnp.ones_like(out))
  assert num_keys or not out.any()
  for gradient, array in zip(gradients, (query, key, value), strict=True):
    assert gradient.shape == array.shape
    assert jnp.isfinite(gradient).all()


def test_attention_without_heads_is_empty(operations):
  x = jnp.ones((2, 3, 0, HEAD_DIM))
  assert operations["spectral"](x, x, x).shape == x.shape


def test_state_is_kept_without_keys(operations, x):
  attend = operations["spectral"]
  _, state = attend(x, x, x, return_state=True)
  none = x[:, :0]
  out, after = attend(x, none, none, initial_state=state, return_state=True)
  for before, now in zip(
    jax.tree.leaves(state), jax.tree.leaves(after), strict=True
  ):
    assert np.array_equal(before, now)
  expected = attend(x, x, x)
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_decode_step_of_an_empty_batch(variables):
  maps = {"feature_map": FM, "variables": variables}
  sizes = {"num_heads": HEADS, "head_dim": HEAD_DIM}
  state = sf.init_state(FM, variables, batch_size=0, **sizes)
  one = jnp.ones((0, 1, HEADS, HEAD_DIM))
  out, state = sf.decode_step(state, one, one, one, **maps)
  assert out.shape == one.shape and int(state.length) == 1
  with pytest.raises(ValueError, match="batch_size must be .* got -1"):
    sf.init_state(FM, variables, batch_size=-1, **sizes)


def test_values_without_channels(operations, x):
  out, state = operations["spectral"](x, x, x[..., :0], return_state=True)
  assert out.shape == (2, 7, HEADS, 0)
  assert state.kv.shape == (2, HEADS, 16, 0)


@pytest.mark.parametrize("name", ["spectral", "exact"])
def test_a_computed_scale_takes_a_gradient(operations, x, name):
  loss = lambda scale: jnp.sum(operations[name](x, x, x, scale=scale) ** 2)
  got = jax.jit(jax.grad(loss))(0.3)
  step = 1e-2
  expected = (loss(0.3 + step) - loss(0.3 - step)) / (2 * step)
  np.testing.assert_allclose(got, expected, rtol=2e-2)
  np.testing.assert_allclose(
    loss(jnp.float32(0.3)), loss(np.float64(0.3)), rtol=1e-5
  )


def test_a_computed_scale_ignores_padding(operations, x):
  mask = jnp.arange(7)[None] < jnp.array([[4], [7]])
  padded = jnp.where(mask[:, :, None, None], x, jnp.nan)
  loss = lambda scale, x: jnp.sum(
    jnp.where(
      mask[:, :, None, None],
      operations["spectral"](
        x, x, x, scale=scale, key_mask=mask, query_mask=mask
      ),
      0.0,
    )
  )
  np.testing.assert_allclose(
    jax.grad(loss)(0.3, padded), jax.grad(loss)(0.3, x), rtol=1e-5
  )


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), np.ones(2)])
def test_wrong_scales_are_refused(operations, x, scale):
  with pytest.raises(ValueError, match="scale must be"):
    operations["spectral"](x, x, x, scale=scale)


@pytest.mark.parametrize("name", ["spectral", "linear", "exact"])
def test_a_traced_switch_is_refused(operations, x, name):
  with pytest.raises(ValueError, match="is_causal must be True or False"):
    jax.jit(lambda c: operations[name](x, x, x, is_causal=c))(True)


@pytest.mark.parametrize("name", ["spectral", "linear", "exact"])
def test_lists_and_numpy_arrays_are_converted(operations, x, name):
  attend, host = operations[name], np.asarray(x)
  mask = np.arange(7)[None] < np.array([[4], [7]])
  ids = np.broadcast_to(np.arange(7) // 3, (2, 7))
  expected = attend(
    x, x, x, key_mask=jnp.asarray(mask), segment_ids=jnp.asarray(ids)
  )
  got = attend(
    host, host.tolist(), host, key_mask=mask.tolist(), segment_ids=ids.tolist()
  )
  assert np.array_equal(expected, got)
  pair = attend(x, x, x, key_mask=mask, segment_ids=[ids, ids])
  np.testing.assert_allclose(pair, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "complex64"])
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("name", ["spectral", "linear", "exact"])
def test_arrays_that_are_not_float_are_refused(
  operations, x, name, place, dtype
):
  arrays = [x, x, x]
  arrays[place] = x.astype(dtype)
  which = ("query", "key", "value")[place]
  with pytest.raises(ValueError, match=f"{which}.* must be a float.*{dtype}"):
    operations[name](*arrays)


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_refuse_ints(x, name):
  with pytest.raises(ValueError, match="value must be a float array"):
    kwargs = {}
    if name == "linformer":
      weights = jnp.ones((HEADS, 4, 7))
      kwargs = {"key_projection": weights, "value_projection": weights}
    BASELINES[name].attend(x, x, x.astype(int), **kwargs)


@pytest.mark.quick_every(5)
@pytest.mark.parametrize(
  "dtype", ["bfloat16", "float16", "float32", "float8_e4m3fn"]
)
@pytest.mark.parametrize("name", ["spectral", "linear", "exact"])
def test_float_dtypes_of_any_size_work(operations, x, name, dtype):
  out = operations[name](*(3 * [jnp.abs(x).astype(dtype)]))
  expected = operations[name](*(3 * [jnp.abs(x)]))
  assert out.dtype == dtype
  np.testing.assert_allclose(
    out.astype(jnp.float32), expected, rtol=0.2, atol=0.2
  )


def test_masks_and_ids_of_wrong_dtype_are_refused(operations, x):
  with pytest.raises(ValueError, match="key_mask must be boolean"):
    operations["spectral"](x, x, x, key_mask=np.ones((2, 7), np.float32))
  for name in ("spectral", "exact"):
    with pytest.raises(ValueError, match="segment_ids must be ints"):
      operations[name](x, x, x, segment_ids=np.ones((2, 7), np.float32))


def test_missing_axes_are_refused(operations, variables, x):
  for name in operations:
    with pytest.raises(ValueError, match="must have 4 axes"):
      operations[name](x[0], x, x)
  state = sf.init_state(
    FM, variables, batch_size=2, num_heads=HEADS, head_dim=HEAD_DIM
  )
  with pytest.raises(ValueError, match="must have 4 axes"):
    sf.decode_step(
      state, x[0, 0], x[0, 0], x[0, 0], feature_map=FM, variables=variables
    )


def test_variables_may_be_mappings_or_pairs(variables, x):
  attend = lambda variables: sf.spectral_attention(
    x, x, x, feature_map=FM, variables=variables
  )
  expected = attend(variables)
  for other in (
    tuple(variables),
    {"projection": variables.projection},
    {"params": None, "projection": variables.projection},
    jax.tree.map(np.asarray, variables),
  ):
    assert np.array_equal(attend(other), expected)
  for other in (None, {}, (), {"rows": 1}, sf.FeatureVariables({}, {})):
    with pytest.raises(ValueError, match="variables"):
      attend(other)


def test_numpy_integers_are_sizes(variables, x):
  state = sf.init_state(
    FM,
    variables,
    batch_size=np.int64(2),
    num_heads=np.int32(HEADS),
    head_dim=np.int8(HEAD_DIM),
  )
  out = sf.spectral_attention(
    x, x, x, feature_map=FM, variables=variables, chunk_size=np.int64(3)
  )
  assert state.kv.shape[:2] == out.shape[::2][:2]
  fm = sf.feature_map("posrf", "orf", num_features=np.int64(16))
  fm.init(jax.random.key(0), head_dim=np.int64(8))


def test_stats_of_another_map_are_refused(x):
  fm = sf.feature_map("oprf", "orf", num_features=16)
  variables = fm.init(jax.random.key(1), head_dim=HEAD_DIM)
  attend = lambda stats: sf.spectral_attention(
    x, x, x, feature_map=fm, variables=variables, stats=stats
  )
  attend(fm.calibrate(variables, x[:1], x[:1]))
  three = jnp.concatenate([x, x[:1]])
  other = sf.feature_map("saderf", "orf", num_features=16)
  more_heads = jnp.tile(x, (1, 1, 2, 1))
  for stats in (
    fm.calibrate(variables, three, three),
    fm.calibrate(variables, more_heads, more_heads),
    other.calibrate(other.init(jax.random.key(1), head_dim=HEAD_DIM), x, x),
    {"component": 1.0},
  ):
    with pytest.raises(ValueError, match="stats"):
      attend(stats)


def test_states_of_another_map_are_refused(variables, x):
  sizes = {"batch_size": 2, "num_heads": HEADS, "head_dim": HEAD_DIM}
  signed = sf.feature_map("trigrf", "orf", num_features=8)
  other = signed.init(jax.random.key(1), head_dim=HEAD_DIM)
  more = sf.feature_map("posrf", "orf", num_features=32)
  for fm, v, message in (
    (signed, other, "signed feature map, this one is positive"),
    (more, more.init(jax.random.key(1), head_dim=HEAD_DIM), "kv.shape"),
  ):
    state = sf.init_state(fm, v, **sizes)
    with pytest.raises(ValueError, match=message):
      sf.spectral_attention(
        *(x, x, x), feature_map=FM, variables=variables, initial_state=state
      )
  state = sf.init_state(FM, variables, **sizes)
  with pytest.raises(ValueError, match="positive feature map, this one is sig"):
    sf.spectral_attention(
      *(x, x, x), feature_map=signed, variables=other, initial_state=state
    )


@pytest.mark.quick_every(3)
@pytest.mark.parametrize("lengths", [(3, 7), (7, 3), (7, 1), (130, 70)])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_causal_queries_and_keys_of_two_lengths(
  variables, lengths, implementation
):
  length, num_keys = lengths
  query, key, value = (
    jax.random.normal(jax.random.key(i), (2, size, HEADS, HEAD_DIM))
    for i, size in enumerate((length, num_keys, num_keys))
  )
  maps = {"feature_map": FM, "variables": variables}
  out, state = sf.spectral_attention(
    *(query, key, value),
    is_causal=True,
    return_state=True,
    implementation=implementation,
    **maps,
  )
  weights = sf.implied_attention_weights(query, key, **maps)
  weights *= jnp.tri(length, num_keys)[None, None]
  weights /= weights.sum(-1, keepdims=True)
  expected = jnp.einsum("bnts,bsnv->btnv", weights, value)
  np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
  # The state holds all keys, whoever saw them.
  assert state.length == num_keys
  read = sf.attend_state(state, query, **maps)
  np.testing.assert_allclose(
    read, sf.spectral_attention(query, key, value, **maps), rtol=1e-4, atol=1e-5
  )
  np.testing.assert_allclose(
    sf.exact_attention(query, key, value, is_causal=True),
    jax.nn.dot_product_attention(query, key, value, is_causal=True),
    rtol=1e-4,
    atol=1e-5,
  )


def test_causal_segments_of_two_lengths(variables):
  query, key, value = (
    jax.random.normal(jax.random.key(i), (2, size, HEADS, HEAD_DIM))
    for i, size in enumerate((9, 12, 12))
  )
  ids = tuple(jnp.broadcast_to(jnp.arange(n) // 4, (2, n)) for n in (9, 12))
  kwargs = {"feature_map": FM, "variables": variables, "is_causal": True}
  out, expected = (
    sf.spectral_attention(
      query, key, value, segment_ids=ids, implementation=name, **kwargs
    )
    for name in ("xla", "reference")
  )
  np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_attend_state_equals_attention(variables, x):
  maps = {"feature_map": FM, "variables": variables}
  grouped = jnp.concatenate([x, 2 * x], axis=2)
  expected, state = sf.spectral_attention(
    grouped, x, x, return_state=True, **maps
  )
  one_by_one = [
    sf.attend_state(state, grouped[:, i : i + 1], **maps) for i in range(7)
  ]
  np.testing.assert_allclose(
    jnp.concatenate(one_by_one, axis=1), expected, rtol=1e-4, atol=1e-5
  )
  oprf = sf.feature_map("oprf", "orf", num_features=16)
  with pytest.raises(ValueError, match="stats"):
    sf.attend_state(state, x, feature_map=oprf, variables=variables)


def test_grouped_queries_of_exact_attention(x):
  query = jnp.concatenate([x, 2 * x], axis=2)
  np.testing.assert_allclose(
    sf.exact_attention(query, x, x),
    jax.nn.dot_product_attention(query, x, x),
    rtol=1e-4,
    atol=1e-5,
  )
  each = jnp.repeat(x, 2, axis=2)
  for name in ("local", "nystromformer", "skyformer"):
    attend = BASELINES[name].attend
    assert np.array_equal(attend(query, x, x), attend(query, each, each))


def test_debug_infs_reports_nothing(x, variables):
  mask = jnp.arange(7)[None] < jnp.array([[4], [7]])
  with jax.debug_infs(True):
    sf.exact_attention(x, x, x, key_mask=mask)
    sf.exact_attention(x, x, x, is_causal=True)
    BASELINES["local"].attend(x, x, x, key_mask=mask)
    BASELINES["nystromformer"].attend(x, x, x, key_mask=mask)


def test_nothing_is_read_from_a_device(variables, x):
  maps = {"feature_map": FM, "variables": variables}
  sf.spectral_attention(x, x, x, **maps)
  with jax.transfer_guard("disallow"):
    sf.spectral_attention(x, x, x, **maps)
    jax.jit(lambda x: sf.spectral_attention(x, x, x, **maps))(x)
