"""Small layers to fit, and the loss by its definition in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import spectraformer_jax as sf
from spectraformer_jax.checks import AttentionArrays
from spectraformer_jax.study.approximation.inputs import make_inputs
from tests.hybrid_attention.helpers import Choice, features, key_sets

# What may be asked of attention.
CASES = {
  "exact": {"window": (2, 1), "num_sinks": 1, "num_heavy": 2},
  "all keys": {},
  "causal": {"is_causal": True},
  "causal exact": {"window": 1, "num_sinks": 2, "is_causal": True},
}
BATCH, LENGTH, HEADS, HEAD_DIM, VALUE_DIM = 3, 12, 2, 4, 3


@functools.cache
def build_map(num_features=6, num_heads=HEADS, seed=0, share="learned"):
  """Returns `feature_map` and `variables` as keyword arguments."""
  fm = sf.feature_map(
    "prototypes",
    "none",
    num_features=num_features,
    component_kwargs={"share": share},
  )
  with jax.ensure_compile_time_eval():
    variables = fm.init(
      jax.random.key(seed), head_dim=HEAD_DIM, num_heads=num_heads
    )
  return {"feature_map": fm, "variables": variables}


def draw(seed=0, *, batch=BATCH, keys=LENGTH, groups=1, mask=True, scale=2.0):
  """Returns random arrays; with masks that hide some positions of each."""
  rngs = jax.random.split(jax.random.key(seed), 3)
  normal = jax.random.normal
  masks = {}
  if mask:
    hidden = jnp.arange(batch)[:, None] + 3
    masks["key_mask"] = jnp.arange(keys)[None] != hidden
    masks["query_mask"] = jnp.arange(LENGTH)[None] != hidden + 1
  return AttentionArrays(
    scale * normal(rngs[0], (batch, LENGTH, HEADS * groups, HEAD_DIM)),
    scale * normal(rngs[1], (batch, keys, HEADS, HEAD_DIM)),
    normal(rngs[2], (batch, keys, HEADS, VALUE_DIM)),
    **masks,
  )


def masks_of(arrays):
  """Returns the masks as keyword arguments."""
  return {"key_mask": arrays.key_mask, "query_mask": arrays.query_mask}


def layer(name="layer_0", seed=0, **options):
  """Returns the `Inputs` of a layer."""
  query, key, value, key_mask, query_mask, _ = draw(seed, **options)
  return make_inputs(name, query, key, value, key_mask, query_mask)


def weights_by_definition(arrays, *, feature_map, variables, **choice):
  """Yields the exact and the implied weights of each query that counts.

  They are computed in float64, key by key. Of a query that sees keys: example,
  position, query head, visible keys, and both weights of these keys.
  """
  choice = Choice(**masks_of(arrays), **choice)
  query, key = (np.asarray(x, np.float64) for x in arrays[:2])
  root = query.shape[-1] ** -0.25
  x, y = root * query, root * key
  groups = query.shape[2] // key.shape[2]
  maps = {"feature_map": feature_map, "variables": variables, "stats": None}
  phi = [features(x[:, :, g::groups], "query", **maps) for g in range(groups)]
  psi = features(y, "key", **maps)
  for b, h in np.ndindex(query.shape[0], query.shape[2]):
    n, g = divmod(h, groups)
    of_group = x[b][:, groups * n : groups * (n + 1)]
    sets = key_sets(choice, b, of_group, y[b, :, n], "softmax")
    for i, (exact, far) in enumerate(sets):
      if not exact + far:
        continue
      log_phi, phi_factor = (leaf[b, i, n] for leaf in phi[g])
      log_psi, psi_factor = (leaf[b, far, n] for leaf in psi)
      factors = phi_factor * psi_factor
      log_far = np.log(np.sum(factors * np.exp(log_phi + log_psi), axis=-1))
      log_exact = y[b, exact, n] @ x[b, i, h]
      keys = exact + far
      a = softmax(y[b, keys, n] @ x[b, i, h])
      yield b, i, h, keys, a, softmax(np.concatenate([log_exact, log_far]))


def softmax(scores):
  """Returns weights of scores, ``[S]``."""
  weights = np.exp(scores - scores.max())
  return weights / weights.sum()


def loss_by_definition(arrays, **options):
  """Returns the mean divergence of each query head, ``[N]``.

  It is the mean over sequences of the mean over queries.
  """
  found = {}
  for b, _, h, _, exact, implied in weights_by_definition(arrays, **options):
    divergence = np.sum(exact * np.log(exact / implied))
    found.setdefault((h, b), []).append(divergence)
  heads = arrays.query.shape[2]
  batch = arrays.query.shape[0]
  means = [[np.mean(found[h, b]) for b in range(batch)] for h in range(heads)]
  return np.mean(means, axis=1)
