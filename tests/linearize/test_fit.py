import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from spectraformer_jax.linearize import (
  NonFiniteLossError,
  certify,
  fit,
  fit_feature_map,
  fit_layers,
  loss,
  start_from_data,
)
from spectraformer_jax.weight_matrices import WEIGHT_MATRICES
from tests.helpers import smallest_map
from tests.linearize.helpers import (
  BATCH,
  HEAD_DIM,
  HEADS,
  LENGTH,
  build_map,
  draw,
  layer,
  masks_of,
)


def fitted(arrays, *, steps=50, seed=0, maps=None, **options):
  """Variables and report of a fit."""
  return fit_feature_map(
    *arrays[:2],
    rng=jax.random.key(seed),
    steps=steps,
    **masks_of(arrays),
    **(maps or build_map()),
    **options,
  )


@pytest.mark.parametrize("share", ["learned", 1.0])
@pytest.mark.quick_every(2)
def test_keys_of_few_values_are_recovered(rng, share):
  arrays, num_values = draw(mask=False, scale=3.0), 6
  # Each key is one of as many values as there are prototypes.
  order = jax.random.permutation(rng, BATCH * LENGTH) % num_values
  values = arrays.key[0, :num_values]
  arrays = arrays._replace(key=values[order.reshape(BATCH, LENGTH)])
  maps = dict(build_map(num_values, share=share))
  maps["variables"] = start_from_data(
    rng, query=arrays.query, key=arrays.key, **maps
  )
  variables, _ = fitted(
    arrays, steps=200, learning_rate=0.1, maps=maps, batch_size=BATCH
  )
  certificate = certify(*arrays[:3], **maps | {"variables": variables})
  assert certificate.error_all < 0.01


def test_another_map_of_the_class_is_recovered(monkeypatch):
  # The teacher is not softmax attention here, but the map of other variables.
  maps, teacher = build_map(), build_map(seed=1)
  monkeypatch.setattr(
    loss,
    "_log_teacher",
    lambda kernel, x, y: loss._log_student(
      *teacher.values(), x, y, jnp.ones((len(y), y.shape[2]), bool)
    ),
  )
  # Programs of other tests have another teacher, and other numbers of rows.
  _, report = fitted(draw(mask=False), steps=400, rows=11, maps=maps)
  assert report.best_loss < 0.01 * report.start_loss


def test_loss_falls():
  arrays, others = draw(), draw(seed=1)
  variables, report = fitted(arrays, held_out=others, rows=6)
  assert report.losses.shape == (50,)
  assert report.losses[-20:].mean() < report.losses[:20].mean()
  assert report.checked_steps.tolist() == [0, 25, 50]
  assert report.best_step in (25, 50)
  assert report.best_loss == report.held_out.min() < report.start_loss
  before, after = (
    certify(*others[:3], **maps, **masks_of(others))
    for maps in (build_map(), build_map() | {"variables": variables})
  )
  assert after.kl.mean() < before.kl.mean()


def learnable_pairs():
  """Returns the names of a pair for every component and matrix with params."""
  matrices = {n: WEIGHT_MATRICES.build(n) for n in WEIGHT_MATRICES.names()}
  pairs = [("posrf", n) for n, m in matrices.items() if m.info.learnable]
  every = sf.list_feature_maps()
  for name, matrix in dict(reversed(every)).items():
    pairs.append((name, "orf" if (name, "orf") in every else matrix))

  def can_be_fitted(pair):
    fm = smallest_map(*pair, head_dim=HEAD_DIM)
    return fm.has_params and fm.info.positive and not fm.info.needs_stats

  return list(filter(can_be_fitted, pairs))


@pytest.mark.parametrize("pair", learnable_pairs(), ids="-".join)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_pair_with_parameters_can_be_fitted(pair):
  arrays = draw()
  fm = smallest_map(*pair, head_dim=HEAD_DIM)
  variables = fm.init(jax.random.key(0), head_dim=HEAD_DIM, num_heads=HEADS)
  maps = {"feature_map": fm, "variables": variables}
  found, report = fitted(arrays, maps=maps, held_out=draw(seed=1))
  assert report.losses[-20:].mean() < report.losses[:20].mean()
  assert report.best_loss <= report.start_loss
  same = jax.tree.map(np.array_equal, found.projection, variables.projection)
  assert all(jax.tree.leaves(same))


