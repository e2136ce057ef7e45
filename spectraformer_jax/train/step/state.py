"""The training state, a plain pytree, and where its first values come from."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen
import jax
import jax.numpy as jnp
import optax

from spectraformer_jax import nn
from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.nn.from_config import example_inputs
from spectraformer_jax.seeds import make_key
from spectraformer_jax.typing import Array, PyTree

# The one non-learnable collection that training itself updates.
MUTABLE_COLLECTION = "feature_stats"


class TrainState(NamedTuple):
  """All that changes while training.

  Attributes:
    step: int32 scalar, the number of updates made.
    params: learnable leaves.
    collections: the model's other variables by name: "random_features" (the
      projections), perhaps "feature_stats".
    opt_state: of the optimiser.
    ema: the moving average of the params, with which the model is evaluated;
      None where there is none.
  """

  step: Array
  params: PyTree
  collections: dict[str, PyTree]
  opt_state: PyTree
  ema: PyTree = None

  @property
  def variables(self) -> dict[str, PyTree]:
    """What the model is evaluated with."""
    params = self.params if self.ema is None else self.ema
    return {"params": params, **self.collections}


class RunKeys(NamedTuple):
  """The PRNG keys of a run; all follow from the seed, so none is saved.

  Attributes:
    params_rng: initial parameters.
    features_rng: initial projections.
    dropout_rng: folded with the step and the replica's index in `train_step`.
    redraw_rng: folded with the number of the redraw; never with a replica.
  """

  params_rng: Array
  features_rng: Array
  dropout_rng: Array
  redraw_rng: Array


def run_keys(seed: int) -> RunKeys:
  """The keys of the run with this seed, below 2**64.

  Example:
    >>> run_keys(0).dropout_rng.shape
    ()
  """
  return RunKeys(*jax.random.split(make_key(seed), 4))


def create(
  model: flax.linen.Module,
  feature_map: FeatureMap | None,
  tx: optax.GradientTransformation,
  keys: RunKeys,
  *,
  ema: bool = False,
) -> TrainState:
  """The state before the first step.

  Args:
    model: of `nn.from_config.make_model`.
    feature_map: the one it was made with, if any.
    tx: the optimiser.
    keys: of the run.
    ema: whether the average of the parameters is kept as well.
  """
  variables = dict(_init(model, feature_map, keys, example_inputs(model)))
  params = variables.pop("params")
  opt_state = jax.jit(tx.init)(params)
  return TrainState(
    jnp.zeros((), jnp.int32),
    params,
    variables,
    opt_state,
    # Of its own, since a step may reuse the buffers of both.
    jax.tree.map(jnp.copy, params) if ema else None,
  )


def _init(model, feature_map, keys, inputs) -> Mapping[str, PyTree]:
  """The model's variables; compiled where that is possible, which is faster."""
  rngs = {"params": keys.params_rng, "features": keys.features_rng}
  if feature_map is None:
    return jax.jit(model.init)(rngs, *inputs)
  if not feature_map.weight_matrix.info.redrawable:
    return model.init(rngs, *inputs)  # cannot be drawn inside jit
  # The layers' projections are drawn together: several QR factorisations in
  # one program, as model.init would compile to, can deadlock on few cores.
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
  """The number of scalars in a tree.

  Example:
    >>> count({"w": jnp.ones((2, 3)), "b": jnp.ones(3)})
    9
  """
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def sizes(state: TrainState) -> dict[str, Any]:
  """Scalars that are learnt, and scalars of the random projections."""
  return {
    "parameters": count(state.params),
    "projection_size": count(state.collections.get("random_features", {})),
  }
