"""Masks of other people's code, honoured or refused, against weights."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from tests.adapters.helpers import (
  HEAD_DIM,
  HEADS,
  make_map,
  masked_attention,
  random_inputs,
)

SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 2, 3, 3]])
SEGMENTS = jnp.concatenate([SEGMENTS, jnp.full((1, 7), 4)])
SAME = nn.make_attention_mask(SEGMENTS, SEGMENTS, jnp.equal)
REAL = nn.make_attention_mask(SEGMENTS > 0, SEGMENTS > 0)
PACKED = nn.combine_masks(SAME, REAL)
CAUSAL = nn.make_causal_mask(SEGMENTS)
PREFIX = (jnp.tri(7) + (jnp.arange(7) < 3)[None])[None, None]
OFFSETS = jnp.array([0, 2, 4])
CACHED = jnp.arange(9)[None, None] <= (
  OFFSETS[:, None, None] + jnp.arange(4)[None, :, None]
)
MASKS = {
  "packed": (PACKED, False),
  "packed causal": (nn.combine_masks(PACKED, CAUSAL), True),
  "packed causal unsaid": (nn.combine_masks(PACKED, CAUSAL), False),
  "packed, the triangle said": (PACKED, True),
  "causal unsaid": (CAUSAL, False),
  "one for all": (CAUSAL[:1], False),
  "prefix": (PREFIX, False),
  "strictly before": (CAUSAL.at[:].add(-jnp.eye(7)[None, None]), False),
  "each itself": (jnp.eye(7)[None, None], False),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.quick_every(2)
def test_masks_of_packed_rows_and_triangles(name, jit):
  mask, is_causal = MASKS[name]
  fm, variables = make_map()
  q, k, v = random_inputs()
  fn = sf.as_attention_fn(fm, variables, is_causal=is_causal)

  def call(mask, *qkv):
    out = fn(*qkv, mask=mask)
    return jnp.sum(jnp.sin(out)), out

  run = jax.grad(call, (1, 2, 3), has_aux=True)
  grads, out = (jax.jit(run) if jit else run)(mask, q, k, v)
  if is_causal:
    mask = mask * CAUSAL

  def wanted(*qkv):
    out = masked_attention(*qkv, mask, fm, variables, None)
    return jnp.sum(jnp.sin(out)), out

  wanted_grads, expected = jax.grad(wanted, (0, 1, 2), has_aux=True)(q, k, v)
  np.testing.assert_allclose(out, expected, atol=2e-6)
  for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
    np.testing.assert_allclose(grad, wanted_grad, atol=1e-5)


@pytest.mark.parametrize("component", ["posrf", "cosformer"])
def test_a_prompt_into_a_cache(component):
  # Keys of the longest length, queries that stand somewhere among them.
  if component == "posrf":
    fm, variables = make_map()
  else:
    fm = sf.feature_map(
      "cosformer",
      "none",
      num_features=None,
      component_kwargs={"max_length": 9, "epsilon": 0.1},
    )
    variables = fm.init(jax.random.key(0), head_dim=HEAD_DIM)
  q, k, v = random_inputs(9)
  whole = sf.spectral_attention(
    q, k, v, feature_map=fm, variables=variables, is_causal=True
  )
  at = OFFSETS[:, None] + jnp.arange(4)[None]
  queries = jnp.take_along_axis(q, at[:, :, None, None], axis=1)
  expected = jnp.take_along_axis(whole, at[:, :, None, None], axis=1)
  for is_causal in (False, True):
    fn = sf.as_attention_fn(fm, variables, is_causal=is_causal)
    run = lambda mask, fn=fn: fn(queries, k, v, mask=mask[:, None])
    np.testing.assert_allclose(jax.jit(run)(CACHED), expected, atol=1e-5)
    np.testing.assert_allclose(run(CACHED), expected, atol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
def test_cosformer_decodes_where_it_stands(is_causal):
  fm = sf.feature_map(
    "cosformer",
    "none",
    num_features=None,
    component_kwargs={"max_length": 24, "epsilon": 0.1},
  )
  variables = fm.init(jax.random.key(0), head_dim=8)
  x = jax.random.normal(jax.random.key(2), (2, 24, 16))
  make = lambda is_causal, **kwargs: nn.MultiHeadDotProductAttention(
    num_heads=2,
    attention_fn=sf.as_attention_fn(fm, variables, is_causal=is_causal),
    **kwargs,
  )
  layer = make(is_causal, decode=True)
  state = layer.init(jax.random.key(3), x)
  whole = make(True).apply({"params": state["params"]}, x)
  step = jax.jit(lambda state, x: layer.apply(state, x, mutable=["cache"]))
  for position in range(24):
    out, new = step(state, x[:, position : position + 1])
    state = state | new
    np.testing.assert_allclose(out[:, 0], whole[:, position], atol=1e-5)
  # The same through lengths, as jax.nn's signature has them.
  q, k, v = jax.random.normal(jax.random.key(4), (3, 2, 24, 2, 8))
  attention = sf.as_dot_product_attention(fm, variables)
  lengths = jnp.array([5, 24])
  whole = attention(q, k, v, is_causal=True)
  last = q[jnp.arange(2), lengths - 1][:, None]
  out = attention(last, k, v, key_value_seq_lengths=lengths)
  expected = whole[jnp.arange(2), lengths - 1][:, None]
  np.testing.assert_allclose(out, expected, atol=1e-5)


def honoured(masks):
  """Whether queries' sets of keys are nested or disjoint, in groups."""
  nested = np.ones(len(masks), bool)
  rows = masks.astype(np.int32)
  common = np.einsum("bis,bjs->bij", rows, rows)
  size = rows.sum(-1)
  for i, j in itertools.combinations(range(4), 2):
    least = np.minimum(size[:, i], size[:, j])
    nested &= (common[:, i, j] == 0) | (common[:, i, j] == least)
  # Two sets that do not meet must not be in a third.
  for i, j, k in itertools.permutations(range(4), 3):
    apart = (common[:, i, j] == 0) & (size[:, i] > 0) & (size[:, j] > 0)
    in_third = (common[:, i, k] > 0) & (common[:, j, k] > 0)
    nested &= ~(apart & in_third)
  return nested


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.quick_every(2)
def test_all_masks_of_four_queries_and_four_keys(is_causal):
  count = 1 << 16
  bits = np.arange(count)[:, None] >> np.arange(16)[None] & 1
  masks = bits.reshape(count, 4, 4).astype(bool)
  fm, variables = make_map()
  q, k, v = (x[:1, :4, :1] for x in random_inputs())
  shared = jax.tree.map(lambda leaf: leaf[:1], variables)
  fn = sf.as_attention_fn(fm, shared, is_causal=is_causal)

  @jax.jit
  def run(masks):
    tiled = (jnp.broadcast_to(x, (len(masks), *x.shape[1:])) for x in (q, k, v))
    return fn(*tiled, mask=masks[:, None])

  out = run(masks)
  effective = masks & np.tri(4, dtype=bool)[None] if is_causal else masks
  can = honoured(effective)
  bad = np.isnan(out).any(axis=(1, 2, 3))
  if is_causal:
    assert (bad | can).all()  # and of those that can be, packed rows are
  else:
    np.testing.assert_array_equal(bad, ~can)
  tiled = [jnp.broadcast_to(x, (count, *x.shape[1:])) for x in (q, k, v)]
  expected = masked_attention(*tiled, effective[:, None], fm, shared, None)
  np.testing.assert_allclose(out[~bad], expected[~bad], atol=2e-6)
  rows, columns = effective.any(2), effective.any(1)
  product = rows[:, :, None] & columns[:, None]
  if is_causal:
    product &= np.tri(4, dtype=bool)[None]
  assert not bad[(product == effective).all((1, 2))].any()


