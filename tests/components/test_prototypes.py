"""Prototypes: what a start from data gives, and the limit of hard shares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from spectraformer_jax.components import LearnedExp, Prototypes
from spectraformer_jax.weight_matrices import ORF, NoRows
from tests.components.helpers import build

HEAD_DIM, NUM_CENTRES = 4, 6


def draw_points(seed, size):
  return 1.5 * jax.random.normal(jax.random.key(seed), (size, HEAD_DIM))


CENTRES = draw_points(0, NUM_CENTRES)
QUERIES, KEYS = draw_points(1, 5), draw_points(2, 7)
MEAN_KEY = jnp.array([1.0, -2.0, 0.5, 3.0])


def start(component, sharpness=1.0):
  """Returns a map and its variables for one head, started from `CENTRES`.

  Args:
    component: `Prototypes` or `LearnedExp`.
    sharpness: of the shares; 1 is the start itself.
  """
  params = component.init(jax.random.key(3), HEAD_DIM, NUM_CENTRES)
  params = component.start(params, CENTRES, MEAN_KEY)
  for name in ("key_rows", "key_bias"):
    params[name] *= sharpness
  params = jax.tree.map(lambda leaf: leaf[None], {"component": params})
  fm = sf.compose(component, NoRows(), num_features=NUM_CENTRES)
  return fm, sf.FeatureVariables(params, {})


def kernel(fm, variables, queries=QUERIES, keys=KEYS):
  """Returns K of all queries and keys, ``[T, S]``."""
  phi, psi = (
    fm.apply(variables, x[:, None], side=side)[:, 0]
    for x, side in ((queries, "query"), (keys, "key"))
  )
  return np.asarray(phi) @ np.asarray(psi).T


def squared_distances():
  keys, centres = (np.asarray(x, np.float64) for x in (KEYS, CENTRES))
  return ((keys[:, None] - centres[None]) ** 2).sum(-1)


def test_a_key_is_shared_out_by_its_distances_from_the_centres():
  # Whatever the mean key is: it only makes the numbers small.
  fm, variables = start(Prototypes())
  shares = fm.apply(variables, KEYS[:, None], side="key")[:, 0]
  expected = np.exp(-0.5 * squared_distances())
  expected /= expected.sum(1, keepdims=True)
  np.testing.assert_allclose(shares, expected, rtol=2e-5)


def test_hard_shares_give_the_kernel_of_quantised_keys():
  fm, variables = start(Prototypes(share=1), sharpness=100.0)
  nearest = np.asarray(CENTRES)[squared_distances().argmin(1)]
  log_kernel = np.log(kernel(fm, variables))
  np.testing.assert_allclose(log_kernel, QUERIES @ nearest.T, atol=1e-3)
  # Transformer-VQ's bound: its error is that of the keys, times |x|.
  distance = np.sqrt(squared_distances().min(1).max())
  bound = np.linalg.norm(QUERIES, axis=1)[:, None] * distance
  assert (np.abs(log_kernel - QUERIES @ KEYS.T) <= bound + 1e-3).all()


def test_the_kernel_of_learned_exp_at_its_start():
  x, centres, keys, mean = (
    np.asarray(x, np.float64) for x in (QUERIES, CENTRES, KEYS, MEAN_KEY)
  )
  from_mean = ((keys - mean) ** 2).sum(-1)
  share = np.exp(0.5 * (from_mean[:, None] - squared_distances()))
  expected = np.exp(x @ centres.T) @ share.T / NUM_CENTRES
  fm, variables = start(LearnedExp())
  np.testing.assert_allclose(kernel(fm, variables), expected, rtol=2e-5)


@pytest.mark.parametrize("component", [Prototypes(), LearnedExp()])
def test_both_sides_start_with_the_same_rows_at_a_kernel_of_size_one(component):
  rng = jax.random.key(0)
  params = component.init(rng, HEAD_DIM, NUM_CENTRES)
  rows = 0.5 * ORF().draw_rows(rng, NUM_CENTRES, HEAD_DIM)
  for side in ("query", "key"):
    np.testing.assert_allclose(params[f"{side}_rows"], rows, rtol=1e-6)
  fm = sf.compose(component, NoRows(), num_features=NUM_CENTRES)
  variables = fm.init(rng, head_dim=HEAD_DIM)
  zero = jnp.zeros((1, HEAD_DIM))
  np.testing.assert_allclose(kernel(fm, variables, zero, zero), 1.0, rtol=1e-6)


def test_learned_exp_is_prototypes_without_shares():
  component = Prototypes(share=0)
  fm, variables = start(component)
  bias = jnp.linspace(-1.0, 1.0, NUM_CENTRES)[None]
  params = {**variables.params["component"], "query_bias": bias}
  got = kernel(fm, variables._replace(params={"component": params}))
  other, of_other = start(LearnedExp())
  params = dict(of_other.params["component"])
  params["key_bias"] += bias
  expected = kernel(other, of_other._replace(params={"component": params}))
  np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_a_learned_share_starts_at_one():
  fixed, learned = start(Prototypes(share=1)), start(Prototypes())
  assert "share" not in fixed[1].params["component"]
  np.testing.assert_array_equal(kernel(*fixed), kernel(*learned))
  params = dict(learned[1].params["component"], share=jnp.array([0.25]))
  changed = learned[1]._replace(params={"component": params})
  np.testing.assert_allclose(
    kernel(learned[0], changed), kernel(*start(Prototypes(share=0.25)))
  )


def test_exact_keys_and_prototypes_share_a_scale():
  # With one prototype for each key the far part is exact, too, and with a
  # window the scale of its kernel counts.
  fm, variables = start(Prototypes(), sharpness=200.0)
  query, key = (x[None, :, None] for x in (draw_points(4, 6), CENTRES))
  value = jax.random.normal(jax.random.key(5), key.shape)
  attend = lambda **exact: sf.spectral_attention(
    query,
    key,
    value,
    feature_map=fm,
    variables=variables,
    scale=1.0,
    **exact,
  )
  expected = sf.exact_attention(query, key, value, scale=1.0)
  np.testing.assert_allclose(attend(window=1, num_heavy=1), expected, atol=1e-3)


@pytest.mark.parametrize("share", ["learnt", -0.1, 1.5, True, None])
def test_other_shares_are_refused(share):
  with pytest.raises(ValueError, match="share must be 'learned' or a number"):
    Prototypes(share=share)


def test_sizes_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match="num_features must be a positive int"):
    build("prototypes", "none", None)
  with pytest.raises(ValueError, match="num_features must be None, got 8"):
    build("elu1", "none", 8)
  with pytest.raises(ValueError, match="needs rows of law 'none'"):
    build("prototypes", "orf", 8)
  fm = build("prototypes", "none", 8)
  variables = fm.init(jax.random.key(0), head_dim=HEAD_DIM)
  for wrong, head_dim in ((fm, 5), (build("prototypes", "none", 7), HEAD_DIM)):
    with pytest.raises(ValueError, match="variables do not fit 'prototypes-"):
      wrong.apply(variables, jnp.ones((3, 1, head_dim)), side="key")
  with pytest.raises(ValueError, match="'prototypes' is learnt, so it has no"):
    fm.kernel(variables, jnp.ones(HEAD_DIM), jnp.ones(HEAD_DIM))
