"""Helpers of tests in several folders."""

import spectraformer_jax as sf
from spectraformer_jax import testing
from spectraformer_jax.components import COMPONENTS
from spectraformer_jax.weight_matrices import WEIGHT_MATRICES


def smallest_map(component, matrix, *, head_dim):
  """Builds the pair of these names with as few features as it accepts."""
  component = COMPONENTS.build(component)
  matrix = WEIGHT_MATRICES.build(matrix)
  num_features = testing.smallest_num_features(
    component, matrix, head_dim=head_dim
  )
  return sf.compose(component, matrix, num_features=num_features)
