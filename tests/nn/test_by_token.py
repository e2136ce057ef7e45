"""Blocks of tokens: the same numbers as at once, from less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectraformer_jax.nn import EncoderLayer, by_token

SHAPE = (3, 10, 8)  # 30 tokens: five blocks of seven, the last with padding


def make_loss(**kwargs):
  sizes = {"num_heads": 2, "head_dim": 4, "mlp_dim": 12}
  module = EncoderLayer(attention="softmax", **sizes, **kwargs)
  x = jax.random.normal(jax.random.key(0), SHAPE)
  variables = module.init(jax.random.key(1), x)

  def loss(params, x, deterministic=True):
    out = module.apply(
      {"params": params},
      x,
      deterministic=deterministic,
      rngs={"dropout": jax.random.key(2)},
    )
    return jnp.sum(jnp.sin(3.0 * out))

  return loss, variables["params"], x


@pytest.mark.parametrize("mlp", ["gelu", "gated"])
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.slow
def test_blocks_change_nothing(mlp, norm, monkeypatch):
  loss, params, x = make_loss(mlp=mlp, norm=norm)
  whole = jax.value_and_grad(loss, (0, 1))(params, x)
  monkeypatch.setattr(by_token, "BLOCK", 7)
  again, in_blocks, _ = make_loss(mlp=mlp, norm=norm)
  # Initialised in blocks, the parameters are the same.
  jax.tree.map(np.testing.assert_array_equal, params, in_blocks)
  blocks = jax.value_and_grad(again, (0, 1))(params, x)
  # Sums over tokens in another order, float32.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    whole,
    blocks,
  )


def test_an_empty_batch_stays_empty():
  module = EncoderLayer(attention="softmax", num_heads=2, head_dim=4, mlp_dim=6)
  x = jnp.ones(SHAPE)
  variables = module.init(jax.random.key(1), x)
  assert module.apply(variables, x[:0]).shape == (0, *SHAPE[1:])


@pytest.mark.slow
def test_dropout_of_the_backward_pass_is_that_of_the_forward_pass(monkeypatch):
  """Else the gradient would not be the slope."""
  monkeypatch.setattr(by_token, "BLOCK", 7)
  loss, params, x = make_loss(dropout_rate=0.5)
  with jax.enable_x64(True):
    params, x, direction = jax.tree.map(
      lambda a: jnp.asarray(a, "float64"), (params, x, jnp.cos(5.0 * x))
    )
    slope = jnp.vdot(
      jax.grad(lambda x: loss(params, x, deterministic=False))(x), direction
    )
    at = lambda step: loss(params, x + step * direction, deterministic=False)
    np.testing.assert_allclose(slope, (at(1e-6) - at(-1e-6)) / 2e-6, rtol=1e-6)


def test_blocks_have_masks_of_their_own(monkeypatch):
  monkeypatch.setattr(by_token, "BLOCK", 10)
  module = EncoderLayer(attention="softmax", dropout_rate=0.5)
  x = jnp.broadcast_to(jnp.arange(8.0), (2, 10, 8))  # two equal blocks
  variables = module.init(jax.random.key(1), x)

  def second_half(module, x):
    return jax.random.bits(module.make_rng("dropout"), x.shape)

  out = module.apply(
    variables,
    method=lambda module: by_token.by_token(module, second_half, x),
    rngs={"dropout": jax.random.key(2)},
  )
  assert not np.array_equal(out[0], out[1])


def test_hidden_values_of_a_batch_never_exist(monkeypatch):
  """Half of the temporary memory was theirs."""
  x = jax.ShapeDtypeStruct((4, 4096, 16), "float32")

  def temporary(block):
    monkeypatch.setattr(by_token, "BLOCK", block)
    module = EncoderLayer(
      attention="local", num_heads=1, head_dim=8, mlp_dim=256
    )
    params = jax.eval_shape(module.init, jax.random.key(0), x)["params"]

    def loss(params, x):
      rngs = {"dropout": jax.random.key(2)}
      out = module.apply({"params": params}, x, deterministic=False, rngs=rngs)
      return jnp.sum(out**2)

    compiled = jax.jit(jax.grad(loss)).lower(params, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  whole, in_blocks = temporary(4 * 4096), temporary(1024)
  assert in_blocks < 0.6 * whole, (in_blocks / 2**20, whole / 2**20)
