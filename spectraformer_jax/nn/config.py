"""Options that models share, and how one module passes them to another."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import flax.linen as nn
import jax.numpy as jnp

from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.hybrid_attention.exact_keys import Window


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
  """Options of an encoder, for `from_config` of any module of `sf.nn`.

  Each option is also a field of the models themselves, so that
  ``Classifier(num_layers=4, ...)`` needs no `EncoderConfig`. This class saves
  repetition where several models have the same options.

  Attributes:
    embed_dim: D, the width of the vectors between layers.
    num_layers: depth.
    num_heads: number of query heads.
    head_dim: H, the width of one head.
    mlp_dim: hidden width of the MLP in each layer.
    mlp: "gelu": ``out(gelu(hidden(x)))``; "gated":
      ``out(silu(gate(x)) * hidden(x))``, with 1.5 times the parameters
      (Shazeer, "GLU Variants Improve Transformer", 2020: SwiGLU).
    norm: where the LayerNorm is: "pre": ``x + f(norm(x))``; "post":
      ``norm(x + f(x))``, as in the first Transformers.
    positions: "learned": a table added to the embeddings; "sinusoidal": the
      same table, initialised by `sinusoids`, so that near positions start
      alike; "rotary": queries and keys are rotated, see `rotate`; "none": the
      model is not told the order of its tokens.
    feature_map: for attention="spectral"; see `sf.feature_map`.
    attention: "spectral", an exact kernel (a name of `kernels.EXACT_KERNELS`,
      "softmax" or another) or a baseline (a name of `baselines.BASELINES`).
    attention_kwargs: options of a baseline.
    window, num_sinks, num_heavy: keys that are exact in self-attention, beside
      the features of all others; see `spectral_attention`. Heavy keys are for
      models that are not causal. Attention to a memory has no exact keys.
    share_projection: one weight matrix for all heads instead of one per head.
    num_key_value_heads: heads of keys and values, each of which serves equally
      many query heads (grouped-query attention); None is `num_heads`.
    dropout_rate: of embeddings, attention's outputs, and the MLP's hidden
      values and outputs.
    dtype: of dense layers and norms; None takes that of the input.
    param_dtype: of their parameters; a feature map's are always float32.
    remat: in the backward pass, compute each layer's values again instead of
      keeping them: this takes less memory and more time, and gives the same
      numbers.

  Example:
    >>> import spectraformer_jax as sf
    >>> config = sf.nn.EncoderConfig(
    ...   num_layers=4, positions="rotary",
    ...   feature_map=sf.feature_map("posrf", "orf", num_features=16))
    >>> language = sf.nn.LanguageModel.from_config(
    ...   config, vocab_size=32, max_len=8)
    >>> classifier = sf.nn.Classifier.from_config(
    ...   config, vocab_size=32, max_len=8, num_classes=10, pooling="cls")
    >>> language.num_layers, classifier.positions
    (4, 'rotary')
  """

  embed_dim: int = 64
  num_layers: int = 2
  num_heads: int = 2
  head_dim: int = 32
  mlp_dim: int = 128
  mlp: str = "gelu"
  norm: str = "pre"
  positions: str = "learned"
  feature_map: FeatureMap | None = None
  attention: str = "spectral"
  attention_kwargs: Mapping[str, Any] | None = None
  window: Window = None
  num_sinks: int = 0
  num_heavy: int = 0
  share_projection: bool = False
  num_key_value_heads: int | None = None
  dropout_rate: float = 0.1
  dtype: Any = None
  param_dtype: Any = jnp.float32
  remat: bool = False


class ConfiguredModule(nn.Module):
  """Base of modules that can copy fields from a config or another module."""

  @classmethod
  def from_config(
    cls, config: EncoderConfig | nn.Module, **fields: Any
  ) -> Self:
    """Makes a module with the options that `config` holds.

    Args:
      config: an `EncoderConfig`, or a module. Those of its fields that `cls`
        has as well are copied, and the rest are left out.
      **fields: the other fields of the new module, and values to replace those
        of `config`.

    Example:
      >>> import spectraformer_jax as sf
      >>> config = sf.nn.EncoderConfig(num_layers=4, attention="softmax")
      >>> encoder = sf.nn.Encoder.from_config(config, num_heads=8)
      >>> encoder.num_layers, encoder.num_heads
      (4, 8)
    """
    shared = field_names(cls) & field_names(type(config))
    return cls(**({name: getattr(config, name) for name in shared} | fields))


def field_names(cls: type) -> set[str]:
  """Returns the names of a dataclass's fields, without Linen's own two."""
  return {field.name for field in dataclasses.fields(cls)} - {"parent", "name"}


# Linen modules are dataclasses that are not frozen, and such dataclasses cannot
# inherit from a frozen one. So the fields of `EncoderConfig` and its defaults
# are repeated here, once for all modules.


class ExactKeyFields(ConfiguredModule, kw_only=True):
  """Base of modules whose self-attention may have exact keys."""

  window: Window = EncoderConfig.window
  num_sinks: int = EncoderConfig.num_sinks
  num_heavy: int = EncoderConfig.num_heavy


class LayerFields(ExactKeyFields, kw_only=True):
  """Base of modules with the options of one layer; see `EncoderConfig`."""

  num_heads: int = EncoderConfig.num_heads
  head_dim: int = EncoderConfig.head_dim
  mlp_dim: int = EncoderConfig.mlp_dim
  mlp: str = EncoderConfig.mlp
  norm: str = EncoderConfig.norm
  feature_map: FeatureMap | None = EncoderConfig.feature_map
  attention: str = EncoderConfig.attention
  attention_kwargs: Mapping[str, Any] | None = EncoderConfig.attention_kwargs
  share_projection: bool = EncoderConfig.share_projection
  num_key_value_heads: int | None = EncoderConfig.num_key_value_heads
  dropout_rate: float = EncoderConfig.dropout_rate
  dtype: Any = EncoderConfig.dtype
  param_dtype: Any = EncoderConfig.param_dtype


class ModelFields(LayerFields, kw_only=True):
  """Base of modules with all options of `EncoderConfig`."""

  embed_dim: int = EncoderConfig.embed_dim
  num_layers: int = EncoderConfig.num_layers
  positions: str = EncoderConfig.positions
  remat: bool = EncoderConfig.remat


class PooledFields(ModelFields, kw_only=True):
  """Base of modules that pool an encoder's outputs; see `SequenceEncoder`."""

  pooling: str = "mean"
  pooled_norm: str = "none"
  batch_axis: str | None = None
