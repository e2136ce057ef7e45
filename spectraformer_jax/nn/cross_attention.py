"""Multi-head attention of one sequence to another."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from spectraformer_jax.attention import spectral_attention, statistics_of_keys
from spectraformer_jax.decoding import attend_state
from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.kernels import KERNELS, exact_attention
from spectraformer_jax.nn.attention import check_attention
from spectraformer_jax.nn.feature_variables import (
  feature_variables,
  running_stats,
)
from spectraformer_jax.nn.inputs import check_flags, check_rows, without_padding
from spectraformer_jax.nn.projections import projection
from spectraformer_jax.typing import Array


class SpectralCrossAttention(nn.Module):
  """Multi-head attention to a memory, linear in both lengths.

  Each position of x sees all of the memory, and no position of x sees another:
  data-dependent parameters of the feature map are of the memory alone
  (statistics="ema": of earlier batches).

  Attributes:
    attention: "spectral", or an exact kernel, "softmax" or "gaussian".
    num_heads, head_dim, feature_map, share_projection, num_key_value_heads,
      dtype, param_dtype: see `SpectralSelfAttention`.

  Example:
    >>> import jax, spectraformer_jax as sf
    >>> layer = sf.nn.SpectralCrossAttention(
    ...   num_heads=2, head_dim=8, feature_map=sf.feature_map(
    ...     "oprf", "orf", num_features=16))
    >>> x, memory = jnp.ones((1, 5, 16)), jnp.ones((1, 9, 24))
    >>> variables = layer.init(jax.random.key(0), x, memory)
    >>> layer.apply(variables, x, memory).shape
    (1, 5, 16)
  """

  num_heads: int
  head_dim: int
  feature_map: FeatureMap | None = None
  attention: str = "spectral"
  share_projection: bool = False
  num_key_value_heads: int | None = None
  dtype: Any = None
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: Array,
    memory: Array | None,
    mask: Array | None = None,
    memory_mask: Array | None = None,
    *,
    decode: bool = False,
    deterministic: bool = True,
  ) -> Array:
    """Attends.

    Args:
      x: ``[B, T, D]``.
      memory: ``[B, S, E]``; None with `decode`: that of the call before.
      mask: ``[B, T]`` bool, True at real positions of x; None for all.
      memory_mask: ``[B, S]`` bool, likewise. What padding holds, NaN included,
        reaches neither outputs at real positions nor any gradient.
      decode: keep the sum over the memory in the collection "cache", in a size
        that does not depend on S: later calls leave `memory` out.
      deterministic: False in training: updates running statistics.

    Returns:
      ``[B, T, D]``.

    Raises:
      ValueError: what `SpectralSelfAttention` refuses, a baseline or a
        component that counts positions (those of two sequences have nothing to
        do with each other), batches that differ, `decode` with exact
        attention, or no memory and no call before.
    """
    check_flags(decode=decode, deterministic=deterministic)
    self._check(x, memory, decode)
    mask, _ = check_rows(x, mask, None)
    x = without_padding(x, mask)
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    query = projection((self.num_heads, self.head_dim), name="query", **dtypes)(
      x
    )
    output = projection(x.shape[-1], axis=(-2, -1), name="out", **dtypes)
    if memory is None:
      return output(self._remembered(query))
    memory_mask, _ = check_rows(memory, memory_mask, None, "memory")
    memory = without_padding(memory, memory_mask)
    key_heads = self.num_key_value_heads or self.num_heads
    key, value = (
      projection((key_heads, self.head_dim), name=name, **dtypes)(memory)
      for name in ("key", "value")
    )
    if self.attention != "spectral":
      out = exact_attention(
        query, key, value, kernel=self.attention, key_mask=memory_mask
      )
      return output(out)
    variables = self._variables()
    stats = running_stats(
      self,
      self.feature_map,
      variables,
      query,
      key,
      query_mask=mask,
      key_mask=memory_mask,
      deterministic=deterministic,
    )
    # Said here, since later calls, which have no keys, need them as well.
    stats = statistics_of_keys(
      self.feature_map,
      variables,
      stats,
      key,
      memory_mask,
      float(self.head_dim) ** -0.25,
    )
    out, state = spectral_attention(
      query,
      key,
      value,
      feature_map=self.feature_map,
      variables=variables,
      stats=stats,
      key_mask=memory_mask,
      return_state=True,
    )
    if decode and not self.is_initializing():  # `init` makes an empty cache
      self.put_variable("cache", "memory", {"state": state, "stats": stats})
    return output(out)

  def _remembered(self, query: Array) -> Array:
    """Attention to the memory of an earlier call, whose keys are summed."""
    kept = self.get_variable("cache", "memory")
    if kept is None:
      raise ValueError(
        "memory=None and no memory in the cache: the first call of a sequence "
        "needs the memory, with decode=True and mutable=['cache']."
      )
    return attend_state(
      kept["state"],
      query,
      feature_map=self.feature_map,
      variables=self._variables(),
      stats=kept["stats"],
    )

  def _variables(self):
    """Of the feature map."""
    heads = self.num_key_value_heads or self.num_heads
    return feature_variables(
      self,
      self.feature_map,
      head_dim=self.head_dim,
      num_heads=1 if self.share_projection else heads,
    )

  def _check(self, x, memory, decode):
    """ValueError for arguments and options that do not go together."""
    if self.attention not in ("spectral", *KERNELS):
      raise ValueError(
        f"attention={self.attention!r} is of one sequence: attention to a "
        "memory is 'spectral', 'softmax' or 'gaussian'."
      )
    check_attention(self)
    info = self.feature_map and self.feature_map.component.info
    if info and (info.positional or not info.causal_safe):
      raise ValueError(
        f"component {info.name!r} depends on the positions of tokens or on "
        "other tokens, so it cannot attend to a memory."
      )
    if decode and not info:
      raise ValueError(
        f"decode=True with attention={self.attention!r}: only spectral "
        "attention has a state."
      )
    if memory is None and not decode:
      raise ValueError("memory=None needs decode=True.")
    if memory is not None and memory.shape[0] != x.shape[0]:
      raise ValueError(
        f"x and memory must share batch, got x.shape={x.shape}, "
        f"memory.shape={memory.shape}."
      )
