r"""The loss of a fit: the distance of implied weights from exact ones.

For a query i, with the kernel K of the teacher and features phi and psi,

.. math::
  a_{ij} = K(x_i, y_j) / \sum_j K(x_i, y_j), \quad
  b_{ij} = \hat K_{ij} / \sum_j \hat K_{ij}, \quad
  \hat K_{ij} = \phi(x_i) \cdot \psi(y_j)

over the visible keys j; for exact keys, K itself takes the place of its
estimate. The loss is the mean of :math:`\sum_j a_{ij} \log(a_{ij} / b_{ij})`
over queries and heads. Its gradient in :math:`\log \hat K_{ij}` is
:math:`b_{ij} - a_{ij}`, which is bounded. With ``loss="output"`` it is instead
the squared error of the outputs over their square, the mean over heads.
"""

import jax
import jax.numpy as jnp

from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.linearize.problem import Problem, Sequences
from spectraformer_jax.typing import Array, FeatureVariables

# Of a query's largest possible weight: where the estimate is smaller, it is
# replaced by this one and has no gradient.
FLOOR = 1e-12
# The logarithm of the weight of a hidden key.
LOWEST = -1e30


def draw_rows(rng: Array, query_mask: Array, rows: int) -> Array:
  """Draws visible rows of each sequence without replacement, ``[B, R]``.

  A sequence with fewer than `rows` visible ones gets masked ones as well.

  Args:
    rng: PRNG key.
    query_mask: bool ``[B, T]``.
    rows: R, at most T.
  """
  noise = jax.random.gumbel(rng, query_mask.shape)
  return jax.lax.top_k(jnp.where(query_mask, noise, -jnp.inf), rows)[1]


def mean_loss(
  problem: Problem,
  variables: FeatureVariables,
  batch: Sequences,
  rows: Array,
) -> tuple[Array, Array]:
  """Computes the loss at some rows.

  Args:
    problem: see `Problem`.
    variables: of the map.
    batch: some sequences.
    rows: indices of their rows, ``[B, R]``. Masked ones do not count.

  Returns:
    The loss, and that of attention that ignores queries and keys; scalars.
  """
  x = jnp.take_along_axis(batch.query, rows[:, None, :, None], axis=2)
  place = jnp.arange(batch.key.shape[2])
  offset = (rows // problem.groups)[:, :, None] - place[None, None]
  visible = batch.key_mask[:, None]
  if problem.is_causal:
    visible = visible & (offset >= 0)
  visible = jnp.broadcast_to(visible, offset.shape)
  counts = jnp.take_along_axis(batch.query_mask, rows, axis=1)
  counts &= jnp.any(visible, axis=-1)
  teacher = _log_teacher(problem.target, x, batch.key)
  student = _log_student(
    problem.feature_map, variables, x, batch.key, batch.key_mask
  )
  if not problem.exact.are_none:
    is_exact = problem.exact.is_near(offset)[:, None]
    is_exact = is_exact | batch.is_special[:, :, None]
    student = jnp.where(is_exact, teacher, student)
  visible = visible[:, None]
  log_a, log_b, log_uniform = (
    _log_softmax(scores, visible)
    for scores in (teacher, student, jnp.zeros_like(teacher))
  )
  if problem.loss == "output":
    outputs = lambda log_weights: jnp.einsum(
      "bnrs,bnsv->bnrv",
      jnp.where(visible, jnp.exp(log_weights), 0.0),
      batch.value,
      precision="highest",
    )
    exact = outputs(log_a)
    distance = lambda log_b: _relative_square(exact, outputs(log_b), counts)
  else:
    distance = lambda log_b: _mean(
      jnp.sum(jnp.exp(log_a) * (log_a - log_b), axis=-1), counts
    )
  return distance(log_b), jax.lax.stop_gradient(distance(log_uniform))


def _log_teacher(kernel: str, x: Array, y: Array) -> Array:
  """Returns log K of queries and keys ``[B, N, ., H]``: ``[B, N, R, S]``."""
  scores = jnp.einsum("bnrh,bnsh->bnrs", x, y, precision="highest")
  if kernel == "gaussian":
    half_square = lambda x: 0.5 * jnp.sum(jnp.square(x), axis=-1)
    scores -= half_square(x)[..., None] + half_square(y)[:, :, None]
  return scores


def _log_student(
  feature_map: FeatureMap,
  variables: FeatureVariables,
  x: Array,
  y: Array,
  key_mask: Array,
) -> Array:
  """Returns the logarithm of the estimate of K, ``[B, N, R, S]``.

  Each feature is shifted by its largest log-magnitude over the visible keys,
  then each query by its largest one over features. Both shifts cancel.
  """
  prepared = feature_map.prepare(variables)
  query = feature_map.prepared_features(prepared, x, side="query")
  key = feature_map.prepared_features(prepared, y, side="key")
  stop = jax.lax.stop_gradient
  is_visible = key_mask[:, None, :, None]
  shift = jnp.where(is_visible, key.log_magnitude, LOWEST)
  shift = stop(jnp.max(shift, axis=2, keepdims=True))
  log_psi = jnp.where(is_visible, key.log_magnitude - shift, LOWEST)
  log_phi = query.log_magnitude + shift
  largest = stop(jnp.max(log_phi, axis=-1, keepdims=True))
  phi, psi = jnp.exp(log_phi - largest), jnp.exp(log_psi)
  if query.factor is not None:
    phi = phi * query.factor
  if key.factor is not None:
    psi = psi * key.factor
  total = jnp.einsum("bnrf,bnsf->bnrs", phi, psi, precision="highest")
  return jnp.log(jnp.maximum(total, FLOOR)) + largest


def _log_softmax(scores: Array, visible: Array) -> Array:
  """Returns log weights; of hidden keys 0, so that they cancel in the loss."""
  scores = jnp.where(visible, scores, LOWEST)
  return jnp.where(visible, jax.nn.log_softmax(scores, axis=-1), 0.0)


def _mean(of_rows: Array, counts: Array) -> Array:
  """Returns the mean of ``[B, N, R]`` over heads and the rows that count."""
  total = jnp.sum(jnp.where(counts[:, None], of_rows, 0.0))
  count = jnp.maximum(jnp.sum(counts), 1) * of_rows.shape[1]
  return total / count.astype(total.dtype)


def _relative_square(exact: Array, out: Array, counts: Array) -> Array:
  """Returns the squared error of outputs over their square, mean over heads.

  Args:
    exact: ``[B, N, R, V]``.
    out: ``[B, N, R, V]``.
    counts: bool ``[B, R]``: rows that count.
  """
  total = lambda x: jnp.sum(
    jnp.where(counts[:, None, :, None], jnp.square(x), 0.0), axis=(0, 2, 3)
  )
  return jnp.mean(total(out - exact) / total(exact))
