"""Every component and matrix under x64 and strict promotion: float32 inside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from tests.helpers import smallest_map

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

PAIRS = sf.list_feature_maps()
HEAD_DIM = 4
SWITCHES = {
  "x64": lambda: jax.enable_x64(True),
  "strict": lambda: jax.numpy_dtype_promotion("strict"),
}


def one_pair_of_each():
  """Returns pairs that cover every component and every matrix."""
  components = {}
  for name, matrix in PAIRS:
    if components.get(name) != "orf":
      components[name] = (
        matrix if matrix in ("orf", "iid") else (components.get(name, matrix))
      )
  matrices = {}
  for name, matrix in PAIRS:
    if matrices.get(matrix) not in ("posrf", "trigrf"):
      matrices[matrix] = name
  return sorted(set(components.items()) | {(f, w) for w, f in matrices.items()})


def work(fm, variables, x):
  """Computes stats, features and moments of x ``[B, T, N, H]``."""
  stats = fm.calibrate(variables, x, x) if fm.info.needs_stats else None
  features = [
    fm.log_features(variables, x, side=side, stats=stats)
    for side in ("query", "key")
  ]
  running = fm.mean_moments(variables, x, x)[0] if stats else None
  return stats, features, running


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize(("component", "matrix"), one_pair_of_each())
@pytest.mark.quick_every(16)
def test_everything_is_float32(component, matrix, switch):
  fm = smallest_map(component, matrix, head_dim=HEAD_DIM)
  with SWITCHES[switch]():
    # Some matrices look at their rows while they draw: not traced.
    variables = fm.init(jax.random.key(0), head_dim=HEAD_DIM, num_heads=2)
    wide = jnp.float64 if switch == "x64" else jnp.bfloat16
    for dtype in (jnp.float32, wide):
      x = jax.ShapeDtypeStruct((2, 5, 2, HEAD_DIM), dtype)
      out = jax.eval_shape(lambda v, x: work(fm, v, x), variables, x)
      for path, leaf in jax.tree_util.tree_leaves_with_path((variables, out)):
        assert leaf.dtype == jnp.float32, (jax.tree_util.keystr(path), leaf)


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize(
  "name", ["poisrf", "poisrf_plus", "geomrf", "geomrf_plus", "tensorsketch"]
)
@pytest.mark.quick_every(5)
def test_attention_with_discrete_maps(name, switch):
  with SWITCHES[switch]():
    fm = sf.feature_map(name, "iid", num_features=16)
    variables = fm.init(jax.random.key(1), head_dim=8, num_heads=2)
    x = jax.random.normal(jax.random.key(0), (2, 9, 2, 8), jnp.float32)
    attend = jax.jit(
      lambda x: sf.spectral_attention(
        x, x, x, feature_map=fm, variables=variables
      )
    )
    assert bool(jnp.isfinite(attend(x)).all())


@pytest.mark.parametrize(("component", "matrix"), one_pair_of_each())
@pytest.mark.quick_every(12)
def test_gradients_of_whole_variables(component, matrix):
  fm = smallest_map(component, matrix, head_dim=HEAD_DIM)
  variables = fm.init(
    jax.random.key(0), head_dim=HEAD_DIM, num_heads=1, dtype=jnp.bfloat16
  )
  x = jnp.ones((1, 3, 1, HEAD_DIM)) / 3
  stats = fm.calibrate(variables, x, x) if fm.info.needs_stats else None
  loss = lambda v: jnp.sum(fm.apply(v, x, side="query", stats=stats))
  jax.eval_shape(jax.grad(loss), variables)


def test_log_weights_are_not_rounded():
  fm = sf.feature_map("posrf", "sgq", num_features=129)
  exact, rounded = (
    fm.init(jax.random.key(0), head_dim=64, dtype=dtype)
    for dtype in (jnp.float32, jnp.bfloat16)
  )
  assert rounded.projection["rows"]["w"].dtype == jnp.bfloat16
  np.testing.assert_array_equal(
    exact.projection["rows"]["log_weight"],
    rounded.projection["rows"]["log_weight"],
  )
  zero = jnp.zeros((1, 1, 64))
  phi, psi = (fm.apply(rounded, zero, side=s) for s in ("query", "key"))
  np.testing.assert_allclose(jnp.sum(phi * psi), 1.0, rtol=1e-3)


@pytest.mark.parametrize("matrix", ["fastfood_learnable", "iid"])
def test_projections_of_integers_still_work(matrix):
  component = "trigrf" if matrix == "fastfood_learnable" else "poisrf"
  fm = sf.feature_map(component, matrix, num_features=8)
  variables = fm.init(jax.random.key(0), head_dim=4)
  name = "permutation" if matrix == "fastfood_learnable" else "w"
  rows = dict(variables.projection["rows"])
  rows[name] = rows[name].astype(jnp.int32)
  old = variables._replace(projection={"rows": rows})
  x = jnp.ones((1, 3, 1, 4)) / 3
  stats = fm.calibrate(variables, x, x) or None
  np.testing.assert_array_equal(
    fm.apply(old, x, side="query", stats=stats),
    fm.apply(variables, x, side="query", stats=stats),
  )
