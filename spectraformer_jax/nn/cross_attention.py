"""Multi-head attention of one sequence to another."""

import flax.linen as nn

from spectraformer_jax.attention import spectral_attention, statistics_of_keys
from spectraformer_jax.decoding import attend_state
from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.kernels import EXACT_KERNELS, exact_attention
from spectraformer_jax.nn.attention_base import MultiHeadAttention
from spectraformer_jax.nn.inputs import check_flags, check_rows, without_padding
from spectraformer_jax.typing import Array, PyTree


class SpectralCrossAttention(MultiHeadAttention):
  """Multi-head attention to another sequence, the memory.

  The cost is linear in both lengths. Each position of x sees the whole memory,
  and no position of x sees another. So data-dependent parameters of the feature
  map are computed from the memory alone or, with statistics="ema", from earlier
  batches. There is no window: positions of two sequences are unrelated.

  Attributes:
    attention: "spectral" or an exact kernel (a name of `kernels.EXACT_KERNELS`,
      "softmax" or another).
    num_heads, head_dim, feature_map, share_projection, num_key_value_heads,
      dtype, param_dtype: see `SpectralSelfAttention`.

  Example:
    >>> import jax, jax.numpy as jnp, spectraformer_jax as sf
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
      memory: ``[B, S, E]``; None, with `decode`, means the memory of an earlier
        call.
      mask: ``[B, T]`` bool, True at real positions of x; None for all.
      memory_mask: ``[B, S]`` bool, True at real positions of the memory; None
        for all. The content of padding, NaN included, reaches neither outputs
        at real positions nor any gradient.
      decode: keep the sum over the memory in the collection "cache", so that
        later calls need no `memory`. Its size does not depend on S.
      deterministic: False in training: updates running statistics.

    Returns:
      ``[B, T, D]``.

    Raises:
      ValueError: an error of `SpectralSelfAttention`; a baseline; a component
        that counts positions (positions of two sequences are unrelated); x
        and memory of different batch sizes; `decode` with exact attention; no
        memory, neither in the arguments nor in the cache.
    """
    check_flags(decode=decode, deterministic=deterministic)
    self._check(x, memory, decode)
    mask, _ = check_rows(x, mask, None)
    x = without_padding(x, mask)
    query = self._project("query", x)
    if memory is None:
      out = self._attend_cached(query)
    else:
      memory_mask, _ = check_rows(memory, memory_mask, None, "memory")
      memory = without_padding(memory, memory_mask)
      key = self._project("key", memory)
      value = self._project("value", memory)
      if self.attention == "spectral":
        out, cache = self._spectral(
          query, key, value, mask, memory_mask, deterministic
        )
        if decode and not self.is_initializing():  # `init` makes an empty cache
          self.put_variable("cache", "memory", cache)
      else:
        out = exact_attention(
          query, key, value, kernel=self.attention, key_mask=memory_mask
        )
    return self._dense(x.shape[-1], axis=(-2, -1), name="out")(out)

  def _spectral(
    self,
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    memory_mask: Array | None,
    deterministic: bool,
  ) -> tuple[Array, dict[str, PyTree]]:
    """Returns the output, and what later calls need instead of the memory."""
    feature_map, variables = self._feature_map()
    stats = self._running_stats(
      variables, query, key, mask, memory_mask, deterministic
    )
    stats = statistics_of_keys(
      feature_map, variables, stats, key, memory_mask, self._sqrt_scale
    )
    out, state = spectral_attention(
      query,
      key,
      value,
      feature_map=feature_map,
      variables=variables,
      stats=stats,
      key_mask=memory_mask,
      return_state=True,
    )
    return out, {"state": state, "stats": stats}

  def _attend_cached(self, query: Array) -> Array:
    """Attends to the memory of an earlier call, whose state is in the cache."""
    cache = self.get_variable("cache", "memory")
    if cache is None:
      raise ValueError(
        "memory=None and no memory in the cache: the first call of a sequence "
        "needs the memory, with decode=True and mutable=['cache']."
      )
    feature_map, variables = self._feature_map()
    return attend_state(
      query=query, feature_map=feature_map, variables=variables, **cache
    )

  def _check(self, x: Array, memory: Array | None, decode: bool) -> None:
    """Raises ValueError for arguments and options that exclude each other."""
    if self.attention not in ("spectral", *EXACT_KERNELS):
      raise ValueError(
        f"attention={self.attention!r} cannot attend to a memory; use "
        "'spectral' or an exact kernel, such as 'softmax'."
      )
    self._check_fields()
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
