import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectraformer_jax.linearize import certify, fit_feature_map
from spectraformer_jax.linearize.loss import draw_rows, mean_loss
from spectraformer_jax.linearize.problem import (
  arrays_of,
  make_problem,
  make_sequences,
)
from tests.linearize.helpers import (
  CASES,
  HEADS,
  LENGTH,
  build_map,
  draw,
  loss_by_definition,
  masks_of,
)


def start_loss(arrays, *, rows=10 * LENGTH, **options):
  """The loss of a map as it is, on all rows."""
  _, report = fit_feature_map(
    *arrays[:2],
    rng=jax.random.key(0),
    steps=0,
    rows=rows,
    **masks_of(arrays),
    **options,
  )
  return report.start_loss


@pytest.mark.parametrize("groups", [2, 1])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.quick_every(8)
def test_loss_is_that_of_the_definition(case, groups):
  arrays = draw(groups=groups)
  maps = build_map(num_heads=groups)  # one map of both heads, or two
  expected = loss_by_definition(arrays, **maps, **CASES[case]).mean()
  found = start_loss(arrays, **maps, **CASES[case])
  # Rounding of float32, in sums of about 10 terms.
  assert found == pytest.approx(expected, rel=2e-6)


@pytest.mark.slow
def test_queries_and_keys_of_other_lengths():
  arrays, maps = draw(keys=20), build_map()
  expected = loss_by_definition(arrays, **maps).mean()
  assert start_loss(arrays, **maps) == pytest.approx(expected, rel=2e-6)


@pytest.mark.slow
def test_the_loss_of_an_equal_kernel_is_zero_if_all_keys_are_exact():
  assert start_loss(draw(), **build_map(), window=LENGTH) < 1e-6


def problem_and_sequences(arrays, *, rows=4, **options):
  settings = {
    "loss": "cross_entropy",
    "target": "softmax",
    "is_causal": False,
    "window": None,
    "num_sinks": 0,
    "num_heavy": 0,
    "batch_size": 1,
  }
  arrays = arrays_of(arrays, needs_value=True)
  problem = make_problem(
    arrays, build_map()["feature_map"], rows=rows, **settings | options
  )
  return problem, make_sequences(problem, arrays, None)


def test_the_mean_over_draws_of_rows_is_the_loss_of_all_rows():
  problem, sequences = problem_and_sequences(draw(batch=1))
  variables = build_map()["variables"]
  loss = lambda rows: mean_loss(problem, variables, sequences, rows)[0]

  @jax.jit
  @jax.vmap
  def sample(rng):
    return loss(draw_rows(rng, sequences.query_mask, problem.rows))

  losses = np.asarray(sample(jax.random.split(jax.random.key(0), 2000)))
  standard_error = losses.std(ddof=1) / len(losses) ** 0.5
  every = float(jax.jit(loss)(jnp.arange(LENGTH)[None]))
  assert abs(losses.mean() - every) < 5 * standard_error
  assert 0 < standard_error < 0.02 * every  # it could be seen


def test_rows_are_visible_and_differ():
  mask = jnp.arange(LENGTH)[None] % 3 != 1
  rows = np.asarray(draw_rows(jax.random.key(0), mask, 8))[0]
  assert sorted(rows) == [i for i in range(LENGTH) if i % 3 != 1]
  (few,) = np.asarray(draw_rows(jax.random.key(0), mask, 10))
  assert set(few[:8]) == set(rows)


def test_a_causal_loss_does_not_see_the_future():
  arrays, rows = draw(mask=False, batch=1), jnp.array([[2, 5]])
  variables = build_map()["variables"]
  later = jnp.arange(LENGTH)[None, :, None, None] > 5
  changed = arrays._replace(key=jnp.where(later, 3.0, arrays.key))

  def losses(is_causal):
    for case in (arrays, changed):
      problem, sequences = problem_and_sequences(case, is_causal=is_causal)
      loss = jax.jit(mean_loss, static_argnums=0)
      yield float(loss(problem, variables, sequences, rows)[0])

  before, after = losses(True)
  # Later keys change the shifts, and with them the rounding.
  assert before == pytest.approx(after, rel=1e-6)
  before, after = losses(False)
  assert abs(before - after) > 0.01 * before


def test_hidden_numbers_change_no_bit():
  arrays = draw()
  hide = lambda x, mask: jnp.where(mask[:, :, None, None], x, jnp.nan)
  hidden = arrays._replace(
    query=hide(arrays.query, arrays.query_mask),
    key=hide(arrays.key, arrays.key_mask),
    value=hide(arrays.value, arrays.key_mask),
  )
  fitted = [
    fit_feature_map(
      *case[:2],
      value=case.value,
      loss="output",
      rng=jax.random.key(0),
      steps=3,
      window=1,
      num_heavy=1,
      **masks_of(case),
      **build_map(),
    )
    for case in (arrays, hidden)
  ]
  (one, first), (two, second) = fitted
  np.testing.assert_array_equal(first.losses, second.losses)
  assert first.losses[0] > 0
  jax.tree.map(np.testing.assert_array_equal, one.params, two.params)


def prototype_loss(params, x, y):
  """The loss of one query x ``[H]`` at keys ``[S, H]``, in float64."""
  total = lambda z: np.logaddexp.reduce(z, axis=-1, keepdims=True)
  log_phi = params["query_rows"] @ x + params["query_bias"]
  z = y @ params["key_rows"].T + params["key_bias"]
  log_student = total(log_phi + z - params["share"] * total(z))[:, 0]
  log_a, log_b = y @ x - total(y @ x), log_student - total(log_student)
  return np.sum(np.exp(log_a) * (log_a - log_b))


def test_gradient_is_that_of_finite_differences():
  arrays = draw(batch=1)
  problem, sequences = problem_and_sequences(arrays)
  variables = build_map()["variables"]
  row = 2

  @jax.jit
  @jax.grad
  def gradient(params):
    moved, rows = variables._replace(params=params), jnp.array([[row]])
    return mean_loss(problem, moved, sequences, rows)[0]

  found = gradient(variables.params)["component"]
  (visible,) = np.asarray(arrays.key_mask)
  root = arrays.query.shape[-1] ** -0.25
  for head in range(HEADS):
    params = {
      name: np.asarray(leaf[head], np.float64)
      for name, leaf in variables.params["component"].items()
    }
    x = root * np.asarray(arrays.query[0, row, head], np.float64)
    y = root * np.asarray(arrays.key[0, visible, head], np.float64)
    for name, leaf in params.items():
      expected = np.zeros_like(leaf)
      for index in np.ndindex(leaf.shape):
        ends = []
        for step in (1e-5, -1e-5):
          moved = leaf.copy()
          moved[index] += step
          ends.append(prototype_loss(params | {name: moved}, x, y))
        expected[index] = (ends[0] - ends[1]) / 2e-5
      # The mean is over heads; float32.
      np.testing.assert_allclose(
        HEADS * found[name][head], expected, rtol=1e-3, atol=1e-6
      )


@pytest.mark.slow
def test_output_loss_is_the_relative_square_of_the_outputs():
  arrays, maps = draw(batch=1), build_map()

  certificate = certify(*arrays[:3], **maps, **masks_of(arrays))
  problem, sequences = problem_and_sequences(arrays, loss="output")
  every = jnp.arange(LENGTH)[None]
  loss, uniform = mean_loss(problem, maps["variables"], sequences, every)
  assert float(loss) == pytest.approx(np.mean(certificate.error**2), rel=1e-5)
  expected = np.mean(certificate.uniform**2)
  assert float(uniform) == pytest.approx(expected, rel=1e-5)
