"""Time and memory of linear attention, beside JAX's exact attention."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spectraformer_jax.attention import spectral_attention
from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.hybrid_attention.exact_keys import ExactKeys
from spectraformer_jax.study.approximation.inputs import Inputs
from spectraformer_jax.typing import Array, FeatureVariables

# Calls of each function; they take turns, so that both meet the same load.
REPEATS = 9
# Lengths at which attention is timed, over the captured length.
FACTORS = (1, 4)


class Speed(NamedTuple):
  """Figures of one layer's attention to one sequence.

  Attributes:
    length: number of positions.
    ms: median time of a call of the converted attention.
    exact_ms: that of `jax.nn.dot_product_attention`.
    state: numbers of a head that further queries need: the sums over features,
      beside the keys and values that stay exact.
    cache: numbers of a head's keys and values.
  """

  length: int
  ms: float
  exact_ms: float
  state: int
  cache: int


def measure(
  inputs: Inputs,
  feature_map: FeatureMap,
  variables: FeatureVariables,
  exact: ExactKeys,
  *,
  is_causal: bool,
) -> list[Speed]:
  """Times attention to the first sequence, and to four copies of it in a row.

  Args:
    inputs: of one layer.
    feature_map: the map.
    variables: of the map.
    exact: keys that are exact.
    is_causal: query i sees keys 0..i.
  """
  attend = functools.partial(
    spectral_attention,
    feature_map=feature_map,
    is_causal=is_causal,
    **exact._asdict(),
  )
  linear = functools.partial(
    jax.jit(lambda maps, q, k, v: attend(q, k, v, variables=maps)), variables
  )
  softmax = jax.jit(
    functools.partial(jax.nn.dot_product_attention, is_causal=is_causal)
  )
  return [
    _measure(inputs, feature_map, exact, linear, softmax, factor)
    for factor in FACTORS
  ]


def num_features_of(feature_map: FeatureMap, head_dim: int) -> int:
  """Returns F, the number of features of a head."""
  component = feature_map.component
  features = component.feature_dim(feature_map.num_features or 0, head_dim)
  assert features is not None  # head_dim is known
  return features


def num_exact(exact: ExactKeys) -> int:
  """Returns the number of keys that a query sees exactly, far from the ends.

  Example:
    >>> num_exact(ExactKeys((63, 63), 0, 32))
    159
  """
  near = 0 if exact.window is None else exact.left + exact.right + 1
  return near + exact.num_sinks + exact.num_heavy


def break_even(feature_dim: int, exact: ExactKeys) -> int:
  """Returns the length from which linear attention needs fewer products.

  With H = V, a query costs ``4 S H`` multiplications and additions with exact
  attention to S keys, and ``8 F H`` with F features, beside ``4 H`` for each
  exact key; the exponentials are left out.

  Example:
    >>> break_even(128, ExactKeys((63, 63), num_heavy=32))
    415
  """
  return 2 * feature_dim + num_exact(exact)


def _measure(
  inputs: Inputs,
  feature_map: FeatureMap,
  exact: ExactKeys,
  linear: Callable[..., Array],
  softmax: Callable[..., Array],
  factor: int,
) -> Speed:
  """Times both functions at `factor` times the captured length."""
  arrays = [
    jnp.asarray(np.tile(x[:1], (1, factor, 1, 1)))
    for x in (inputs.query, inputs.key, inputs.value)
  ]
  times: dict[str, list[float]] = {"linear": [], "softmax": []}
  for number in range(REPEATS + 1):
    for name, function in (("linear", linear), ("softmax", softmax)):
      start = time.perf_counter()
      jax.block_until_ready(function(*arrays))
      if number:  # the first call compiles
        times[name].append(1e3 * (time.perf_counter() - start))
  length, head_dim = arrays[1].shape[1], arrays[1].shape[-1]
  value_dim = arrays[2].shape[-1]
  kept = min(num_exact(exact), length)
  features = num_features_of(feature_map, head_dim)
  return Speed(
    length,
    statistics.median(times["linear"]),
    statistics.median(times["softmax"]),
    features * (value_dim + 1) + kept * (head_dim + value_dim),
    length * (head_dim + value_dim),
  )
