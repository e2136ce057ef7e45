"""Random-feature attention: any weight matrix meets any component function.

    import spectraformer_jax as sf
    fm = sf.feature_map("oprf", "orf", num_features=128)
    variables = fm.init(rng, head_dim=32, num_heads=2)
    out = sf.spectral_attention(q, k, v, feature_map=fm, variables=variables)

The core imports jax and numpy alone. `sf.nn` (Flax modules) is loaded when it
is first used; `spectraformer_jax.data`, `.train` and `.study` are imported by
name.
"""

import importlib

from spectraformer_jax import components, kernels, weight_matrices
from spectraformer_jax._version import __version__
from spectraformer_jax.adapters.attention_fns import (
  as_attention_fn,
  as_dot_product_attention,
)
from spectraformer_jax.attention import (
  implied_attention_weights,
  spectral_attention,
)
from spectraformer_jax.components import list_components
from spectraformer_jax.decoding import attend_state, decode_step, init_state
from spectraformer_jax.feature_maps.compose import (
  compose,
  feature_map,
  list_feature_maps,
)
from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.feature_maps.trainable import trainable
from spectraformer_jax.kernels import exact_attention
from spectraformer_jax.linear_attention import linear_attention
from spectraformer_jax.sequence_parallel import sequence_parallel_attention
from spectraformer_jax.typing import FeatureVariables, LogFeatures, WeightSample
from spectraformer_jax.weight_matrices import list_weight_matrices

__all__ = [
  "FeatureMap",
  "FeatureVariables",
  "LogFeatures",
  "WeightSample",
  "__version__",
  "as_attention_fn",
  "as_dot_product_attention",
  "attend_state",
  "components",
  "compose",
  "decode_step",
  "exact_attention",
  "feature_map",
  "implied_attention_weights",
  "init_state",
  "kernels",
  "linear_attention",
  "list_components",
  "list_feature_maps",
  "list_weight_matrices",
  "nn",
  "sequence_parallel_attention",
  "spectral_attention",
  "trainable",
  "weight_matrices",
]


def __getattr__(name: str):
  # Flax is imported by those who use the modules, not by all who attend.
  if name == "nn":
    return importlib.import_module("spectraformer_jax.nn")
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}.")


def __dir__():
  return sorted({*globals(), *__all__})
