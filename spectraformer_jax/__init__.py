"""Random-feature attention: any weight matrix with any component function.

    import spectraformer_jax as sf
    fm = sf.feature_map("oprf", "orf", num_features=128)
    variables = fm.init(rng, head_dim=32, num_heads=2)
    out = sf.spectral_attention(q, k, v, feature_map=fm, variables=variables)

Each name is imported when it is first used, so ``import
spectraformer_jax.data`` loads numpy and not jax, and only `sf.nn` loads Flax.
Import `spectraformer_jax.data`, `.train` and `.study` by name.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from spectraformer_jax._version import __version__

if TYPE_CHECKING:
  from spectraformer_jax import (
    components,
    kernels,
    linearize,
    nn,
    weight_matrices,
  )
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
  from spectraformer_jax.typing import (
    FeatureVariables,
    LogFeatures,
    WeightSample,
  )
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
  "linearize",
  "list_components",
  "list_feature_maps",
  "list_weight_matrices",
  "nn",
  "sequence_parallel_attention",
  "spectral_attention",
  "trainable",
  "weight_matrices",
]

_SUBMODULES = ("components", "kernels", "linearize", "nn", "weight_matrices")

# The submodule that defines each of the other names, as imported above.
_HOMES = {
  "FeatureMap": "feature_maps.feature_map",
  "FeatureVariables": "typing",
  "LogFeatures": "typing",
  "WeightSample": "typing",
  "as_attention_fn": "adapters.attention_fns",
  "as_dot_product_attention": "adapters.attention_fns",
  "attend_state": "decoding",
  "compose": "feature_maps.compose",
  "decode_step": "decoding",
  "exact_attention": "kernels",
  "feature_map": "feature_maps.compose",
  "implied_attention_weights": "attention",
  "init_state": "decoding",
  "linear_attention": "linear_attention",
  "list_components": "components",
  "list_feature_maps": "feature_maps.compose",
  "list_weight_matrices": "weight_matrices",
  "sequence_parallel_attention": "sequence_parallel",
  "spectral_attention": "attention",
  "trainable": "feature_maps.trainable",
}


def __getattr__(name: str) -> Any:
  if name in _SUBMODULES:
    return importlib.import_module(f"{__name__}.{name}")
  if name not in _HOMES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}.")
  module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
  globals()[name] = value = getattr(module, name)
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})


class _Root(types.ModuleType):
  """Keeps the attribute `linear_attention` the function of that name.

  Importing the package ``spectraformer_jax.linear_attention`` would set the
  attribute of that name to the package.
  """

  def __setattr__(self, name: str, value: Any) -> None:
    if name != "linear_attention" or not isinstance(value, types.ModuleType):
      super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Root
