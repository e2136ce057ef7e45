"""Training and comparisons that the tests of all clients share."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import spectraformer_jax as sf

HEADS, HEAD_DIM, WIDTH, VOCAB = 2, 8, 16, 12
STEPS = 30


def make_map(component="posrf", *, num_heads=HEADS, **component_kwargs):
  """Makes a feature map for heads of 8 dimensions, and its variables."""
  fixed = {"elu1", "cosformer", "taylor2"}
  fm = sf.feature_map(
    component,
    "none" if component in fixed else "orf",
    num_features=None if component in fixed else 64,
    component_kwargs=component_kwargs,
  )
  return fm, fm.init(jax.random.key(7), head_dim=HEAD_DIM, num_heads=num_heads)


def fit(loss, params, tx=None, steps=STEPS):
  """Trains on one batch; returns parameters, and the loss before each step.

  Every gradient must be finite.
  """
  tx = tx or optax.adam(1e-2)

  @jax.jit
  def step(params, state):
    value, grads = jax.value_and_grad(loss)(params)
    finite = [jnp.isfinite(g).all() for g in jax.tree.leaves(grads)]
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value, jnp.array(finite)

  state, losses = tx.init(params), []
  for _ in range(steps):
    params, state, value, finite = step(params, state)
    assert finite.all()
    losses.append(float(value))
  return params, losses


def assert_trains_alike(losses, original, *, fall=0.5, near=0.25):
  """Asserts that losses fall below `fall` of the first, and end alike.

  Args:
    losses: of the client, from `fit`.
    original: of the same model with softmax attention.
    fall: share of the first loss that must not be left.
    near: how far the last losses may be apart, in shares of the first loss.
  """
  for name, values in (("spectral", losses), ("softmax", original)):
    assert values[-1] < fall * values[0], (name, values)
  assert abs(losses[-1] - original[-1]) < near * original[0], (losses, original)


def assert_blind(function, array, other, seen, atol=2e-6):
  """Asserts that `function` returns the same at `seen` for both arrays.

  Args:
    function: of one array.
    array: with something in it that `seen` must not see.
    other: the same with something else in its place.
    seen: bool, True where the results must agree; as the results, or without
      their last axes.
    atol: absolute tolerance.
  """
  one, two = np.asarray(function(array)), np.asarray(function(other))
  assert np.isfinite(one).all()
  assert not np.allclose(one, two, atol=1e-3), "nothing changed at all"
  np.testing.assert_allclose(one[seen], two[seen], atol=atol, rtol=0)


def cross_entropy(logits, targets, weights):
  """Returns the mean loss over the positions that have a weight."""
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  return jnp.where(weights, losses, 0).sum() / weights.sum()


def with_other_word(tokens, *index):
  """Puts another word, which is not padding, at an index of `tokens`."""
  return tokens.at[index].set(tokens[index] % (VOCAB - 1) + 1)


def shift_right(x):
  """Puts a zero in front, and drops the last token."""
  return jnp.pad(x, ((0, 0), (1, 0)))[:, :-1]


class Positions(nn.Module):
  """Adds an embedding of positions; while decoding, that of a counter.

  Attributes:
    length: of the longest row.
    decode: one position at a time, counted in the collection "cache".
  """

  length: int
  decode: bool = False

  @nn.compact
  def __call__(self, x, positions=None):
    """`x` ``[B, T, D]`` with positions ``[B, T]``, or 0 to T - 1."""
    init = nn.initializers.normal(0.5)
    table = self.param("table", init, (self.length, x.shape[-1]))
    if positions is None:
      positions = jnp.arange(x.shape[1])[None]
    if self.decode:
      is_running = self.has_variable("cache", "index")
      index = self.variable("cache", "index", lambda: jnp.array(0))
      if is_running:
        positions = index.value[None, None]
        index.value = index.value + 1
    return x + jnp.broadcast_to(table[positions], x.shape)
