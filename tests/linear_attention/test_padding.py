"""What padding holds reaches neither outputs nor gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import spectraformer_jax as sf
from tests.linear_attention.helpers import CAUSAL, draw_arrays

LENGTH = 12
REAL = jnp.arange(LENGTH)[None] < jnp.array([[7], [12]])
HELD = (jnp.nan, jnp.inf, 1e18, 1e30)


def attention(name, is_causal):
  """Attention of query, key, value and parameters, with a key mask alone."""
  if name in ("softmax", "gaussian"):
    return {}, lambda params, *arrays: sf.exact_attention(
      *arrays, kernel=name, is_causal=is_causal, key_mask=REAL
    )
  component, _, rest = name.partition(" ")
  matrix = "learned_orf" if component == "learned" else "orf"
  component = "posrf" if component == "learned" else component
  options = CAUSAL.get(component, {}) if is_causal else {}
  fm = sf.feature_map(
    component, matrix, num_features=8, component_kwargs=options
  )
  variables = fm.init(jax.random.key(0), head_dim=4)
  kwargs = {"feature_map": fm, "is_causal": is_causal, "key_mask": REAL}
  function = sf.spectral_attention
  if rest == "parallel":
    function = sf.sequence_parallel_attention
    kwargs |= {"mesh": Mesh(jax.devices()[:1], ("s",)), "axis": "s"}
  elif rest:
    kwargs["implementation"] = rest
  return variables.params, lambda params, *arrays: function(
    *arrays, variables=variables._replace(params=params), **kwargs
  )


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
  "name",
  [
    "posrf",
    "learned",
    "softmax",
    "oprf",
    "trigrf",
    "learned reference",
    "gaussian",
    "trigrf reference",
    "learned parallel",
  ],
)
@pytest.mark.quick_every(3)
def test_padding_reaches_no_gradient(name, is_causal):
  params, attend = attention(name, is_causal)
  mask = REAL[:, :, None, None]

  @jax.jit
  def run(params, arrays, held):
    def loss(params, arrays):
      arrays = [jnp.where(mask, x, held) for x in arrays]
      out = jnp.where(mask, attend(params, *arrays), 0.0)
      return jnp.sum(jnp.sin(out)), out

    return jax.grad(loss, (0, 1), has_aux=True)(params, arrays)

  arrays = draw_arrays(LENGTH)
  expected = run(params, arrays, 0.0)
  for held in HELD:
    jax.tree.map(
      np.testing.assert_array_equal, run(params, arrays, held), expected
    )


@pytest.mark.parametrize("name", ["posrf", "posrf reference", "softmax"])
def test_nan_at_a_real_position_shows(name):
  params, attend = attention(name, True)
  query, key, value = draw_arrays(LENGTH)
  out = attend(params, query.at[1, 5].set(jnp.nan), key, value)
  assert jnp.all(jnp.isnan(out[1, 5]))
  assert jnp.all(jnp.isfinite(out[1, :5])) and jnp.all(jnp.isfinite(out[0]))
  for held in (
    (query, key.at[1, 5].set(jnp.nan), value),
    (
      query,
      key,
      value.at[1, 5].set(jnp.nan),
    ),
  ):
    out = attend(params, *held)
    assert jnp.all(jnp.isnan(out[1, 5])) and jnp.all(jnp.isfinite(out[0]))
