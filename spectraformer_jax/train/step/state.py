"""The training state, a plain pytree, and its initial values."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spectraformer_jax import nn
from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.nn.from_config import Model, example_inputs
from spectraformer_jax.seeds import make_key
from spectraformer_jax.typing import Array, PyTree

# The only collection, apart from the parameters, that training steps update.
MUTABLE_COLLECTION = "feature_stats"


class TrainState(NamedTuple):
  """Everything that a training step changes.

  Attributes:
    step: int32 scalar, the number of steps made.
    params: learnable leaves.
    collections: the model's other variables by name: "random_features" (the
      projections) and, in some models, "feature_stats" (running statistics).
    opt_state: state of the optimiser.
    ema: moving average of the params, used in evaluation; None if the run keeps
      none.
  """

  step: Array
  params: PyTree
  collections: dict[str, PyTree]
  opt_state: PyTree
  ema: PyTree = None

  @property
  def variables(self) -> dict[str, PyTree]:
    """The variables that the model is evaluated with."""
    params = self.params if self.ema is None else self.ema
    return {"params": params, **self.collections}


class RunKeys(NamedTuple):
  """The PRNG keys of a run, derived from its seed and therefore not saved.

  Attributes:
    params_rng: initial parameters.
    features_rng: initial projections.
    dropout_rng: folded with the step and the replica's index in `train_step`.
    redraw_rng: folded with the number of the redraw, not with the replica.
  """

  params_rng: Array
  features_rng: Array
  dropout_rng: Array
  redraw_rng: Array


def run_keys(seed: int) -> RunKeys:
  """Derives the keys of a run from its seed, below 2**64.

  Example:
    >>> run_keys(0).dropout_rng.shape
    ()
  """
  return RunKeys(*jax.random.split(make_key(seed), 4))


def create(
  model: Model,
  feature_map: FeatureMap | None,
  tx: optax.GradientTransformation,
  keys: RunKeys,
  *,
  ema: bool = False,
) -> TrainState:
  """Makes the state before the first step.

  Args:
    model: of `nn.from_config.make_model`.
    feature_map: that of the model; None for a baseline attention.
    tx: the optimiser.
    keys: of the run.
    ema: whether to keep a moving average of the parameters.
  """
  variables = dict(_init(model, feature_map, keys, example_inputs(model)))
  params = variables.pop("params")
  opt_state = jax.jit(tx.init)(params)
  return TrainState(
    jnp.zeros((), jnp.int32),
    params,
    variables,
    opt_state,
    # A copy: a step may reuse the buffers of its state, so none may be in it
    # twice.
    jax.tree.map(jnp.copy, params) if ema else None,
  )


def _init(
  model: Model,
  feature_map: FeatureMap | None,
  keys: RunKeys,
  inputs: tuple[Array, ...],
) -> Mapping[str, PyTree]:
  """Initialises the model's variables, in a compiled program if possible."""
  rngs = {"params": keys.params_rng, "features": keys.features_rng}
  if feature_map is None:
    return jax.jit(model.init)(rngs, *inputs)
  if not feature_map.weight_matrix.info.redrawable:
    return model.init(rngs, *inputs)  # the matrix cannot be drawn inside jit
  # One batched QR factorisation draws the projections of all layers. Several in
  # one program, as in `model.init`, can deadlock on few cores.
  shapes = jax.eval_shape(model.init, rngs, *inputs)
  empty = jax.tree.map(
    lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes["random_features"]
  )
  draw = jax.jit(nn.redraw, static_argnums=0)
  drawn = {"random_features": draw(feature_map, keys.features_rng, empty)}
  others = [name for name in shapes if name not in drawn]
  fill = functools.partial(model.apply, mutable=others)
  _, rest = jax.jit(fill)(drawn, *inputs, rngs={"params": keys.params_rng})
  return {**drawn, **rest}


def count(tree: PyTree) -> int:
  """Counts the scalars in a tree.

  Example:
    >>> count({"w": jnp.ones((2, 3)), "b": jnp.ones(3)})
    9
  """
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def sizes(state: TrainState) -> dict[str, Any]:
  """Counts the learnable scalars and those of the random projections."""
  return {
    "parameters": count(state.params),
    "projection_size": count(state.collections.get("random_features", {})),
  }
