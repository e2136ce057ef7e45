"""Axis letters, array aliases, and records that several modules use.

Axis letters, the same in every docstring and shape string of the package:

====== =============================== ====== ==================================
letter meaning                         letter meaning
====== =============================== ====== ==================================
``B``  batch                           ``V``  value dim
``T``  query length                    ``M``  num_features: rows of W
``S``  key and value length            ``F``  feature dim: M, 2M, ...
``N``  heads                           ``C``  chunk size
``H``  head dim
====== =============================== ====== ==================================

Arrays of attention are laid out as in ``jax.nn.dot_product_attention``:
query ``[B, T, N, H]``, key ``[B, S, N, H]``, value ``[B, S, N, V]``.
Grouped queries have G heads for each key head; shape strings call them ``NG``.
A PRNG key is called ``rng``; ``key`` is always attention's key.
"""

from typing import Any, Literal, NamedTuple

import jax

Array = jax.Array
PyTree = Any
Params = dict[str, Any]
Projection = dict[str, Any]
Side = Literal["query", "key"]
# Bool, True at positions that count; None where all do.
Mask = Array | None
# Ints [B, T], or a pair ([B, T], [B, S]).
SegmentIds = Array | tuple[Array, Array]


class WeightSample(NamedTuple):
  """The rows of one weight matrix W and their weights.

  A mean over rows is ``sum_m sign_m exp(log_weight_m) g(w_m) / M``.

  Attributes:
    w: rows, ``[M, H]`` float32.
    log_weight: ``[M]`` float32, or None for equal weights (all zero).
    sign: ``[M]`` of +1 and -1, or None for all +1.
  """

  w: Array
  log_weight: Array | None = None
  sign: Array | None = None


class FeatureVariables(NamedTuple):
  """The variables of a feature map; leaves have a leading head axis (N or 1).

  Attributes:
    params: learnable leaves; ``{}`` if nothing is learnt.
    projection: random leaves: not learnt, may be redrawn, saved with the model.
  """

  params: Params
  projection: Projection


class LogFeatures(NamedTuple):
  """Features as ``factor * exp(log_magnitude)``.

  Attributes:
    log_magnitude: ``[..., F]``, or ``[..., 1]`` if all features share it.
    factor: bounded factor ``[..., F]`` (a cosine, a sign), or None for 1.
  """

  log_magnitude: Array
  factor: Array | None = None


class ComponentState(NamedTuple):
  """The inputs of a component other than x and the rows, for one head.

  Attributes:
    params: learnable leaves from `Component.init`.
    random: drawn leaves from `Component.draw` (a second projection, phases).
    stats: data-dependent parameters from `Component.solve`, or ``()``.
    position: position of x's first token in its sequence; None means 0.
  """

  params: Params
  random: Projection
  stats: PyTree
  position: Array | int | None = None
