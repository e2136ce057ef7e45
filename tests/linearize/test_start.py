import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from spectraformer_jax.linearize import fit_feature_map, start_from_data
from spectraformer_jax.linearize.start import k_means
from tests.linearize.helpers import (
  HEAD_DIM,
  HEADS,
  build_map,
  draw,
  masks_of,
)


def started(arrays, **maps):
  """The variables at the start from data."""
  return start_from_data(
    jax.random.key(0),
    query=arrays.query,
    key=arrays.key,
    **masks_of(arrays),
    **maps,
  )


def test_centres_have_little_spread(rng):
  points = jax.random.normal(rng, (200, 3))
  centres = np.asarray(k_means(rng, points, jnp.arange(200) < 150, 5))
  distance = np.asarray(points)[:150, None] - centres[None]
  spread = np.mean(np.sum(distance**2, axis=-1).min(axis=1))
  # k-means of scikit-learn, the best of ten starts, has 1.200.
  assert spread < 1.1 * 1.200


def test_an_empty_centre_keeps_its_place(rng):
  points = jnp.array([[0.0], [0.0], [4.0]])
  centres = k_means(rng, points, jnp.ones(3, bool), 3)
  assert sorted(centres[:, 0].tolist()) == [0.0, 0.0, 4.0]


def test_fewer_points_than_centres(rng):
  points = jnp.array([[1.0], [4.0], [9.0]])
  centres = k_means(rng, points, jnp.array([True, True, False]), 5)
  assert set(centres[:, 0].tolist()) == {1.0, 4.0}


@pytest.mark.parametrize("num_heads", [1, HEADS])
@pytest.mark.quick_every(2)
def test_prototypes_of_a_head_are_centres_of_its_keys(num_heads):
  # As many prototypes as visible keys: each is one of them.
  arrays = draw(batch=1)
  visible = np.asarray(arrays.key[0, arrays.key_mask[0]]) * HEAD_DIM**-0.25
  num_features = len(visible) * (HEADS // num_heads)
  maps = build_map(num_features, num_heads)
  params = started(arrays, **maps).params["component"]
  found = np.sort(np.asarray(params["query_rows"]), axis=1)
  assert len(found) == num_heads
  by_map = np.moveaxis(visible, 1, 0).reshape(num_heads, -1, HEAD_DIM)
  np.testing.assert_allclose(found, np.sort(by_map, axis=1), rtol=1e-6)


def test_masked_keys_have_no_influence():
  arrays, maps = draw(), build_map()
  mask = arrays.key_mask[:, :, None, None]
  hidden = arrays._replace(key=jnp.where(mask, arrays.key, jnp.nan))
  jax.tree.map(
    np.testing.assert_array_equal,
    started(arrays, **maps),
    started(hidden, **maps),
  )


def test_the_start_is_better_than_that_without_data():
  arrays, maps = draw(), build_map()

  def loss(variables):
    return fit_feature_map(
      *arrays[:2],
      feature_map=maps["feature_map"],
      variables=variables,
      rng=jax.random.key(0),
      steps=0,
      **masks_of(arrays),
    )[1].start_loss

  assert loss(started(arrays, **maps)) < loss(maps["variables"])


def test_a_scale_is_that_of_attention():
  arrays, maps = draw(), build_map()
  larger = arrays._replace(key=2.0 * arrays.key)
  scaled = start_from_data(
    jax.random.key(0),
    query=arrays.query,
    key=arrays.key,
    scale=4.0 * HEAD_DIM**-0.5,
    **masks_of(arrays),
    **maps,
  )
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
    scaled,
    started(larger, **maps),
  )


def test_other_components_keep_their_variables():
  fm = sf.feature_map("posrf", "gmm", num_features=6)
  variables = fm.init(jax.random.key(0), head_dim=HEAD_DIM)
  assert started(draw(), feature_map=fm, variables=variables) is variables
