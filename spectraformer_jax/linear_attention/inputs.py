"""The arguments of every implementation: feature maps, a state, and arrays."""

from collections.abc import Callable
from typing import NamedTuple

from spectraformer_jax.linear_attention.state import State
from spectraformer_jax.typing import Array, LogFeatures, PyTree


class PlainFeatures(NamedTuple):
  """Features that are given as they are, without a logarithm.

  Attributes:
    factor: the features, ``[..., F]``.
    log_magnitude: None.
  """

  factor: Array
  log_magnitude: None = None


Features = LogFeatures | PlainFeatures

# (constants, x [B, N, C, H], position of the first token) -> features
# [B, N, C, F].
FeatureFn = Callable[[PyTree, Array, Array], Features]


class Maps(NamedTuple):
  """The feature maps of queries and keys; static."""

  query: FeatureFn
  key: FeatureFn


# Key, value and key mask, see `Inputs`.
KeyArrays = tuple[Array, Array, Array | None]


class Inputs(NamedTuple):
  """The arrays of one call.

  Attributes:
    query: ``[B, T, N, G, H]``: groups of G queries share a key head.
    key: ``[B, S, N, H]``.
    value: ``[B, S, N, V]``.
    key_mask: ``[B, S]`` bool, True for visible keys; None: all are visible.
    segment_ids: ids of the segments of packed rows, for queries ``[B, T]`` and
      keys ``[B, S]``; None: each row is one segment.
  """

  query: Array
  key: Array
  value: Array
  key_mask: Array | None
  segment_ids: tuple[Array, Array] | None

  @property
  def keys(self) -> KeyArrays:
    """The arrays of keys."""
    return self.key, self.value, self.key_mask


class Call(NamedTuple):
  """The arguments of one call, which every implementation takes.

  Attributes:
    maps: the feature maps.
    chunk_size: positions in a chunk or block; None: the fastest sizes.
    constants: variables of the maps.
    state: sums over the keys that came before; empty if there are segments.
    inputs: the arrays; their shapes agree.
    is_causal: whether query i sees keys 0..i only.
  """

  maps: Maps
  chunk_size: int | None
  constants: PyTree
  state: State
  inputs: Inputs
  is_causal: bool
