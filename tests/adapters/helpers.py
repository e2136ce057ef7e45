"""Maps, inputs and the plain formula that tests of adapters share."""

import flax.linen as nn
import jax
import jax.numpy as jnp

import spectraformer_jax as sf

BATCH, LENGTH, WIDTH, HEADS, HEAD_DIM = 3, 7, 16, 2, 8
LENGTHS = jnp.array([7, 4, 1])
REAL = jnp.arange(LENGTH)[None, :] < LENGTHS[:, None]
PADDING = nn.make_attention_mask(REAL, REAL)
CAUSAL = nn.make_causal_mask(REAL)
MASKS = {
  "none": (None, False),
  "padding": (PADDING, False),
  "keys": (REAL[:, None, None, :], False),
  "causal": (CAUSAL, True),
  "causal padding": (nn.combine_masks(PADDING, CAUSAL), True),
}


def make_map(component="posrf"):
  """Returns a map and its variables."""
  fm = sf.feature_map(component, "orf", num_features=16)
  return fm, fm.init(jax.random.key(1), head_dim=HEAD_DIM, num_heads=HEADS)


def random_inputs(length=LENGTH):
  """Returns query, key and value, each ``[B, T, N, H]``."""
  shape = (3, BATCH, length, HEADS, HEAD_DIM)
  return tuple(jax.random.normal(jax.random.key(0), shape))


def masked_attention(query, key, value, mask, fm, variables, stats):
  """Attends with the mask applied to a matrix of all weights."""
  phi = fm.apply(variables, query * HEAD_DIM**-0.25, side="query", stats=stats)
  psi = fm.apply(variables, key * HEAD_DIM**-0.25, side="key", stats=stats)
  weights = jnp.einsum("btnf,bsnf->bnts", phi, psi)
  if mask is not None:
    weights = weights * jnp.broadcast_to(mask.astype(bool), weights.shape)
  total = weights.sum(-1, keepdims=True)
  weights = weights / jnp.where(total == 0.0, 1.0, total)
  return jnp.einsum("bnts,bsnv->btnv", weights, value)
