"""Windows, sinks and heavy keys as options of both adapters."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from tests.adapters.helpers import (
  BATCH,
  HEADS,
  LENGTH,
  MASKS,
  REAL,
  WIDTH,
  make_map,
  random_inputs,
)

EXACT = {"window": 1, "num_sinks": 1}
IDS = jnp.array([[1, 1, 1, 2, 2, 2, 2]] * BATCH)
SAME = nn.make_attention_mask(IDS, IDS, jnp.equal)


def attend(*inputs, **options):
  """Attends with the functional call, on the same map."""
  fm, variables = make_map()
  return sf.spectral_attention(
    *inputs, feature_map=fm, variables=variables, **options
  )


@pytest.mark.parametrize("name", ["causal padding", "padding", "none"])
@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.quick_every(6)
def test_masks_of_flax_with_exact_keys(name, jit):
  mask, is_causal = MASKS[name]
  fn = sf.as_attention_fn(*make_map(), is_causal=is_causal, **EXACT)
  call = lambda mask: fn(*random_inputs(), mask=mask)
  found = (jax.jit(call) if jit else call)(mask)
  real = REAL if "padding" in name else None
  expected = attend(
    *random_inputs(),
    **EXACT,
    is_causal=is_causal,
    key_mask=real,
    query_mask=real,
  )
  np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize(
  ("jit", "is_causal"),
  [(True, False), (False, True), (True, True), (False, False)],
)
@pytest.mark.quick_every(2)
def test_packed_rows_of_flax_with_exact_keys(jit, is_causal):
  mask = SAME
  if is_causal:
    mask = nn.combine_masks(SAME, nn.make_causal_mask(IDS))
  fn = sf.as_attention_fn(*make_map(), is_causal=is_causal, **EXACT)
  call = lambda mask: fn(*random_inputs(), mask=mask)
  found = (jax.jit(call) if jit else call)(mask)
  expected = attend(
    *random_inputs(), **EXACT, is_causal=is_causal, segment_ids=IDS
  )
  np.testing.assert_allclose(found, expected, atol=2e-6)


def test_jax_nn_with_heavy_keys_is_softmax_where_all_are_heavy():
  fn = sf.as_dot_product_attention(*make_map(), num_heavy=LENGTH)
  query, key, value = random_inputs()
  mask = REAL[:, None, None]
  found = fn(query[:, :4], key, value, mask=mask)
  expected = jax.nn.dot_product_attention(query[:, :4], key, value, mask=mask)
  np.testing.assert_allclose(found, expected, atol=2e-5)


def test_sinks_serve_the_cache_of_flax_and_a_window_does_not():
  fm, variables = make_map()
  module = functools.partial(nn.MultiHeadDotProductAttention, num_heads=HEADS)
  x = jax.random.normal(jax.random.key(3), (BATCH, 4, WIDTH))
  whole = module(
    attention_fn=sf.as_attention_fn(fm, variables, num_sinks=1, is_causal=True)
  )
  params = whole.init(jax.random.key(0), x)
  expected = whole.apply(params, x, mask=nn.make_causal_mask(x[..., 0]))
  fn = sf.as_attention_fn(fm, variables, num_sinks=1)
  layer = module(decode=True, attention_fn=fn)
  cache = {"cache": layer.init(jax.random.key(0), x)["cache"]}
  step = jax.jit(functools.partial(layer.apply, mutable=["cache"]))
  for place in range(2):
    out, cache = step({**params, **cache}, x[:, place : place + 1])
    np.testing.assert_allclose(out[:, 0], expected[:, place], atol=1e-5)
  layer = layer.clone(attention_fn=sf.as_attention_fn(fm, variables, **EXACT))
  with pytest.raises(ValueError, match="for 1 queries and 4 keys, as with a"):
    layer.apply({**params, **cache}, x[:, :1], mutable=["cache"])


def test_adapters_compare_by_their_exact_keys():
  fm, variables = make_map()
  make = functools.partial(sf.as_attention_fn, fm, variables)
  assert make(window=3) == make(window=[3, 3])
  assert hash(make(window=3)) == hash(make(window=(3, 3)))
  assert make(window=3) != make(window=2) != make()


def test_exact_keys_that_an_adapter_cannot_have_are_refused():
  fm, variables = make_map()
  query, key, value = random_inputs()
  for make in (sf.as_attention_fn, sf.as_dot_product_attention):
    with pytest.raises(ValueError, match="window must be None"):
      make(fm, variables, window=-1)
    with pytest.raises(ValueError, match="estimates a kernel of its own"):
      make(*make_map("relu"), window=3)
    with pytest.raises(ValueError, match="num_heavy cannot be combined"):
      make(fm, variables, num_heavy=1)(query, key, value, is_causal=True)
    chain = jnp.ones((1, 1, LENGTH, LENGTH), bool).at[0, 0, 0, 3:].set(False)
    with pytest.raises(ValueError, match="mask must say which"):
      make(fm, variables, window=1)(query, key, value, mask=chain)
  with pytest.raises(ValueError, match="num_heavy cannot be combined"):
    sf.as_attention_fn(fm, variables, num_heavy=1, is_causal=True)
  fn = sf.as_dot_product_attention(fm, variables, window=1)
  with pytest.raises(ValueError, match="local_window_size"):
    fn(query, key, value, local_window_size=3)
