"""Multi-head self-attention with a feature map, exact, or a baseline."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from spectraformer_jax.attention import init_state, spectral_attention
from spectraformer_jax.baselines import BASELINES, check_options
from spectraformer_jax.feature_maps import FeatureMap
from spectraformer_jax.kernels import KERNELS, exact_attention
from spectraformer_jax.nn.positions import next_positions, rotate
from spectraformer_jax.nn.projections import projection
from spectraformer_jax.registry import nearest
from spectraformer_jax.typing import Array, FeatureVariables, PyTree

ATTENTIONS = ("spectral", *KERNELS, *BASELINES)

# Running statistics keep this share of their value at each training step.
STATS_DECAY = 0.99


class SpectralSelfAttention(nn.Module):
  """Multi-head self-attention, linear in the length.

  Attributes:
    num_heads: N.
    head_dim: H.
    feature_map: for attention="spectral"; see `sf.feature_map`.
    attention: "spectral", or a baseline through the same module: an exact
      kernel, "softmax" or "gaussian", or one of `baselines.BASELINES`.
    attention_kwargs: options of a baseline, as of `baselines`.
    max_len: longest sequence, for baselines with parameters for each position;
      None takes the length at initialisation.
    is_causal: position i sees positions 0..i.
    rotary: queries and keys are turned by their positions before the feature
      map or kernel; see `rotate`.
    share_projection: one weight matrix for all heads instead of one each.
    dtype: of the dense layers; None takes that of the input.

  Example:
    >>> import spectraformer_jax as sf
    >>> layer = sf.nn.SpectralSelfAttention(
    ...   num_heads=2, head_dim=8, feature_map=sf.feature_map(
    ...     "oprf", "orf", num_features=16))
    >>> x = jnp.ones((1, 5, 16))
    >>> variables = layer.init(jax.random.key(0), x)
    >>> sorted(variables)
    ['params', 'random_features']
    >>> layer.apply(variables, x).shape
    (1, 5, 16)
  """

  num_heads: int
  head_dim: int
  feature_map: FeatureMap | None = None
  attention: str = "spectral"
  attention_kwargs: Mapping[str, Any] | None = None
  max_len: int | None = None
  is_causal: bool = False
  rotary: bool = False
  share_projection: bool = False
  dtype: Any = None

  @nn.compact
  def __call__(
    self,
    x: Array,
    mask: Array | None = None,
    *,
    decode: bool = False,
    deterministic: bool = True,
  ) -> Array:
    """Attends.

    Args:
      x: ``[B, T, D]``.
      mask: ``[B, T]`` bool, True at real positions; None for all.
      decode: the positions follow those of earlier calls, whose state (and
        number, for rotary positions) is in the collection "cache"; see
        `LanguageModel`.
      deterministic: False in training: updates running statistics.

    Returns:
      ``[B, T, D]``.

    Raises:
      ValueError: unknown `attention` or option, no `feature_map` where one is
        needed, `is_causal` where that is not possible, `rotary` with an odd
        `head_dim`, or `decode` with other attention than causal spectral.
    """
    self._check(decode)
    heads = (self.num_heads, self.head_dim)
    query, key, value = (
      projection(heads, dtype=self.dtype, name=name)(x)
      for name in ("query", "key", "value")
    )
    if self.rotary:
      index = next_positions(self, x.shape[1], decode)
      query, key = rotate(query, index), rotate(key, index)
    if self.attention == "spectral":
      variables = self._feature_variables()
      kwargs = {
        "feature_map": self.feature_map,
        "variables": variables,
        "stats": self._running_stats(
          variables, query, key, mask, deterministic
        ),
      }
      state = self._decoding_state(x.shape[0], kwargs) if decode else None
      out = spectral_attention(
        query,
        key,
        value,
        is_causal=self.is_causal,
        key_mask=mask,
        initial_state=state and state.value,
        return_state=decode,
        **kwargs,
      )
      if decode:
        out, state.value = out
    elif self.attention in BASELINES:
      out = self._baseline(query, key, value, mask)
    else:
      out = exact_attention(
        query,
        key,
        value,
        kernel=self.attention,
        is_causal=self.is_causal,
        key_mask=mask,
      )
    output = projection(
      x.shape[-1], axis=(-2, -1), dtype=self.dtype, name="out"
    )
    return output(out)

  def _baseline(self, query, key, value, mask):
    """Attention of one of `BASELINES`, whose parameters are "baseline"."""
    baseline = BASELINES[self.attention]
    kwargs = dict(self.attention_kwargs or {})
    if baseline.init_params is not None:
      sizes = {
        "num_heads": self.num_heads,
        "max_len": self.max_len or key.shape[1],
      }
      kwargs = self.param(
        "baseline", lambda rng: baseline.init_params(rng, **sizes, **kwargs)
      )
    if baseline.can_be_causal:
      kwargs["is_causal"] = self.is_causal
    return baseline.attend(query, key, value, key_mask=mask, **kwargs)

  def _check(self, decode):
    """ValueError for options that do not go together."""
    if self.attention not in ATTENTIONS:
      raise ValueError(
        f"Unknown attention {self.attention!r}."
        f"{nearest(self.attention, ATTENTIONS)}"
      )
    if (self.attention == "spectral") != (self.feature_map is not None):
      raise ValueError(
        f"attention={self.attention!r} with feature_map="
        f"{self.feature_map and self.feature_map.info.name!r}: 'spectral' "
        "needs a feature map, the exact kernels take none, nor do baselines."
      )
    check_options(
      self.attention, self.attention_kwargs or {}, is_causal=self.is_causal
    )
    if decode and not (self.attention == "spectral" and self.is_causal):
      raise ValueError(
        f"decode=True with attention={self.attention!r}, is_causal="
        f"{self.is_causal}: only causal spectral attention has a state."
      )

  def _decoding_state(self, batch_size, kwargs):
    """The state after earlier calls."""
    sizes = {"num_heads": self.num_heads, "head_dim": self.head_dim}
    return self.variable(
      "cache",
      "state",
      lambda: init_state(batch_size=batch_size, **sizes, **kwargs),
    )

  def _feature_variables(self) -> FeatureVariables:
    """Learnable leaves from "params", drawn ones from "random_features"."""
    fm = self.feature_map
    sizes = {
      "head_dim": self.head_dim,
      "num_heads": 1 if self.share_projection else self.num_heads,
    }
    projection = self.variable(
      "random_features",
      "projection",
      lambda: fm.init_projection(self.make_rng("features"), **sizes),
    )
    params = {}
    shapes = jax.eval_shape(lambda: fm.init_params(jax.random.key(0), **sizes))
    if jax.tree.leaves(shapes):
      params = self.param(
        "feature_map", lambda rng: fm.init_params(rng, **sizes)
      )
    return FeatureVariables(params, projection.value)

  def _running_stats(
    self, variables, query, key, mask, deterministic
  ) -> PyTree:
    """Stats of earlier batches; None where the map needs no running ones.

    The step's own batch is counted after it is attended, so that no position
    is influenced by later ones.
    """
    fm = self.feature_map
    if getattr(fm.component, "statistics", None) != "ema":
      return None
    scale = float(self.head_dim) ** -0.25

    def typical():
      shape = (1, 1024, self.num_heads, self.head_dim)
      x, y = jax.random.normal(jax.random.key(0), (2, *shape)) * scale
      return fm.moments(variables, x, y)

    running = self.variable("feature_stats", "moments", typical)
    stats = fm.solve(running.value)
    if not deterministic and not self.is_initializing():
      new, counts = fm.mean_moments(
        variables,
        query.astype(jnp.float32) * scale,
        key.astype(jnp.float32) * scale,
        key_mask=mask,
        query_mask=mask,
      )
      rate = jnp.where(counts, 1.0 - STATS_DECAY, 0.0)
      running.value = jax.tree.map(
        lambda old, new: (1.0 - rate) * old + rate * new, running.value, new
      )
    return stats
