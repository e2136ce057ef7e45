"""Whether a map has learnable parameters, known without making them."""

import jax
import pytest

import spectraformer_jax as sf

# The others have no rows, or need other sizes.
MATRICES = set(sf.list_weight_matrices()) - {"none", "mm_anti", "sgq"}


def init_params(fm):
  return jax.eval_shape(
    lambda: fm.init_params(jax.random.key(0), head_dim=8, num_heads=1)
  )


@pytest.mark.parametrize(
  ("component", "matrix", "options"),
  [
    *(("posrf", matrix, {}) for matrix in sorted(MATRICES)),
    ("oprf", "orf", {"statistics": "learned"}),
    ("oprf", "orf", {}),
    ("saderf", "orf", {"statistics": "learned"}),
    ("rfa", "orf", {"learned": "per_dim"}),
    ("rfa", "orf", {"learned": "none"}),
    ("prototypes", "none", {}),
    ("t2r", "none", {}),
    ("isotropic_trig", "orf", {}),
    ("isotropic_trig", "orf", {"learned": "none"}),
  ],
)
def test_has_params(component, matrix, options):
  fm = sf.feature_map(
    component, matrix, num_features=16, component_kwargs=options
  )
  assert fm.has_params == bool(init_params(fm))
