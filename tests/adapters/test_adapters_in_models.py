"""Adapters in models as other people write them."""

import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import spectraformer_jax as sf
from tests.adapters.helpers import (
  HEAD_DIM,
  HEADS,
  WIDTH,
  make_map,
  random_inputs,
)

DATA_DEPENDENT = ["oprf", "oprf_hyp", "saderf", "aderf", "sderf", "asderf"]


@pytest.mark.parametrize("component", DATA_DEPENDENT)
@pytest.mark.parametrize("keys", [8, 5])
@pytest.mark.quick_every(5)
def test_cross_attention_does_not_see_the_future(component, keys):
  fm, variables = make_map(component)
  q, k, v = random_inputs(8)
  k, v = k[:, :keys], v[:, :keys]
  mask = jnp.arange(keys)[None] < jnp.array([[keys], [4], [1]])
  rows = nn.make_attention_mask(jnp.ones((3, 8)), mask)
  flax = sf.as_attention_fn(fm, variables)
  jaxs = sf.as_dot_product_attention(fm, variables)
  ways = (
    lambda q: flax(q, k, v, mask=rows[:, :, : q.shape[1]]),
    lambda q: jaxs(q, k, v, mask=mask[:, None, None]),
    lambda q: flax(q, k, v),
  )
  for attend in ways if component == "saderf" else ways[:1]:
    out = attend(q)
    again = attend(q.at[:, 7].mul(5.0))
    np.testing.assert_array_equal(again[:, :7], out[:, :7])
    # Decoding is teacher forcing.
    steps = [attend(q[:, i : i + 1]) for i in range(8)]
    np.testing.assert_allclose(jnp.concatenate(steps, 1), out, atol=2e-5)


@pytest.mark.parametrize("matrix", ["orf", "variational"])
def test_a_causal_adapter_needs_statistics_of_its_own(matrix):
  name = "oprf" if matrix == "orf" else "posrf"
  fm = sf.feature_map(name, matrix, num_features=16)
  variables = fm.init(jax.random.key(1), head_dim=HEAD_DIM, num_heads=HEADS)
  with pytest.raises(ValueError, match="leak the future"):
    sf.as_attention_fn(fm, variables, is_causal=True)
  # Stated when called, with one query as well: Flax's decode mode.
  q, k, v = random_inputs()
  mask = jnp.ones((3, 1, 1, 7), bool)
  with pytest.raises(ValueError, match="leak the future"):
    sf.as_attention_fn(fm, variables)(q[:, :1], k, v, mask=mask, is_causal=True)
  with pytest.raises(ValueError, match="leak the future"):
    sf.as_dot_product_attention(fm, variables)(q, k, v, is_causal=True)
  stats = fm.calibrate(variables, q, k)
  fn = sf.as_attention_fn(fm, variables, stats=stats, is_causal=True)
  assert bool(jnp.isfinite(fn(q, k, v)).all())


def test_triangles_and_packed_rows_are_nothing_for_statistics_of_all():
  fm, variables = make_map("oprf")
  q, k, v = random_inputs()
  fn = sf.as_attention_fn(fm, variables)
  causal = nn.make_causal_mask(jnp.ones((3, 7)))
  with pytest.raises(ValueError, match="cannot honour"):
    fn(q, k, v, mask=causal)
  out = jax.jit(lambda mask: fn(q, k, v, mask=mask))(causal)
  assert bool(jnp.isnan(out).all())


MAKERS = {
  "flax": sf.as_attention_fn,
  "flax causal": lambda *args: sf.as_attention_fn(*args, is_causal=True),
  "jax": sf.as_dot_product_attention,
}


def test_adapters_are_records():
  fm, variables = make_map()
  copied = jax.tree.map(jnp.copy, variables)
  other = fm.init(jax.random.key(9), head_dim=HEAD_DIM, num_heads=HEADS)
  made = {name: make(fm, variables) for name, make in MAKERS.items()}
  for name, fn in made.items():
    for same in (
      MAKERS[name](fm, variables),
      MAKERS[name](fm, copied),
      pickle.loads(pickle.dumps(fn)),
    ):
      assert fn == same and hash(fn) == hash(same)
    assert fn != MAKERS[name](fm, other)
    assert fn != 3 and [other for other in made.values() if other == fn] == [fn]
    out = pickle.loads(pickle.dumps(fn))(*random_inputs())
    np.testing.assert_array_equal(out, fn(*random_inputs()))
    assert "posrf-orf" in repr(fn) and len(repr(fn)) < 80


