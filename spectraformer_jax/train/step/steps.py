"""Training and evaluation steps: pure functions for any number of devices.

Each step gets the examples of one replica. With `axis_name` the step sums over
the replicas of that mapped axis, so its result is that of the global batch;
without `axis_name` there is one replica.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spectraformer_jax.train.step.state import MUTABLE_COLLECTION, TrainState
from spectraformer_jax.typing import Array, PyTree


class Sums(NamedTuple):
  """Weighted sums over examples, float32 scalars; divide by `weight` for means.

  `skipped` is 1 for a skipped training step, whose other sums are 0.
  """

  loss: Array
  correct: Array
  weight: Array
  skipped: Array | float = 0.0


# Gradient, sums, and the collections that the model has updated.
Gradients = tuple[PyTree, Sums, PyTree]


def replica_rng(rng: Array, step: Array, axis_name: str | None) -> Array:
  """Derives the key of one step on one replica.

  Example:
    >>> replica_rng(jax.random.key(0), 3, None).shape
    ()
  """
  replica = 0 if axis_name is None else jax.lax.axis_index(axis_name)
  return jax.random.fold_in(jax.random.fold_in(rng, step), replica)


def model_inputs(batch: Mapping[str, Array]) -> tuple[Array, ...]:
  """Returns the arguments of a model: tokens, length (twice for a pair).

  Example:
    >>> len(model_inputs({"tokens": 0, "length": 0, "label": 0, "weight": 0}))
    2
  """
  names = ("tokens", "length", "tokens_2", "length_2")
  return tuple(batch[name] for name in names if name in batch)


def weighted_sums(
  logits: Array,
  label: Array,
  weight: Array,
  label_smoothing: float = 0.0,
  teacher_logits: Array | None = None,
) -> Sums:
  """Sums cross-entropy and hits of logits [B, classes] float32, by weight.

  Label smoothing takes the share `label_smoothing` of each label and divides it
  equally among all classes (Szegedy et al., 2016, section 7). With
  `teacher_logits`, of the same shape, the cross-entropy is that of their
  probabilities (Hinton et al., 2015, section 2, with temperature 1); hits are
  still those of the labels.

  Example:
    >>> logits = jnp.array([[9.0, 0.0], [9.0, 0.0]])
    >>> sums = weighted_sums(logits, jnp.array([0, 1]), jnp.array([1.0, 0.0]))
    >>> float(sums.correct), float(sums.weight)
    (1.0, 1.0)
  """
  if teacher_logits is None:
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
  else:
    loss = optax.softmax_cross_entropy(logits, jax.nn.softmax(teacher_logits))
  if label_smoothing:
    uniform = -jnp.mean(jax.nn.log_softmax(logits), axis=-1)
    loss = (1 - label_smoothing) * loss + label_smoothing * uniform
  hit = jnp.argmax(logits, axis=-1) == label
  return Sums(
    jnp.sum(loss * weight),
    jnp.sum(hit.astype(jnp.float32) * weight),
    jnp.sum(weight),
  )


def train_step(
  state: TrainState,
  batch: Mapping[str, Array],
  rng: Array,
  teacher: PyTree = None,
  *,
  apply_fn: Callable[..., Any],
  tx: optax.GradientTransformation,
  accumulate: int = 1,
  label_smoothing: float = 0.0,
  ema_decay: float = 0.0,
  teacher_fn: Callable[..., Any] | None = None,
  axis_name: str | None = None,
) -> tuple[TrainState, Sums]:
  """Updates the state by one batch, or skips the batch.

  If loss or gradient are infinite or NaN on any replica, all replicas skip the
  batch: only the number of the step changes in their states.

  Args:
    state: the same on every replica.
    batch: this replica's tokens [B, T] and length, label, weight [B].
    rng: dropout key of the run; step and replica are folded in here.
    teacher: variables of `teacher_fn`, the same on every replica.
    apply_fn: `model.apply`.
    tx: the optimiser.
    accumulate: see `gradients`.
    label_smoothing: see `weighted_sums`.
    ema_decay: decay of the moving average, see `update_ema`.
    teacher_fn: `apply` of the model whose logits are learnt; None for labels.
    axis_name: mapped axis of the replicas; None for one replica.

  Returns:
    The next state and the sums over the global batch; the same on every
    replica.
  """
  grads, sums, updated = gradients(
    state,
    batch,
    rng,
    teacher,
    apply_fn=apply_fn,
    accumulate=accumulate,
    label_smoothing=label_smoothing,
    teacher_fn=teacher_fn,
    axis_name=axis_name,
  )
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  collections = {**state.collections, **updated}
  ema = state.ema
  if ema is not None:
    ema = update_ema(ema, params, state.step, ema_decay)
  new = TrainState(state.step, params, collections, opt_state, ema)
  finite = all_finite((grads, sums.loss))
  new = jax.tree.map(functools.partial(jnp.where, finite), new, state)
  counted = jax.tree.map(lambda leaf: jnp.where(finite, leaf, 0.0), sums)
  counted = counted._replace(skipped=1.0 - finite.astype(jnp.float32))
  return new._replace(step=state.step + 1), counted


def update_ema(
  ema: PyTree, params: PyTree, step: Array, decay: float
) -> PyTree:
  """Returns the moving average of the parameters after a step.

  The decay is at most (1 + step) / (10 + step), as in TensorFlow's
  `ExponentialMovingAverage`, so that the initial parameters lose their
  influence within the first steps.

  Args:
    ema: the average before the step.
    params: the parameters after the step.
    step: number of the step, from 0 on; a scalar.
    decay: in [0, 1).

  Example:
    >>> update_ema({"w": 0.0}, {"w": 1.0}, jnp.int32(0), 0.999)["w"].item()
    0.8999999761581421
  """
  step = step.astype(jnp.float32)
  rate = 1.0 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))
  return jax.tree.map(lambda old, new: old + rate * (new - old), ema, params)


def gradients(
  state: TrainState,
  batch: Mapping[str, Array],
  rng: Array,
  teacher: PyTree = None,
  *,
  apply_fn: Callable[..., Any],
  accumulate: int = 1,
  label_smoothing: float = 0.0,
  teacher_fn: Callable[..., Any] | None = None,
  axis_name: str | None = None,
) -> Gradients:
  """Computes the gradient of the weighted mean loss over the global batch.

  That is the sum of the gradients of all replicas' weighted losses, divided by
  the sum of all weights; the mean of the replicas' means would differ from it
  where their weights differ.

  Args:
    state: the same on every replica.
    batch: this replica's, see `train_step`.
    rng: dropout key of the run; step and replica are folded in here.
    teacher: see `train_step`.
    apply_fn: `model.apply`.
    accumulate: number of parts in which the replica's batch goes through the
      model, one after the other, to need less memory; B is a multiple of it.
    label_smoothing: see `weighted_sums`.
    teacher_fn: see `train_step`.
    axis_name: mapped axis of the replicas; None for one replica.

  Returns:
    Gradient, sums over the global batch, and updated collections; the same on
    every replica.
  """
  dropout_rng = replica_rng(rng, state.step, axis_name)
  compute = functools.partial(
    _summed_gradients,
    state,
    apply_fn=apply_fn,
    label_smoothing=label_smoothing,
    teacher_fn=teacher_fn and functools.partial(teacher_fn, teacher),
  )
  if accumulate == 1:
    grads, sums, updated = compute(batch, dropout_rng)
  else:
    grads, sums, updated = _accumulated(compute, batch, dropout_rng, accumulate)
  if axis_name is not None:
    replicas = jax.lax.axis_size(axis_name)
    updated = jax.tree.map(lambda leaf: leaf / replicas, updated)
    # One psum of all three, so that the compiler makes one all-reduce. The sum
    # of `updated`, divided above, is the mean over the replicas.
    grads, sums, updated = jax.lax.psum((grads, sums, updated), axis_name)
  # A batch without weight has zero gradients, not NaN.
  scale = 1.0 / jnp.maximum(sums.weight, jnp.finfo(jnp.float32).tiny)
  grads = jax.tree.map(lambda grad: grad * scale.astype(grad.dtype), grads)
  return grads, sums, updated


def _summed_gradients(
  state: TrainState,
  batch: Mapping[str, Array],
  dropout_rng: Array,
  *,
  apply_fn: Callable[..., Any],
  label_smoothing: float,
  teacher_fn: Callable[..., Any] | None,
) -> Gradients:
  """Computes the gradient of the summed loss over the examples of `batch`."""
  teacher_logits = teacher_fn and teacher_fn(*model_inputs(batch))
  mutable = [name for name in state.collections if name == MUTABLE_COLLECTION]

  def loss_fn(params: PyTree) -> tuple[Array, tuple[Sums, PyTree]]:
    logits, updated = apply_fn(
      {"params": params, **state.collections},
      *model_inputs(batch),
      deterministic=False,
      rngs={"dropout": dropout_rng},
      mutable=mutable,
    )
    sums = weighted_sums(
      logits, batch["label"], batch["weight"], label_smoothing, teacher_logits
    )
    return sums.loss, (sums, updated)

  grads, (sums, updated) = jax.grad(loss_fn, has_aux=True)(state.params)
  return grads, sums, updated


def _accumulated(
  compute: Callable[[Mapping[str, Array], Array], Gradients],
  batch: Mapping[str, Array],
  dropout_rng: Array,
  parts: int,
) -> Gradients:
  """Sums `compute` over the parts of a batch; averages the collections."""
  split = {
    name: array.reshape(parts, -1, *array.shape[1:])
    for name, array in batch.items()
  }
  part = lambda number: compute(
    {name: array[number] for name, array in split.items()},
    jax.random.fold_in(dropout_rng, number),
  )
  add = functools.partial(jax.tree.map, jnp.add)
  # The sums start from zeros, for which shapes suffice, and not from the first
  # part, so that the model is compiled once.
  empty = jax.tree.map(
    lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(part, 0)
  )
  (grads, sums, updated), _ = jax.lax.scan(
    lambda total, number: (add(total, part(number)), None),
    empty,
    jnp.arange(parts),
  )
  return grads, sums, jax.tree.map(lambda leaf: leaf / parts, updated)


def all_finite(tree: PyTree) -> Array:
  """Returns a bool scalar: whether no number of a tree is infinite or NaN.

  Example:
    >>> bool(all_finite({"w": jnp.array([1.0, jnp.nan])}))
    False
  """
  leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
  return jnp.all(jnp.stack(leaves))


def gradient_norms(
  state: TrainState,
  batch: Mapping[str, Array],
  rng: Array,
  teacher: PyTree = None,
  *,
  apply_fn: Callable[..., Any],
  label_smoothing: float = 0.0,
  teacher_fn: Callable[..., Any] | None = None,
  axis_name: str | None = None,
) -> tuple[PyTree, Array]:
  """Computes norms that explain why `train_step` skipped a batch.

  Args:
    state: before the step.
    batch: of the step.
    rng: dropout key of the run.
    teacher: see `train_step`.
    apply_fn: `model.apply`.
    label_smoothing: see `weighted_sums`.
    teacher_fn: see `train_step`.
    axis_name: mapped axis of the replicas; None for one replica.

  Returns:
    A tree like the params, whose leaves [3] are the norm of the parameter, the
    norm of its gradient, and the number of entries of the gradient that are not
    finite; and the mean loss.
  """
  grads, sums, _ = gradients(
    state,
    batch,
    rng,
    teacher,
    apply_fn=apply_fn,
    label_smoothing=label_smoothing,
    teacher_fn=teacher_fn,
    axis_name=axis_name,
  )

  def norms(param: Array, grad: Array) -> Array:
    bad = jnp.sum(~jnp.isfinite(grad), dtype=jnp.float32)
    return jnp.stack([jnp.linalg.norm(param), jnp.linalg.norm(grad), bad])

  return jax.tree.map(norms, state.params, grads), sums.loss / sums.weight


def eval_step(
  state: TrainState,
  batch: Mapping[str, Array],
  *,
  apply_fn: Callable[..., Any],
  axis_name: str | None = None,
) -> Sums:
  """Sums loss, hits and weights of one batch; draws no random numbers.

  Args:
    state: the same on every replica; its moving average is used if it has one.
    batch: as for `train_step`; examples of weight 0 do not count.
    apply_fn: `model.apply`.
    axis_name: mapped axis of the replicas; None for one replica.
  """
  logits = apply_fn(state.variables, *model_inputs(batch), deterministic=True)
  sums = weighted_sums(logits, batch["label"], batch["weight"])
  return sums if axis_name is None else jax.lax.psum(sums, axis_name)


def redraw_step(
  state: TrainState,
  rng: Array,
  *,
  redraw_fn: Callable[[Array, PyTree], PyTree],
  interval: int,
) -> TrainState:
  """Draws new projections, which depend on the seed and the step alone.

  Args:
    state: its params and optimiser stay.
    rng: redraw key of the run, the same on every replica.
    redraw_fn: `(rng, random_features) -> random_features`.
    interval: steps between redraws.
  """
  rng = jax.random.fold_in(rng, state.step // interval)
  drawn = redraw_fn(rng, state.collections["random_features"])
  return state._replace(
    collections={**state.collections, "random_features": drawn}
  )
