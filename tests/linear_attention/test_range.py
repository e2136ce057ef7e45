"""Large finite inputs: what comes out is right, or NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from tests.linear_attention.helpers import build_map, draw_arrays


def attend(component, scale, is_causal, chunk_size=None):
  """Attention of queries and keys of that standard deviation, values."""
  fm, variables = build_map(component)
  query, key, value = draw_arrays(90, batch=1)
  out = sf.spectral_attention(
    query * scale,
    key * scale,
    value,
    feature_map=fm,
    variables=variables,
    is_causal=is_causal,
    chunk_size=chunk_size,
  )
  return np.asarray(out)


@pytest.mark.parametrize("component", ["posrf", "trigrf"])
@pytest.mark.quick_every(2)
def test_causal_rows_are_right_or_nan(component):
  num_nan = 0
  for scale in (3.0, 30.0, 300.0, 1e6):
    out = attend(component, scale, True)
    one_by_one = attend(component, scale, True, chunk_size=1)
    rows = np.isnan(out).any(-1)
    num_nan += rows.sum()
    assert np.all(np.any(out != 0.0, axis=-1))
    if scale < 1e6:
      assert np.isfinite(one_by_one).all()
      np.testing.assert_allclose(out[~rows], one_by_one[~rows], atol=1e-3)
  assert num_nan


@pytest.mark.parametrize("component", ["posrf", "trigrf"])
@pytest.mark.quick_every(2)
def test_where_every_key_is_seen_the_range_is_wide(component):
  for scale in (1e3, 3e3, 1e4):
    out = attend(component, scale, False)
    assert np.isfinite(out).all() and np.all(np.any(out != 0.0, axis=-1))
  assert np.isnan(attend(component, 1e8, False)).all()


def test_no_key_is_still_zero_and_has_no_gradient():
  fm, variables = build_map("posrf")
  query, key, value = draw_arrays(6)
  hidden = jnp.zeros((2, 6), bool).at[1, 3:].set(True)

  def loss(query, is_causal):
    out = sf.spectral_attention(
      1e3 * query,
      key,
      value,
      feature_map=fm,
      variables=variables,
      key_mask=hidden,
      is_causal=is_causal,
    )
    return jnp.sum(out**2), out

  for is_causal in (False, True):
    grad, out = jax.grad(loss, has_aux=True)(query, is_causal)
    assert np.all(out[0] == 0.0) and np.all(grad[0] == 0.0)
    if is_causal:
      assert np.all(out[1, :3] == 0.0) and np.all(grad[1, :3] == 0.0)
    assert np.isfinite(grad).all() and np.all(out[1, 3:] != 0.0)