def test_a_deleted_array_is_equal_to_nothing_else():
  fm, variables = make_map()
  copied = jax.tree.map(jnp.copy, variables)
  fn = sf.as_attention_fn(fm, copied)
  jax.tree.map(lambda leaf: leaf.delete(), copied)
  assert fn == fn and fn != sf.as_attention_fn(fm, variables)


def test_a_module_made_again_is_not_traced_again():
  fm, variables = make_map()
  traces = []

  def apply(layer, params, x):
    traces.append(0)
    return layer.apply(params, x)

  run = jax.jit(apply, static_argnums=0)
  make = lambda: nn.MultiHeadDotProductAttention(
    num_heads=HEADS,
    attention_fn=sf.as_attention_fn(fm, jax.tree.map(jnp.copy, variables)),
  )
  x = jax.random.normal(jax.random.key(2), (2, 5, WIDTH))
  params = make().init(jax.random.key(3), x)
  for _ in range(3):
    run(make(), params, x)
  assert len(traces) == 1


def test_variables_as_arguments_are_not_in_the_program():
  fm = sf.feature_map("posrf", "orf", num_features=4096)
  variables = fm.init(jax.random.key(0), head_dim=HEAD_DIM)
  q, k, v = random_inputs()

  def run(variables, q):
    return sf.as_attention_fn(fm, variables)(q, k, v)

  text = jax.jit(run).lower(variables, q).as_text()
  assert len(text) < 200_000  # 32,768 numbers would be more


class Learning(nnx.Module):
  """Holds variables, and makes the adapter of them when it is called."""

  def __init__(self, fm, rngs):
    self.fm = fm
    maps = fm.init(rngs.params(), head_dim=HEAD_DIM, num_heads=HEADS)
    self.params = nnx.Param(maps.params)
    self.projection = nnx.Variable(maps.projection)
    self.attention = nnx.MultiHeadAttention(
      num_heads=HEADS, in_features=WIDTH, decode=False, rngs=rngs
    )

  def __call__(self, x):
    maps = sf.FeatureVariables(
      self.params.get_value(), self.projection.get_value()
    )
    self.attention.attention_fn = sf.as_attention_fn(self.fm, maps)
    out = self.attention(x)
    self.attention.attention_fn = None
    return out


def test_a_learnable_map_trains_in_nnx():
  fm = sf.feature_map("posrf", "gmm", num_features=16)
  # Made under jit, as sharded models are.
  model = nnx.jit(lambda: Learning(fm, nnx.Rngs(0)))()
  optimizer = nnx.Optimizer(
    model, optax.adamw(1e-2, weight_decay=0.1), wrt=nnx.Param
  )
  x = jax.random.normal(jax.random.key(2), (2, 5, WIDTH))

  @nnx.jit
  def step(model, optimizer):
    loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - 1.0) ** 2))(
      model
    )
    optimizer.update(model, grads)
    return loss

  before = jax.tree.map(
    jnp.copy, (model.params.get_value(), model.projection.get_value())
  )
  losses = [float(step(model, optimizer)) for _ in range(10)]
  assert losses[-1] < losses[0]
  for old, new in zip(
    jax.tree.leaves(before[0]),
    jax.tree.leaves(model.params.get_value()),
    strict=True,
  ):
    assert float(jnp.abs(old - new).max()) > 1e-4
  jax.tree.map(
    np.testing.assert_array_equal, before[1], model.projection.get_value()
  )


def test_axes_that_do_not_agree():
  fm, variables = make_map()
  q, k, v = random_inputs()
  for make in (sf.as_attention_fn, sf.as_dot_product_attention):
    fn = make(fm, variables)
    with pytest.raises(ValueError, match=r"query.shape=\(2, 8\)"):
      fn(q[0, 0], k, v)
    flat = (jnp.tile(q, (2, 1, 1, 1)),)
    split = (x.reshape(2, 3, *x.shape[1:]) for x in map(_twice, (k, v)))
    with pytest.raises(ValueError, match="of the same batch"):
      fn(*flat, *split)


def _twice(x):
  return jnp.tile(x, (2, 1, 1, 1))
