"""Base of self- and cross-attention: dense layers, feature map's variables."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from spectraformer_jax.baselines import BASELINES
from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.feature_maps.vmap_heads import queries_by_key_head
from spectraformer_jax.kernels import EXACT_KERNELS
from spectraformer_jax.nn.config import ConfiguredModule
from spectraformer_jax.nn.projections import projection
from spectraformer_jax.registry import check_choice
from spectraformer_jax.typing import Array, FeatureVariables, PyTree

ATTENTIONS = ("spectral", *EXACT_KERNELS, *BASELINES)

# At each training step, running statistics move by 1 - _STATS_DECAY of the way
# to those of the batch.
_STATS_DECAY = 0.99


class MultiHeadAttention(ConfiguredModule, kw_only=True):
  """Base of `SpectralSelfAttention` and `SpectralCrossAttention`.

  Both call the methods of this class from their compact `__call__`.
  """

  num_heads: int
  head_dim: int
  feature_map: FeatureMap | None = None
  attention: str = "spectral"
  share_projection: bool = False
  num_key_value_heads: int | None = None
  dtype: Any = None
  param_dtype: Any = jnp.float32

  def _check_fields(self) -> None:
    """Raises ValueError unless attention, feature map and heads fit."""
    check_choice("attention", self.attention, ATTENTIONS)
    if (self.attention == "spectral") != (self.feature_map is not None):
      raise ValueError(
        f"attention={self.attention!r} with feature_map="
        f"{self.feature_map and self.feature_map.info.name!r}: 'spectral' "
        "needs a feature map; exact kernels and baselines take none."
      )
    heads = self.num_key_value_heads
    if heads is not None and (heads < 1 or self.num_heads % heads):
      raise ValueError(
        f"num_key_value_heads={heads} must divide num_heads={self.num_heads}."
      )

  @property
  def _sqrt_scale(self) -> float:
    """The factor of queries and of keys: their product gets 1 / sqrt(H)."""
    return float(self.head_dim) ** -0.25

  def _project(self, name: str, x: Array) -> Array:
    """Maps ``[B, T, D]`` to "query", "key" or "value" ``[B, T, N, H]``."""
    num_heads = self.num_heads
    if name != "query":
      num_heads = self.num_key_value_heads or num_heads
    return self._dense((num_heads, self.head_dim), name=name)(x)

  def _dense(self, features: int | tuple[int, ...], **kwargs: Any) -> nn.Module:
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    return projection(features, **dtypes, **kwargs)

  def _feature_map(self) -> tuple[FeatureMap, FeatureVariables]:
    """Returns the feature map and its variables.

    Learnable leaves are the parameter "feature_map"; random ones are the
    variable "projection" of the collection "random_features".

    Raises:
      ValueError: the collection "random_features" is missing and not mutable.
    """
    feature_map = self.feature_map
    assert feature_map is not None  # by `_check_fields`
    num_heads = self.num_key_value_heads or self.num_heads
    sizes = {
      "head_dim": self.head_dim,
      "num_heads": 1 if self.share_projection else num_heads,
    }
    collection = "random_features"
    if not (
      self.has_variable(collection, "projection")
      or self.is_mutable_collection(collection)
    ):
      raise ValueError(
        f"collection {collection!r} is missing: apply needs it beside "
        "'params', and nn.scan and nn.vmap need it in variable_axes="
        f"{{'params': 0, {collection!r}: 0}}."
      )
    projection = self.variable(
      collection,
      "projection",
      lambda: feature_map.init_projection(self.make_rng("features"), **sizes),
    )
    params = {}
    if feature_map.has_params:
      params = self.param(
        "feature_map", lambda rng: feature_map.init_params(rng, **sizes)
      )
    return feature_map, FeatureVariables(params, projection.value)

  def _running_stats(
    self,
    variables: FeatureVariables,
    query: Array,
    key: Array,
    query_mask: Array | None,
    key_mask: Array | None,
    deterministic: bool,
  ) -> PyTree:
    """Returns the running statistics from before this call, and updates them.

    The batch of this call enters only the statistics of later calls, so that no
    position is influenced by later positions.

    Args:
      variables: of the feature map.
      query: ``[B, T, N G, H]``, not scaled.
      key: ``[B, S, N, H]``, not scaled.
      query_mask: ``[B, T]`` bool, True where a query counts; None for all.
      key_mask: ``[B, S]`` bool, True where a key counts; None for all.
      deterministic: False in training: updates the statistics.

    Returns:
      `stats` for `spectral_attention`; None unless the component has
      statistics="ema".
    """
    feature_map = self.feature_map
    assert feature_map is not None  # by `_check_fields`
    if getattr(feature_map.component, "statistics", None) != "ema":
      return None
    num_heads, head_dim = key.shape[2:]

    # Initial moments, before any batch is seen.
    def moments_of_normal_inputs() -> PyTree:
      shape = (1, 1024, num_heads, head_dim)
      x, y = jax.random.normal(jax.random.key(0), (2, *shape))
      return feature_map.moments(
        variables, x * self._sqrt_scale, y * self._sqrt_scale
      )

    running = self.variable(
      "feature_stats", "moments", moments_of_normal_inputs
    )
    stats = feature_map.solve(running.value)
    if not deterministic and not self.is_initializing():
      query, query_mask = queries_by_key_head(query, query_mask, num_heads)
      of_batch, has_tokens = feature_map.mean_moments(
        variables,
        query.astype(jnp.float32) * self._sqrt_scale,
        key.astype(jnp.float32) * self._sqrt_scale,
        key_mask=key_mask,
        query_mask=query_mask,
      )
      # A batch without visible tokens changes nothing.
      rate = jnp.where(has_tokens, 1.0 - _STATS_DECAY, 0.0)
      running.value = jax.tree.map(
        lambda old, new: (1.0 - rate) * old + rate * new,
        running.value,
        of_batch,
      )
    return stats