FORMS = {
  "keys": lambda m: m[0, 0, 0],
  "queries and keys": lambda m: m[0, 0],
  "heads": lambda m: m[0],
  "all": lambda m: m,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("of_jax", [True, False])
def test_forms_of_masks(form, of_jax):
  fm, variables = make_map()
  q, k, v = random_inputs()
  mask = jnp.broadcast_to((jnp.arange(7) < 4)[None, None, None], (1, 1, 7, 7))
  make = sf.as_dot_product_attention if of_jax else sf.as_attention_fn
  out = make(fm, variables)(q, k, v, mask=FORMS[form](mask))
  expected = masked_attention(q, k, v, mask, fm, variables, None)
  np.testing.assert_allclose(out, expected, atol=2e-6)


def test_masks_over_some_of_several_batch_axes():
  fm, variables = make_map()
  q, k, v = (x.reshape(3, 1, *x.shape[1:]) for x in random_inputs())
  q, k, v = (jnp.tile(x, (1, 2, 1, 1, 1)) for x in (q, k, v))
  one = jnp.arange(7)[None] < jnp.array([[5], [3]])
  fn = sf.as_attention_fn(fm, variables)
  out = fn(q, k, v, mask=one[:, None, None])
  for index in range(2):
    expected = fn(*(x[:, index] for x in (q, k, v)), mask=one[index])
    np.testing.assert_allclose(out[:, index], expected, atol=2e-6)


@pytest.mark.parametrize(
  ("mask", "words"),
  [
    (jnp.ones((3, 7), bool), r"\[batch, key length\] is mask\[:, None, None"),
    (jnp.ones((3, 7, 5), bool), "mask must be broadcastable"),
  ],
)
def test_masks_of_other_shapes(mask, words):
  fm, variables = make_map()
  for make in (sf.as_attention_fn, sf.as_dot_product_attention):
    with pytest.raises(ValueError, match=words):
      make(fm, variables)(*random_inputs(), mask=mask)


@pytest.mark.parametrize("least", [-jnp.inf, -1e9])
def test_an_additive_mask_is_no_mask_but_a_bias(least):
  fm, variables = make_map()
  q, k, v = random_inputs()
  real = jnp.arange(7) < 4
  additive = jnp.where(real, 0.0, least)[None, None, None]
  expected = masked_attention(
    q, k, v, real[None, None, None], fm, variables, None
  )
  for make in (sf.as_dot_product_attention, sf.as_attention_fn):
    fn = make(fm, variables)
    with pytest.raises(ValueError, match="mask"):
      fn(q, k, v, mask=additive)
    out = fn(q, k, v, additive)
    np.testing.assert_allclose(out, expected, atol=2e-6)
  # Unknown content: NaN.
  assert bool(jnp.isnan(jax.jit(lambda m: fn(q, k, v, mask=m))(additive)).all())


def test_biases_of_transformers_under_jit():
  # 0 and the least float, added up to -inf where two of them hide a key.
  fm, variables = make_map()
  q, k, v = random_inputs()
  least = jnp.finfo(jnp.float32).min
  real = jnp.arange(7)[None] < jnp.array([[7], [4], [1]])
  padding = jnp.where(real, 0.0, least)[:, None, None]
  triangle = jnp.where(jnp.tri(7, dtype=bool), 0.0, least)[None, None]
  fn = sf.as_attention_fn(fm, variables)
  run = jax.jit(lambda bias: fn(q, k, v, bias=bias))
  visible = real[:, None, None] & jnp.tri(7, dtype=bool)[None, None]
  expected = masked_attention(q, k, v, visible, fm, variables, None)
  np.testing.assert_allclose(run(padding + triangle), expected, atol=2e-6)
  assert bool(jnp.isnan(run(padding + 0.5)).all())
  # A bias of every head is none: an error at once.
  with pytest.raises(ValueError, match="there are no scores"):
    run(jnp.zeros((1, HEADS, 7, 7)))


@pytest.mark.parametrize(("length", "keys"), [(1, 7), (3, 7), (7, 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_a_triangle_of_other_lengths_is_that_of_jax(length, keys, masked):
  fm, variables = make_map()
  q, k, v = random_inputs()
  q, k, v = q[:, :length], k[:, :keys], v[:, :keys]
  mask = jnp.broadcast_to(jnp.arange(keys) != 1, (3, 1, length, keys))
  kwargs = {"mask": mask} if masked else {}
  attention = sf.as_dot_product_attention(fm, variables)
  out = attention(q, k, v, is_causal=True, **kwargs)
  visible = np.tri(length, keys, dtype=bool)[None, None]
  visible = visible & mask if masked else visible
  expected = masked_attention(q, k, v, visible, fm, variables, None)
  np.testing.assert_allclose(out, expected, atol=2e-6)
