"""Shapes that the public functions' annotations promise, checked at run time.

`jaxtyping` and `beartype` check arguments and results of every call against the
annotations; a wrong shape raises an error before the function runs.
"""

import beartype
import jax
import jax.numpy as jnp
import jaxtyping
import pytest

import spectraformer_jax as sf

# Any two sizes differ, so that no axis can be taken for another one.
B, T, S, N, G, H, V = 2, 5, 6, 3, 2, 4, 7


def with_checks(function):
  """Wraps a function so that it checks its annotations, without computing."""
  checked = jaxtyping.jaxtyped(function, typechecker=beartype.beartype)
  return lambda *args, **kwargs: jax.eval_shape(
    lambda: checked(*args, **kwargs)
  )


def floats(*shape):
  return jnp.ones(shape, jnp.float32) / 2


def bools(*shape):
  return jnp.ones(shape, bool)


def ints(*shape):
  return jnp.zeros(shape, jnp.int32)


@pytest.fixture(scope="module")
def maps():
  """A map that needs no stats, and its variables."""
  feature_map = sf.feature_map("posrf", "orf", num_features=8)
  variables = feature_map.init(jax.random.key(0), head_dim=H, num_heads=N)
  return {"feature_map": feature_map, "variables": variables}


@pytest.fixture
def mesh():
  return jax.sharding.Mesh(jax.devices()[:1], ("sequence",))


QUERY, KEY, VALUE = (
  floats(B, T, N * G, H),
  floats(B, S, N, H),
  floats(B, S, N, V),
)

# Each replaces one argument by an array of a wrong shape or dtype.
WRONG = {
  "three axes": {"query": floats(T, N, H)},
  "another batch": {"key": floats(B + 1, S, N, H)},
  "another head_dim": {"key": floats(B, S, N, H + 1)},
  "another length": {"value": floats(B, S + 1, N, V)},
  "other value heads": {"value": floats(B, S, N + 1, V)},
  "an int query": {"query": ints(B, T, N * G, H)},
  "a mask of queries": {"key_mask": bools(B, T)},
  "a float mask": {"key_mask": floats(B, S)},
  "a mask of pairs": {"key_mask": bools(T, S)},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_attention_refuses(wrong, maps):
  arguments = {"query": QUERY, "key": KEY, "value": VALUE} | WRONG[wrong]
  for attention, options in (
    (sf.spectral_attention, maps),
    (sf.exact_attention, {}),
  ):
    with pytest.raises(jaxtyping.TypeCheckError):
      with_checks(attention)(**arguments, **options)


def test_attention_takes_what_it_promises(maps, mesh):
  masks = {"key_mask": bools(B, S), "segment_ids": (ints(B, T), ints(B, S))}
  exact = with_checks(sf.exact_attention)
  assert exact(QUERY, KEY, VALUE, **masks).shape == (B, T, N * G, V)
  spectral = with_checks(sf.spectral_attention)
  out = spectral(
    QUERY, KEY, VALUE, **maps, **masks, query_mask=bools(B, T), scale=floats()
  )
  assert out.shape == (B, T, N * G, V)
  out, state = sf.spectral_attention(
    QUERY, KEY, VALUE, **maps, return_state=True
  )
  read = with_checks(sf.attend_state)(state, QUERY, **maps)
  assert read.shape == out.shape
  weights = sf.implied_attention_weights
  assert with_checks(weights)(QUERY, KEY, **maps).shape == (B, N * G, T, S)
  parallel = with_checks(sf.sequence_parallel_attention)
  out = parallel(QUERY, KEY, VALUE, mesh=mesh, axis="sequence", **maps)
  assert out.shape == (B, T, N * G, V)


def test_linear_attention():
  linear = with_checks(sf.linear_attention)
  out = linear(QUERY, KEY, VALUE, key_mask=bools(B, S))
  assert out.shape == (B, T, N * G, V)
  for wrong in (
    {"query_features": QUERY[..., 0]},
    {"key_features": KEY[..., :-1]},
    {"value": VALUE[:, :-1]},
    {"key_mask": bools(B, T)},
    {"segment_ids": floats(B, T)},
  ):
    arguments = {
      "query_features": QUERY,
      "key_features": KEY,
      "value": VALUE,
    } | wrong
    with pytest.raises(jaxtyping.TypeCheckError):
      linear(**arguments)


def test_other_attention_refuses(maps, mesh):
  weights = with_checks(sf.implied_attention_weights)
  with pytest.raises(jaxtyping.TypeCheckError):
    weights(QUERY, floats(B, S, N, H + 1), **maps)
  parallel = with_checks(sf.sequence_parallel_attention)
  with pytest.raises(jaxtyping.TypeCheckError):
    parallel(QUERY, KEY, KEY[:1], mesh=mesh, axis="sequence", **maps)


def test_decoding(maps):
  sizes = {"batch_size": B, "num_heads": N, "head_dim": H, "value_dim": V}
  state = sf.init_state(maps["feature_map"], maps["variables"], **sizes)
  step = with_checks(sf.decode_step)
  token = QUERY[:, :1], KEY[:, :1], VALUE[:, :1]
  out, state = step(state, *token, **maps)
  assert out.shape == (B, 1, N * G, V)
  with pytest.raises(jaxtyping.TypeCheckError):
    step(state, QUERY[:, :2], KEY[:, :2], VALUE[:, :2], **maps)
  with pytest.raises(jaxtyping.TypeCheckError):
    with_checks(sf.attend_state)(state, QUERY[0], **maps)


def test_feature_maps():
  build = jaxtyping.jaxtyped(sf.feature_map, typechecker=beartype.beartype)
  feature_map = sf.feature_map("oprf", "orf", num_features=8)
  rng = jax.random.key(0)
  variables = feature_map.init(rng, head_dim=H, num_heads=N)
  query, calibrate = QUERY[:, :, :N], with_checks(sf.FeatureMap.calibrate)
  masks = {"query_mask": bools(B, T), "key_mask": bools(B, S)}
  stats = calibrate(feature_map, variables, query, KEY, **masks)
  stats = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), stats)
  options = {"side": "key", "stats": stats}
  apply = with_checks(sf.FeatureMap.apply)
  assert apply(feature_map, variables, KEY, **options).shape == (B, S, N, 8)
  kernel = with_checks(sf.FeatureMap.kernel)
  x = floats(H)
  assert kernel(feature_map, variables, x, x).shape == ()
  for wrong in (
    lambda: build("oprf", "orf", num_features=8.0),
    lambda: calibrate(feature_map, variables, QUERY, KEY),
    lambda: calibrate(feature_map, variables, query, KEY, key_mask=bools(T)),
    lambda: apply(feature_map, variables, x, **options),
    lambda: kernel(feature_map, variables, x, floats(H + 1)),
  ):
    with pytest.raises(jaxtyping.TypeCheckError):
      wrong()
