"""Fits the parameters of a feature map to the attention of one layer."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from spectraformer_jax.checks import AttentionArrays
from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.feature_maps.prepared import as_variables
from spectraformer_jax.hybrid_attention.exact_keys import Window
from spectraformer_jax.linearize.loss import draw_rows, mean_loss
from spectraformer_jax.linearize.problem import (
  Examples,
  Problem,
  Sequences,
  arrays_of,
  check_disjoint,
  check_fits,
  make_problem,
  make_sequences,
)
from spectraformer_jax.linearize.records import FitReport, NonFiniteLossError
from spectraformer_jax.registry import check_int
from spectraformer_jax.typing import (
  Array,
  FeatureVariables,
  Params,
  Projection,
  PyTree,
)

# Steps between two measurements of the held-out loss.
CHECK_EVERY = 25
# Learning rates that are tried, relative to the one that is asked for.
TRIES = (1.0, 1.0 / 3.0, 1.0 / 9.0)
# Largest norm of the gradient of all parameters.
CLIP = 1.0

OnCheck = Callable[[int], None]


class _State(NamedTuple):
  """What a step changes."""

  params: Params
  optimizer: PyTree


class _Course(NamedTuple):
  """The losses of one try, and its best parameters; see `FitReport`."""

  losses: list[float]
  checked_steps: list[int]
  held_out: list[float]
  best: Params

  @property
  def is_finite(self) -> bool:
    """Whether all losses so far are finite."""
    return bool(np.isfinite([*self.losses, *self.held_out]).all())


def fit_feature_map(
  query: Float[Array, "B T NG H"],
  key: Float[Array, "B S N H"],
  *,
  feature_map: FeatureMap,
  variables: FeatureVariables,
  rng: Array,
  steps: int = 200,
  rows: int = 64,
  batch_size: int = 1,
  learning_rate: float = 2e-2,
  loss: str = "cross_entropy",
  value: Float[Array, "B S N V"] | None = None,
  scale: float | Float[Array, ""] | None = None,
  is_causal: bool = False,
  key_mask: Bool[Array, "B S"] | None = None,
  query_mask: Bool[Array, "B T"] | None = None,
  window: Window = None,
  num_sinks: int = 0,
  num_heavy: int = 0,
  target: str = "softmax",
  held_out: Examples | None = None,
  on_check: OnCheck | None = None,
) -> tuple[FeatureVariables, FitReport]:
  """Fits a feature map, so that its attention weights are like the exact ones.

  Adam minimises the cross-entropy of the weights that the map implies, relative
  to the exact weights, at sampled queries; the learning rate falls to 0 like a
  cosine. All heads are fitted at once. Layers of equal shapes share the program
  of a step.

  Args:
    query: ``[B, T, N, H]``, unscaled as in `spectral_attention`; N may be G
      times the number of key heads. A key head's map is fitted to all G.
    key: ``[B, S, N, H]``.
    feature_map: a positive map with parameters and without statistics.
    variables: where the fit starts, as from `start_from_data`. Leaves lead with
      N, or with 1 for one map of all heads.
    rng: PRNG key.
    steps: number of steps; 0 measures the start.
    rows: number of queries that a step samples from each sequence.
    batch_size: number of sequences that a step samples.
    learning_rate: of the first step.
    loss: "cross_entropy", or "output" for the squared error of the outputs.
    value: ``[B, S, N, V]``, for ``loss="output"``.
    scale: of ``query . key``; None means ``1 / sqrt(H)``.
    is_causal: query i sees keys 0..i.
    key_mask: ``[B, S]`` bool: keys that may be seen. What is masked has no
      influence, NaN included.
    query_mask: ``[B, T]`` bool: queries that count.
    window: see `spectral_attention`, like the next two: for such keys attention
      is exact, and the map is fitted to what remains.
    num_sinks: number of first visible keys that are exact.
    num_heavy: number of heavy keys that are exact.
    target: kernel of the exact attention: "softmax" or "gaussian".
    held_out: other sequences, an `Inputs` of the study or an object with its
      attributes. The best parameters are those with the least loss on fixed
      rows of them. None: on fixed rows of the fitted sequences.
    on_check: called with the number of steps done after every 25th and the
      last.

  Returns:
    The best variables, and a report. They are those of the start if no step has
    improved on the start, or if uniform attention is better.

  Raises:
    ValueError: arrays do not agree, hidden sequences, held-out sequences among
      the fitted ones, exact keys that cannot be had, or a map that cannot be
      fitted.
    NonFiniteLossError: the loss is not finite, nor with a third and a ninth of
      the learning rate.

  References:
    Zhang et al. 2024, The Hedgehog & the Porcupine (2402.04347), equation 3 for
    the loss.

  Example:
    >>> import spectraformer_jax as sf
    >>> fm = sf.feature_map("prototypes", "none", num_features=8)
    >>> rng = jax.random.key(0)
    >>> v = fm.init(rng, head_dim=4, num_heads=2)
    >>> x = jax.random.normal(rng, (2, 16, 2, 4))
    >>> v = sf.linearize.start_from_data(rng, fm, v, x, x)
    >>> v, report = fit_feature_map(
    ...   x, x, feature_map=fm, variables=v, rng=rng, steps=50)
    >>> report.best_loss < report.start_loss < report.uniform
    True
  """
  check_int("steps", steps, 0)
  if not learning_rate > 0:
    raise ValueError(f"learning_rate must be positive, got {learning_rate!r}.")
  if steps:
    check_fits(feature_map)
  needs_value = loss == "output"
  if value is None:
    if needs_value:
      raise ValueError("loss='output' needs value, got None.")
    value = key
  examples = AttentionArrays(query, key, value, key_mask, query_mask)
  arrays = arrays_of(examples, needs_value=needs_value)
  variables = as_variables(variables)
  feature_map.check_inputs(variables, arrays.key)
  problem = make_problem(
    arrays,
    feature_map,
    loss=loss,
    target=target,
    is_causal=is_causal,
    window=window,
    num_sinks=num_sinks,
    num_heavy=num_heavy,
    rows=rows,
    batch_size=batch_size,
  )
  fitted = checked = make_sequences(problem, arrays, scale)
  if held_out is not None:
    others = arrays_of(held_out, needs_value=needs_value)
    check_disjoint(arrays, others)
    checked = make_sequences(problem, others, scale)
  return _fit(
    problem,
    fitted,
    checked,
    variables,
    rng,
    steps=steps,
    learning_rate=learning_rate,
    on_check=on_check or (lambda step: None),
  )


def _fit(
  problem: Problem,
  fitted: Sequences,
  checked: Sequences,
  variables: FeatureVariables,
  rng: Array,
  *,
  steps: int,
  learning_rate: float,
  on_check: OnCheck,
) -> tuple[FeatureVariables, FitReport]:
  """Fits with the first learning rate that keeps the loss finite."""
  begin = time.perf_counter()
  row_rng, step_rng = jax.random.split(rng)
  count = min(problem.rows, checked.query.shape[2])
  rows = draw_rows(row_rng, checked.query_mask, count)
  params, projection = variables

  def measure(params: Params) -> tuple[float, float]:
    loss, uniform = _check(problem, params, projection, checked, rows)
    return float(loss), float(uniform)

  start_loss, uniform = measure(params)
  start = _Course([], [0], [start_loss], params)
  step = functools.partial(_step, problem, projection, fitted, step_rng)

  def descend(rate: float) -> _Course:
    return _descend(step, measure, start, _rates(rate, steps), on_check)

  course, rate = start, learning_rate
  for rate in (learning_rate * factor for factor in TRIES):
    course = descend(rate)
    if course.is_finite:
      break
  if not course.is_finite:
    is_lost = ~np.isfinite([*course.losses, np.nan])
    raise NonFiniteLossError(
      f"the loss is not finite at step {np.argmax(is_lost)} with learning_rate="
      f"{rate:.3g}, nor with larger ones up to {learning_rate:.3g}: pass a "
      "smaller one."
    )
  best = int(np.argmin(course.held_out))
  if not course.held_out[best] < uniform:
    best = 0
  report = FitReport(
    losses=np.array(course.losses, np.float32),
    checked_steps=np.array(course.checked_steps, np.int32),
    held_out=np.array(course.held_out, np.float32),
    uniform=uniform,
    best_step=course.checked_steps[best],
    learning_rate=rate,
    seconds=time.perf_counter() - begin,
  )
  found = course.best if report.best_step else params
  return FeatureVariables(found, projection), report


def _descend(
  step: Callable[..., tuple[_State, Array]],
  measure: Callable[[Params], tuple[float, float]],
  course: _Course,
  rates: np.ndarray,
  on_check: OnCheck,
) -> _Course:
  """Takes all steps, or those up to the first loss that is not finite.

  Args:
    step: function of state, number of the step and learning rate.
    measure: function of parameters; the held-out loss is its first result.
    course: of no step, with the parameters of the start.
    rates: learning rate of each step.
    on_check: see `fit_feature_map`.
  """
  state = _State(course.best, _optimizer().init(course.best))
  while course.is_finite and len(course.losses) < len(rates):
    done = len(course.losses)
    losses = []
    for number in range(done, min(done + CHECK_EVERY, len(rates))):
      state, loss = step(state, number, rates[number])
      losses.append(loss)
    held_out = measure(state.params)[0]
    is_best = held_out < min(course.held_out)
    course = _Course(
      [*course.losses, *map(float, losses)],
      [*course.checked_steps, done + len(losses)],
      [*course.held_out, held_out],
      state.params if is_best else course.best,
    )
    on_check(done + len(losses))
  return course


def _rates(learning_rate: float, steps: int) -> np.ndarray:
  """Returns the learning rate of each step: half a cosine, down to 0."""
  progress = np.arange(steps) / max(steps, 1)
  rates = 0.5 * learning_rate * (1.0 + np.cos(np.pi * progress))
  return rates.astype(np.float32)


@functools.cache
def _optimizer() -> Any:
  """Returns Adam with clipping and a learning rate of -1."""
  import optax  # only who fits needs it

  return optax.chain(optax.clip_by_global_norm(CLIP), optax.scale_by_adam())


@functools.partial(jax.jit, static_argnums=0)
def _step(
  problem: Problem,
  projection: Projection,
  fitted: Sequences,
  rng: Array,
  state: _State,
  number: Array,
  rate: Array,
) -> tuple[_State, Array]:
  """Takes one step; returns the state after it, and the loss before it.

  All arrays are arguments, so that every layer of these shapes uses the same
  compiled program.
  """
  example_rng, row_rng = jax.random.split(jax.random.fold_in(rng, number))
  chosen = jax.random.choice(
    example_rng, len(fitted.query), (problem.batch_size,), replace=False
  )
  batch = jax.tree.map(lambda leaf: leaf[chosen], fitted)
  rows = draw_rows(row_rng, batch.query_mask, problem.rows)

  def loss_of(params: Params) -> Array:
    variables = FeatureVariables(params, projection)
    return mean_loss(problem, variables, batch, rows)[0]

  loss, gradient = jax.value_and_grad(loss_of)(state.params)
  direction, optimizer = _optimizer().update(gradient, state.optimizer)
  params = jax.tree.map(
    lambda leaf, of_leaf: leaf - rate * of_leaf, state.params, direction
  )
  return _State(params, optimizer), loss


@functools.partial(jax.jit, static_argnums=0)
def _check(
  problem: Problem,
  params: Params,
  projection: Projection,
  checked: Sequences,
  rows: Array,
) -> tuple[Array, Array]:
  """Returns the mean loss of sequences at fixed rows, and that of uniform."""
  variables = FeatureVariables(params, projection)

  def of_sequence(arguments: tuple[Sequences, Array]) -> tuple[Array, Array]:
    batch, rows = jax.tree.map(lambda leaf: leaf[None], arguments)
    return mean_loss(problem, variables, batch, rows)

  losses = jax.lax.map(of_sequence, (checked, rows))
  return jax.tree.map(jnp.mean, losses)
