"""Learnt features of one layer: softmax of rows, and rectified rows."""

import dataclasses

import jax
import jax.numpy as jnp
from typing_extensions import override

from spectraformer_jax.components import base
from spectraformer_jax.components.learnt import Learnt, start_rows
from spectraformer_jax.typing import (
  Array,
  ComponentState,
  LogFeatures,
  Params,
  Side,
  WeightSample,
)

# What T2R adds to each feature, so that no normalizer is zero.
T2R_EPSILON = 1e-6


@base.COMPONENTS.register("hedgehog")
@dataclasses.dataclass(frozen=True)
class Hedgehog(Learnt):
  r"""Hedgehog: softmax over learnt rows, and over their negatives.

  .. math::
    f_q(x) = [\mathrm{softmax}_m(w_m \cdot x), \mathrm{softmax}_m(-w_m \cdot x)]

  and the same of keys with rows :math:`v_m`. Each half of the features adds up
  to 1, so the kernel is between 0 and 2. It has no rows of W: weight matrix
  "none" with num_features=M, which gives 2M features.

  References:
    Zhang et al., The Hedgehog & the Porcupine, 2024, section 4 (2402.04347);
    public code also has one softmax over both halves.

  Example:
    >>> import jax, jax.numpy as jnp, spectraformer_jax as sf
    >>> fm = sf.feature_map("hedgehog", "none", num_features=16)
    >>> v = fm.init(jax.random.key(0), head_dim=4)
    >>> phi = fm.apply(v, jnp.ones((1, 1, 4)), side="key")[0, 0]
    >>> phi.shape, round(float(phi.sum()), 5)
    ((32,), 2.0)
  """

  features_per_row = 2
  info = base.ComponentInfo(
    name="hedgehog",
    family="learnt",
    estimates="its own kernel, learnt",
    formula="[softmax(w.x), softmax(-w.x)]",
    positive=True,
    features="2M",
    cost="2M exponentials",
    good_for="comparison with published conversions",
    avoid="few features: prototypes has less error with as many",
    source="2402.04347, section 4",
    row_law="none",
    learnable=True,
  )

  @override
  def init(self, rng: Array, head_dim: int, num_features: int) -> Params:
    rows = start_rows(rng, num_features, head_dim)
    return {"query_rows": rows, "key_rows": 1.0 * rows}

  @override
  def log_features(
    self, x: Array, rows: WeightSample, side: Side, state: ComponentState
  ) -> LogFeatures:
    scores = base.project(x, state.params[f"{side}_rows"])
    halves = [jax.nn.log_softmax(s, axis=-1) for s in (scores, -scores)]
    return LogFeatures(jnp.concatenate(halves, axis=-1))


@base.COMPONENTS.register("t2r")
@dataclasses.dataclass(frozen=True)
class T2R(Learnt):
  r"""T2R, Transformer to RNN: a learnt linear layer and a rectifier.

  .. math::
    f_q(x)_m = \mathrm{relu}(w_m \cdot x + b_m) + \epsilon, \qquad
    f_k(y)_m = \mathrm{relu}(v_m \cdot y + c_m) + \epsilon

  with :math:`\epsilon = 10^{-6}`, which the paper does not have: it keeps the
  normalizer positive where all products are zero. It has no rows of W: weight
  matrix "none" with num_features=M.

  References:
    Kasai et al., Finetuning Pretrained Transformers into RNNs, 2021, section 2
    (2103.13076).

  Example:
    >>> import jax, jax.numpy as jnp, spectraformer_jax as sf
    >>> fm = sf.feature_map("t2r", "none", num_features=16)
    >>> v = fm.init(jax.random.key(0), head_dim=4)
    >>> fm.apply(v, jnp.ones((3, 1, 4)), side="key").shape
    (3, 1, 16)
  """

  info = base.ComponentInfo(
    name="t2r",
    family="learnt",
    estimates="its own kernel, learnt",
    formula="relu(w.x + b) + 1e-6",
    positive=True,
    cost="M comparisons",
    good_for="trained or fitted attention without exponentials",
    avoid="sharp attention: prototypes has less error with as many features",
    source="2103.13076, section 2",
    row_law="none",
    learnable=True,
  )

  @override
  def init(self, rng: Array, head_dim: int, num_features: int) -> Params:
    rows = start_rows(rng, num_features, head_dim)
    zeros = jnp.zeros((num_features,), jnp.float32)
    return {
      "query_rows": rows,
      "query_bias": zeros,
      "key_rows": 1.0 * rows,
      "key_bias": 1.0 * zeros,
    }

  @override
  def log_features(
    self, x: Array, rows: WeightSample, side: Side, state: ComponentState
  ) -> LogFeatures:
    projected = base.project(x, state.params[f"{side}_rows"])
    shifted = projected + state.params[f"{side}_bias"][None]
    return base.to_log_features(jax.nn.relu(shifted) + T2R_EPSILON)