@pytest.mark.parametrize(
  ("options", "num_heads"),
  [
    ({"groups": 2}, HEADS),
    ({"groups": 2}, 1),
    ({"keys": 20}, HEADS),
  ],
)
@pytest.mark.quick_every(3)
def test_heads_and_lengths(options, num_heads):
  maps = build_map(num_heads=num_heads)
  variables, report = fitted(draw(**options), maps=maps, rows=LENGTH)
  assert report.best_loss < 0.9 * report.start_loss
  of_start = jax.tree.map(jnp.shape, maps["variables"])
  assert jax.tree.map(jnp.shape, variables) == of_start


@pytest.mark.slow
def test_half_precision_is_computed_in_float32():
  arrays = draw()
  half = arrays._replace(
    query=arrays.query.astype(jnp.bfloat16), key=arrays.key.astype(jnp.bfloat16)
  )
  whole = half._replace(
    query=half.query.astype(jnp.float32), key=half.key.astype(jnp.float32)
  )
  (one, first), (two, second) = (fitted(x, steps=3) for x in (half, whole))
  np.testing.assert_array_equal(first.losses, second.losses)
  jax.tree.map(np.testing.assert_array_equal, one, two)


def test_a_single_visible_key_leaves_nothing_to_fit():
  arrays = draw()
  is_second = jnp.arange(LENGTH)[None] == jnp.full((BATCH, 1), 2)
  one = arrays._replace(key_mask=is_second)
  variables, report = fitted(one, steps=3)
  assert not report.losses.any() and report.best_step == 0
  jax.tree.map(
    np.testing.assert_array_equal, variables, build_map()["variables"]
  )


def test_without_progress_the_start_is_kept():
  arrays, maps = draw(), build_map()
  variables, report = fitted(arrays, steps=3, learning_rate=1e-30)
  assert report.best_step == 0
  assert report.best_loss == report.start_loss == report.held_out[-1]
  jax.tree.map(np.testing.assert_array_equal, variables, maps["variables"])


def test_a_fit_that_uniform_attention_beats_is_not_used():
  # One step improves on prototypes that are far too long.
  arrays, maps = draw(), dict(build_map())
  maps["variables"] = jax.tree.map(lambda leaf: 9.0 * leaf, maps["variables"])
  variables, report = fitted(arrays, steps=1, maps=maps)
  assert report.uniform < report.held_out[1] < report.held_out[0]
  assert report.best_step == 0
  jax.tree.map(np.testing.assert_array_equal, variables, maps["variables"])


def test_a_rate_that_is_too_large_is_lowered(monkeypatch):
  monkeypatch.setattr(fit, "TRIES", (1e40, 1e39, 1.0))
  usual, steps = fitted(draw(), steps=30), []
  variables, report = fitted(draw(), steps=30, on_check=steps.append)
  assert report.learning_rate == 2e-2 and np.isfinite(report.losses).all()
  assert steps == [25, 25, 25, 30]
  jax.tree.map(np.testing.assert_array_equal, variables, usual[0])


def test_a_loss_that_is_never_finite_is_an_error(monkeypatch):
  monkeypatch.setattr(fit, "TRIES", (1e40, 1e39))
  message = "layer 'layer_0': the loss is not finite at step 1 with learning"
  with pytest.raises(NonFiniteLossError, match=message):
    fit_layers(
      [layer()],
      feature_map=build_map()["feature_map"],
      rng=jax.random.key(0),
      held_out=[layer(seed=1)],
    )


@pytest.mark.slow
def test_loss_of_outputs():
  arrays = draw()
  _, report = fitted(arrays, loss="output", value=arrays.value)
  assert report.best_loss < 0.9 * report.start_loss


@pytest.mark.slow
def test_gaussian_attention_can_be_the_target():
  arrays = draw(mask=False)
  variables, report = fitted(arrays, target="gaussian")
  found = certify(
    *arrays[:3],
    feature_map=build_map()["feature_map"],
    variables=variables,
    target="gaussian",
  )
  assert found.kl.mean() == pytest.approx(report.best_loss, rel=1e-5)
  assert report.best_loss < 0.9 * report.start_loss


@pytest.mark.slow
def test_fits_repeat_and_depend_on_the_key():
  one, two, other = (fitted(draw(), steps=3, rows=5, seed=s) for s in (0, 0, 1))
  np.testing.assert_array_equal(one[1].losses, two[1].losses)
  assert (one[1].losses != other[1].losses).any()


@pytest.mark.slow
def test_batches_of_sequences():
  arrays = draw()
  _, all_rows = fitted(arrays, steps=3, batch_size=3)
  # All sequences and rows: the first loss is that of the start.
  assert all_rows.losses[0] == pytest.approx(all_rows.start_loss, rel=1e-5)
