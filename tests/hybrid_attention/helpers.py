"""The definition of hybrid attention, in NumPy, key by key."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import spectraformer_jax as sf

HEAD_DIM = 4
# Maps of both kernels, with weights of one sign and of both.
MAPS = {
  "softmax": ("posrf", {}),
  "gaussian": ("posrf", {"kernel": "gaussian"}),
  "signed": ("trigrf", {}),
  "signed gaussian": ("trigrf", {"kernel": "gaussian"}),
  "tuned": ("oprf", {"statistics": "constant"}),
}


@functools.cache
def build_map(name="softmax"):
  """Returns `feature_map` and `variables` as keyword arguments."""
  component, options = MAPS[name]
  fm = sf.feature_map(
    component, "orf", num_features=16, component_kwargs=options
  )
  # The result is cached, so it must be no tracer.
  with jax.ensure_compile_time_eval():
    rng = jax.random.key(7)
    variables = fm.init(rng, head_dim=HEAD_DIM, num_heads=2)
  return {"feature_map": fm, "variables": variables}


def draw(length, keys=None, *, groups=1, batch=2, scale=1.0, seed=0):
  """Returns random query, key and value: two key heads, value dim 3."""
  rngs = jax.random.split(jax.random.key(seed), 3)
  keys = keys or length
  return (
    scale * jax.random.normal(rngs[0], (batch, length, 2 * groups, HEAD_DIM)),
    scale * jax.random.normal(rngs[1], (batch, keys, 2, HEAD_DIM)),
    jax.random.normal(rngs[2], (batch, keys, 2, 3)),
  )


def hide(length, hidden, batch=2):
  """Returns a mask ``[B, length]``, False at the hidden positions.

  They are the same in all examples but one: the last has position 1 as well.
  """
  mask = np.ones((batch, length), bool)
  mask[:, list(hidden)] = False
  mask[-1, 1] = False
  return jnp.asarray(mask)


class Choice(NamedTuple):
  """The arguments that decide which keys a query sees, and which exactly."""

  window: Any = None
  num_sinks: int = 0
  num_heavy: int = 0
  is_causal: bool = False
  key_mask: Any = None
  query_mask: Any = None
  segment_ids: Any = None


class Sums(NamedTuple):
  """Sums of one query over some keys, times exp(-log_scale).

  Attributes:
    columns: numerators and the sum of weights, ``[V + 1]``.
    magnitude: the sum of absolute weights.
    log_scale: of the largest weight; -inf without keys.
  """

  columns: np.ndarray
  magnitude: float
  log_scale: float


def definition(
  arrays, *, feature_map, variables, stats=None, chosen_by=None, **choice
):
  """Computes hybrid attention in float64.

  Args:
    arrays: query ``[B, T, N G, H]``, key and value.
    feature_map: the map.
    variables: its variables.
    stats: its stats.
    chosen_by: query and key that decide which keys are heavy; None: those of
      `arrays`.
    **choice: see `Choice`.

  Returns:
    ``[B, T, N G, V]``.
  """
  choice = Choice(**choice)
  query, key, value = (np.asarray(x, np.float64) for x in arrays)
  if choice.key_mask is not None:
    mask = np.asarray(choice.key_mask)[:, :, None, None]
    key, value = np.where(mask, key, 0.0), np.where(mask, value, 0.0)
  root = query.shape[-1] ** -0.25
  x, y = root * query, root * key
  deciding_x, deciding_y = x, y
  if chosen_by is not None:
    deciding_x, deciding_y = (
      root * np.asarray(array, np.float64) for array in chosen_by[:2]
    )
  kernel = feature_map.component.kernel
  groups = query.shape[2] // key.shape[2]
  maps = {"feature_map": feature_map, "variables": variables, "stats": stats}
  phi = [features(x[:, :, g::groups], "query", **maps) for g in range(groups)]
  psi = features(y, "key", **maps)
  out = np.zeros((*query.shape[:3], value.shape[-1]))
  for example in range(query.shape[0]):
    for head in range(query.shape[2]):
      n, g = divmod(head, groups)
      of_group = deciding_x[example][:, groups * n : groups * (n + 1)]
      sets = key_sets(
        choice, example, of_group, deciding_y[example, :, n], kernel
      )
      for i, (exact, far) in enumerate(sets):
        sums = sums_of(
          (x[example, i, head], *(leaf[example, i, n] for leaf in phi[g])),
          (y[example, :, n], *(leaf[example, :, n] for leaf in psi)),
          value[example, :, n],
          (exact, far),
          kernel,
        )
        out[example, i, head] = quotient(*sums, feature_map)
  return out


def features(x, side, *, feature_map, variables, stats):
  """Returns log-magnitudes and factors, ``[B, T, N, F]`` float64."""
  out = feature_map.log_features(
    variables, jnp.asarray(x, jnp.float32), side=side, stats=stats
  )
  size, factor = out.log_magnitude, out.factor
  factor = jnp.ones_like(size) if factor is None else factor
  both = np.broadcast_arrays(size, factor)
  return [leaf.astype(np.float64) for leaf in both]


def key_sets(choice, example, queries, keys, kernel):
  """Returns the exact and the far keys of every query of one key head.

  Args:
    choice: see `Choice`.
    example: index of the example.
    queries: scaled queries of the head's group, ``[T, G, H]``.
    keys: scaled keys, ``[S, H]``.
    kernel: "softmax" or "gaussian".
  """
  num_queries, num_keys = len(queries), len(keys)
  one = lambda x, length, other: (
    np.full(length, other) if x is None else np.asarray(x)[example]
  )
  ids = choice.segment_ids
  of_query, of_key = ids if isinstance(ids, tuple) else (ids, ids)
  of_query, of_key = one(of_query, num_queries, 0), one(of_key, num_keys, 0)
  seen = one(choice.key_mask, num_keys, True)
  counts = one(choice.query_mask, num_queries, True)
  place = lambda ids: [sum(ids[:i] == ids[i]) for i in range(len(ids))]
  query_place, key_place = place(of_query), place(of_key)
  first = {
    segment: [j for j in range(num_keys) if seen[j] and of_key[j] == segment][
      : choice.num_sinks
    ]
    for segment in set(of_query.tolist())
  }
  heavy = heavy_keys(
    queries[counts],
    keys,
    [j for j in range(num_keys) if seen[j] and j not in first.get(0, [])],
    choice.num_heavy,
    kernel,
  )
  window = choice.window
  left, right = window if isinstance(window, tuple) else (window, window)
  sets = []
  for i in range(num_queries):
    exact, far = [], []
    for j in range(num_keys):
      is_seen = seen[j] and of_query[i] == of_key[j] and counts[i]
      if not is_seen or (choice.is_causal and j > i):
        continue
      is_near = window is not None and (
        -right <= query_place[i] - key_place[j] <= left
      )
      is_special = j in first[of_query[i].item()] or j in heavy
      (exact if is_near or is_special else far).append(j)
    sets.append((exact, far))
  return sets


def heavy_keys(queries, keys, candidates, number, kernel):
  """Returns the candidates with the largest expected weight."""
  if not (number and candidates):
    return []
  queries = queries.reshape(-1, queries.shape[-1])
  m, a = queries.mean(0), queries.var(0)
  c, b = keys[candidates].mean(0), keys[candidates].var(0)
  if kernel == "gaussian":
    c, b = c / (1 + b), b / (1 + b)
  score = []
  for j in candidates:
    u = keys[j] - c
    h = np.sum((m * u + a * u**2 / 2) / (1 + a * b))
    score.append(h - keys[j] @ keys[j] / 2 * (kernel == "gaussian"))
  order = sorted(range(len(candidates)), key=lambda k: -score[k])
  return [candidates[k] for k in order[:number]]


def sums_of(query, keys, value, sets, kernel):
  """Returns the `Sums` of one query over exact and over far keys.

  Args:
    query: scaled query ``[H]``, log-magnitudes and factors ``[F]``.
    keys: scaled keys ``[S, H]``, log-magnitudes and factors ``[S, F]``.
    value: ``[S, V]``.
    sets: exact and far keys.
    kernel: "softmax" or "gaussian".
  """
  (x, log_phi, phi), (y, log_psi, psi), (exact, far) = query, keys, sets
  log_exact = y[exact] @ x
  if kernel == "gaussian":
    log_exact = -0.5 * np.sum((x - y[exact]) ** 2, axis=-1)
  with_ones = np.append(value, np.ones((len(value), 1)), axis=1)
  return [
    _sums(log_exact[:, None], np.ones((len(exact), 1)), with_ones[exact]),
    _sums(log_phi + log_psi[far], phi * psi[far], with_ones[far]),
  ]


def _sums(log_terms, factors, with_ones):
  """Returns the `Sums` of weights ``sum_f factor exp(log_term)``."""
  log_scale = max([-np.inf, *log_terms.ravel()])
  terms = factors * np.exp(log_terms - log_scale)
  return Sums(terms.sum(-1) @ with_ones, np.abs(terms).sum(), log_scale)


def quotient(exact, far, feature_map):
  """Returns the output ``[V]`` of one query."""
  is_signed = not feature_map.info.positive
  parts = [part for part in (exact, far) if part.magnitude]
  if is_signed and exact.magnitude:
    noise = 0.8 / np.sqrt(feature_map.num_rows) * far.magnitude
    if far.columns[-1] <= noise:
      parts = [exact]
  if not parts:
    return 0.0
  log_scale = max(part.log_scale for part in parts)
  factors = [np.exp(part.log_scale - log_scale) for part in parts]
  pairs = list(zip(factors, parts, strict=True))
  *numerators, divisor = sum(factor * part.columns for factor, part in pairs)
  if is_signed:
    floor = 1e-6 * sum(factor * part.magnitude for factor, part in pairs)
    if abs(divisor) < floor:
      divisor = floor if divisor >= 0 else -floor
  return np.asarray(numerators) / divisor


def assert_close(actual, expected, tolerance=2e-5):
  """Asserts that trees agree, relative to the largest number of each leaf."""
  for a, b in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape and np.isfinite(a).all()
    assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-30)
