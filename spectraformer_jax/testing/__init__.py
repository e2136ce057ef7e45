"""Contract checks for people who add a component or a weight matrix.

    from spectraformer_jax import testing
    testing.check_component(MyComponent())
    testing.check_weight_matrix(MyMatrix())

Every check raises an AssertionError that says what is wrong. Checks use small
shapes and fixed PRNG keys, so a check that passes once passes always. The
package's own tests run them over everything that is registered.
"""

from spectraformer_jax.testing.checks import (
  check_component,
  check_feature_map,
  check_unbiased,
  check_weight_matrix,
  smallest_num_features,
  standard_scores,
)

__all__ = [
  "check_component",
  "check_feature_map",
  "check_unbiased",
  "check_weight_matrix",
  "smallest_num_features",
  "standard_scores",
]
