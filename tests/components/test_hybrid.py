"""Hybrid features: two estimates mixed by a third."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.components.helpers import (
  HEAD_DIM,
  PAIRS,
  build,
  check_mean_and_square,
  draw_estimates,
  first_head_state,
  zero_safe_scores,
)

CASES = {
  "angular": {},
  "angular_one": {"num_mixing_rows": 1},
  "angular_gaussian": {"kernel": "gaussian"},
  "gaussian": {"mixing": "gaussian"},
  "gaussian_narrow": {"mixing": "gaussian", "tau": 0.6, "num_mixing_rows": 2},
  "gaussian_gaussian": {"mixing": "gaussian", "kernel": "gaussian"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.quick_every(4)
def test_mean_and_square(case):
  fm = build("hrf", **({"num_mixing_rows": 3} | CASES[case]))
  check_mean_and_square(fm, 20_000)


@pytest.mark.slow
def test_orthogonal_rows_stay_unbiased():
  fm = build("hrf", "orf", num_features=4, num_mixing_rows=2)
  check_mean_and_square(fm, 10_000, squares=False)


def test_variance_of_many_rows_is_that_of_one_divided():
  fm = build("hrf", num_features=6, num_mixing_rows=3)
  x, y = PAIRS[:, 0], PAIRS[:, 1]
  kernel = np.exp(np.sum(x * y, axis=-1))
  moment = np.exp(fm.component.log_second_moment(x, y, first_head_state(fm)))
  squares = (draw_estimates(fm, 20_000) - kernel) ** 2
  # y = -x is exact: rounding is all that is left.
  expected = (moment - kernel**2) / 6
  scores = zero_safe_scores(squares, expected)
  assert np.all((np.abs(scores) < 5.0) | (squares.max(0) < 1e-9)), scores


def test_angular_variance_is_the_formula_of_its_parts():
  # The three terms as they are derived: of P, of R, and their covariance.
  fm = build("hrf", num_mixing_rows=5)
  x, y = (PAIRS[:, side].astype(np.float64) for side in (0, 1))
  kernel = np.exp(np.sum(x * y, axis=-1))
  square = lambda z: np.sum(z**2, axis=-1)
  cosine = np.sum(x * y, axis=-1) / np.sqrt(square(x) * square(y))
  mix = np.arccos(np.clip(cosine, -1.0, 1.0)) / np.pi
  noise = mix * (1.0 - mix) / 5
  expected = kernel**2 * (
    (mix**2 + noise) * (np.cosh(square(x + y)) - 1.0)
    + ((1.0 - mix) ** 2 + noise) * (np.cosh(square(x - y)) - 1.0)
    + 2.0 * (mix * (1.0 - mix) - noise) * (np.cos(square(x) - square(y)) - 1.0)
  )
  moment = fm.component.log_second_moment(
    jnp.asarray(x, jnp.float32),
    jnp.asarray(y, jnp.float32),
    first_head_state(fm),
  )
  # float32 of exp(log): a few roundings of the kernel's square.
  np.testing.assert_allclose(
    np.exp(moment) - kernel**2, expected, atol=1e-5 * kernel.max() ** 2
  )


@pytest.mark.parametrize("kernel", ["softmax", "gaussian"])
@pytest.mark.parametrize("mixing", ["angular", "gaussian"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.quick_every(3)
def test_exact_at_the_ends(kernel, mixing, sign):
  fm = build("hrf", num_features=3, kernel=kernel, mixing=mixing)
  x = PAIRS[:, 0]
  error = draw_estimates(fm, 20, pairs=np.stack([x, sign * x], 1)) - np.asarray(
    fm.component.kernel_value(x, sign * x, first_head_state(fm))
  )
  exact = mixing == "angular" or sign < 0
  assert (np.abs(error).max() < 1e-5) == exact


@pytest.mark.slow
def test_a_second_projection_that_shares_rows_would_be_biased():
  # Which is why independent=False is refused: T is always drawn on its own.
  fm = build("hrf", num_features=8, num_mixing_rows=8)

  def share(variables):
    random = {"mixing": variables.projection["rows"]["w"]}
    return variables._replace(
      projection={**variables.projection, "component": random}
    )

  kernel = np.exp(np.sum(PAIRS[:, 0] * PAIRS[:, 1], axis=-1))
  independent = zero_safe_scores(draw_estimates(fm, 20_000), kernel)
  shared = zero_safe_scores(draw_estimates(fm, 20_000, change=share), kernel)
  assert np.abs(independent).max() < 4.0, independent
  assert np.abs(shared).max() > 8.0, shared


def test_projections_are_independent_and_both_redrawn():
  fm = build("hrf", num_features=8, num_mixing_rows=8)
  old = fm.init(jax.random.key(0), head_dim=HEAD_DIM, num_heads=500).projection
  w, mixing = old["rows"]["w"], old["component"]["mixing"]
  # Correlations of 500 heads: a deviation of 500^-1/2 = 0.045 each.
  correlation = jnp.mean(w[:, :, None] * mixing[:, None, :], axis=(0, 3))
  assert float(jnp.abs(correlation).max()) < 4.0 * 0.045 / 2.0
  new = fm.redraw(jax.random.key(1), fm.init(jax.random.key(0), head_dim=4))
  first = fm.init(jax.random.key(0), head_dim=4).projection
  for part, leaf in (("rows", "w"), ("component", "mixing")):
    change = new.projection[part][leaf] - first[part][leaf]
    assert float(jnp.abs(change).min()) > 0.0


@pytest.mark.parametrize("mixing", ["angular", "gaussian"])
@pytest.mark.quick_every(2)
def test_feature_dim(mixing):
  fm = build("hrf", num_features=5, num_mixing_rows=3, mixing=mixing)
  variables = fm.init(jax.random.key(0), head_dim=HEAD_DIM)
  phi = fm.apply(variables, jnp.ones((2, 1, HEAD_DIM)), side="key")
  expected = {"angular": 4 * 5 * 4, "gaussian": 2 * (4 * 5 * 3) + 2 * 5}
  assert phi.shape[-1] == fm.feature_dim == expected[mixing]


@pytest.mark.parametrize(
  ("kwargs", "words"),
  [
    ({"mixing": "angle"}, "mixing must be one of"),
    ({"num_mixing_rows": 0}, "num_mixing_rows must be a positive integer"),
    ({"mixing": "gaussian", "tau": 0.0}, "tau must be positive, got 0.0"),
    ({"tau": 1.0}, "tau=1.0 is for mixing='gaussian' only"),
    ({"independent": False}, "depends on W biases the estimate, causal or not"),
    ({"kernel": "soft"}, "Did you mean 'softmax'"),
  ],
)
def test_errors(kwargs, words):
  with pytest.raises(ValueError, match=words):
    build("hrf", **kwargs)
