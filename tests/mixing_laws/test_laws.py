"""Mixing laws: sampler, density and kernel agree with each other and scipy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from spectraformer_jax import mixing_laws
from spectraformer_jax.mixing_laws import (
  LAWS,
  ExpPower,
  GeneralisedCauchy,
  Kummer,
  Laplacian,
  Matern,
  RationalQuadratic,
  special,
)
from spectraformer_jax.weight_matrices import stored_uniforms

# Shapes for which the kernel has a known value at r = 2.
GOLDEN = {
  Laplacian(): (-1.4722, 0.135335),
  Matern(1.5): (-0.930816, 0.139731),
  Matern(2.5): (None, 0.13866),
  RationalQuadratic(2.0): (-0.911148, 0.25),
  ExpPower(1.5): (-0.615092, 0.0591057),
  ExpPower(0.5): (-2.33729, None),
  GeneralisedCauchy(1.0, 1.5): (None, 0.19245),
  Kummer(1.2, 0.8): (0.0494023, 0.17258),
}
SHAPES = [
  *GOLDEN,
  ExpPower(1.8),
  GeneralisedCauchy(1.5, 0.5),
  Kummer(20.0, 6.0),
]
SQUARES = np.array([0.0, 0.01, 0.25, 1.0, 4.0, 16.0, 60.0], np.float32)


def midpoints(law):
  """An even grid of uniforms ``[num_uniforms, Q]``, at most 90,000 points."""
  count = {1: 40_000, 2: 300, 3: 44}[law.num_uniforms]
  line = (np.arange(count, dtype=np.float32) + 0.5) / count
  return np.stack(
    [axis.ravel() for axis in np.meshgrid(*[line] * law.num_uniforms)]
  )


def test_every_law_is_tested():
  assert {type(law) for law in SHAPES} == {LAWS.get(n) for n in LAWS.names()}


@pytest.mark.parametrize("law", GOLDEN, ids=str)
def test_golden_values(law):
  density, kernel = GOLDEN[law]
  if density is not None:
    value = law.log_density(jnp.float32(0.5))
    # The density of exp_power is a sum over a grid.
    np.testing.assert_allclose(value, density, rtol=1e-5)
  if kernel is not None:
    value = jnp.exp(law.log_kernel(jnp.float32(4.0)))
    np.testing.assert_allclose(value, kernel, rtol=1e-5)


def test_golden_draws():
  uniform = jnp.array([[0.1, 0.5, 0.9]], jnp.float32)
  for law, expected in (
    (Laplacian(), (0.369612, 2.19811, 63.3281)),
    (Matern(1.5), (0.479893, 1.26798, 5.1337)),
    (RationalQuadratic(2.0), (0.265906, 0.839173, 1.94486)),
  ):
    scales = jnp.exp(law.log_scale(uniform))
    np.testing.assert_allclose(scales, expected, rtol=5e-6, err_msg=str(law))
  for index, expected in ((0.75, -0.410079), (0.25, 0.113218)):
    draw = special.log_stable_draw(jnp.float32(0.3), jnp.float32(0.6), index)
    np.testing.assert_allclose(draw, expected, atol=2e-6)


@pytest.mark.parametrize("law", SHAPES, ids=str)
@pytest.mark.quick_every(5)
def test_density_gives_the_kernel(law):
  # The oracle: a plain sum over s. The density of gen_cauchy is itself a sum.
  step = 0.2 if isinstance(law, GeneralisedCauchy) else 0.02
  s = np.arange(-44.0, 44.0, step)
  if isinstance(law, Kummer):  # the grid of log R would end at a pole
    v = np.arange(-90.0, 60.0, 0.02)
    s = np.log(2.0) - np.logaddexp(0.0, -v)
    slope = np.exp(-np.logaddexp(0.0, v))  # ds/dv = 1 - R
  else:
    slope = 1.0
  density = np.exp(np.asarray(law.log_density(jnp.asarray(s, jnp.float32))))
  weights = density.astype(np.float64) * slope * step
  exponent = -0.5 * SQUARES[:, None].astype(np.float64) * np.exp(s)[None, :]
  sums = np.exp(exponent) @ weights
  kernel = np.exp(np.asarray(law.log_kernel(jnp.asarray(SQUARES)), np.float64))
  # Zolotarev's integral has an error of 3e-4 at alpha = 1.8.
  np.testing.assert_allclose(sums, kernel, atol=5e-4)


@pytest.mark.parametrize("law", SHAPES, ids=str)
@pytest.mark.quick_every(6)
def test_draws_give_the_kernel_with_the_cap_and_without(law):
  log_scale = np.asarray(
    jax.jit(law.log_scale)(jnp.asarray(midpoints(law))), np.float64
  )
  squares = SQUARES[1:, None].astype(np.float64)
  mean = np.exp(-0.5 * squares * np.exp(log_scale)[None, :]).mean(axis=1)
  exact = np.exp(np.asarray(law.log_kernel(jnp.asarray(SQUARES[1:]))))
  # A rule of midpoints: its error falls like the step at the ends.
  np.testing.assert_allclose(mean, exact, atol=4e-3)
  tau = 4.0
  log_scale = np.minimum(log_scale, np.log(tau)) if law.needs_cap else log_scale
  mean = np.exp(-0.5 * squares * np.exp(log_scale)[None, :]).mean(axis=1)
  capped = mixing_laws.capped_log_kernel(law, jnp.asarray(SQUARES[1:]), tau)
  np.testing.assert_allclose(mean, np.exp(np.asarray(capped)), atol=4e-3)


def test_the_cap_of_the_laplacian_is_the_closed_form():
  r, normal = np.sqrt(SQUARES.astype(np.float64)), scipy.stats.norm.cdf
  for tau in (0.5, 4.0, 100.0):
    root = np.sqrt(tau)
    rest = (2.0 * normal(1.0 / root) - 1.0) * np.exp(-0.5 * tau * r**2)
    # e^r times a tail, in logs, since neither stays in range.
    log_tail = scipy.special.log_ndtr(-(r * tau + 1.0) / root)
    expected = (
      np.exp(-r) * normal((r * tau - 1.0) / root) + np.exp(r + log_tail) + rest
    )
    capped = mixing_laws.capped_log_kernel(
      Laplacian(), jnp.asarray(SQUARES), tau
    )
    np.testing.assert_allclose(np.exp(capped), expected, rtol=1e-5)


@pytest.mark.parametrize("law", [ExpPower(1.8), GeneralisedCauchy(0.5, 0.25)])
@pytest.mark.quick_every(2)
def test_a_large_cap_changes_nothing_far_away(law):
  capped = mixing_laws.capped_log_kernel(law, jnp.asarray(SQUARES[2:]), 100.0)
  kernel = law.log_kernel(jnp.asarray(SQUARES[2:]))
  # The narrowest and the widest density of all.
  np.testing.assert_allclose(np.exp(capped), np.exp(kernel), atol=5e-4)


@pytest.mark.parametrize("nu", [0.5, 1.5, 2.5])
@pytest.mark.quick_every(3)
def test_matern_draws_are_quantiles(nu):
  bits = stored_uniforms.from_uniform(jnp.geomspace(1e-4, 0.5, 20))
  uniform = stored_uniforms.to_uniform(bits)
  for u in (uniform, 1.0 - uniform):
    wide = np.asarray(u, np.float64)
    expected = np.log(2.0 * nu / scipy.stats.chi2.isf(wide, 2.0 * nu))
    draws = jax.jit(Matern(nu).log_scale)(u[None, :])
    np.testing.assert_allclose(draws, expected, atol=1e-4)
    if nu == 0.5:
      np.testing.assert_allclose(
        draws, Laplacian().log_scale(u[None]), atol=1e-4
      )


@pytest.mark.parametrize("b", [0.25, 2.0, 50.0])
@pytest.mark.quick_every(2)
def test_rational_quadratic_draws_are_quantiles(b):
  uniform = jnp.array([1e-4, 0.01, 0.3, 0.5, 0.9, 0.9999], jnp.float32)
  wide = np.asarray(uniform, np.float64)
  expected = np.log(scipy.stats.gamma.ppf(wide, b) / b)
  draws = jax.jit(RationalQuadratic(b).log_scale)(uniform[None, :])
  np.testing.assert_allclose(draws, expected, atol=1e-4)


@pytest.mark.parametrize("law", SHAPES, ids=str)
@pytest.mark.quick_every(6)
def test_the_most_extreme_uniforms_give_finite_draws(law):
  ends = stored_uniforms.to_uniform(jnp.array([0, 2**23 - 1]))
  grid = jnp.stack(
    [axis.ravel() for axis in jnp.meshgrid(*[ends] * law.num_uniforms)]
  )
  assert bool(jnp.isfinite(jax.jit(law.log_scale)(grid)).all())


def test_limits_and_special_cases():
  squares = jnp.asarray(SQUARES)
  same = lambda one, other: np.testing.assert_allclose(
    one.log_kernel(squares), other.log_kernel(squares), rtol=1e-6
  )
  same(Matern(0.5), Laplacian())
  same(ExpPower(1.0), Laplacian())
  gaussian = RationalQuadratic(1e4).log_kernel(squares)
  # log1p(t) is t - t^2/2, with t = r^2 / 2b up to 0.003.
  np.testing.assert_allclose(gaussian, -0.5 * squares, rtol=2e-3)


@pytest.mark.parametrize(
  "shape", [(1.2, 0.8), (0.25, 5.0), (5.0, 0.25), (20, 20)]
)
@pytest.mark.quick_every(4)
def test_kummer_is_scipys_function(shape):
  a, b = shape
  z = np.array([0.0, 0.1, 1.0, 4.0, 30.0, 100.0, 1e3, 1e5, 1e6])
  narrow = jnp.asarray(z, jnp.float32)
  expected = np.log(scipy.special.hyp1f1(a, a + b, -z))
  # Logarithms up to 200 in float32.
  np.testing.assert_allclose(
    special.log_kummer(a, b, narrow), expected, rtol=1e-6, atol=3e-6
  )
  slope = jax.vmap(jax.grad(special.log_kummer, 2), (None, None, 0))
  ratio = scipy.special.hyp1f1(a + 1.0, a + b + 1.0, -z) / np.exp(expected)
  np.testing.assert_allclose(
    slope(a, b, narrow), -a / (a + b) * ratio, rtol=1e-4
  )


@pytest.mark.parametrize("law", SHAPES, ids=str)
@pytest.mark.quick_every(2)
def test_gradients_of_kernels_are_finite_everywhere(law):
  gradient = jax.vmap(jax.grad(lambda x: law.log_kernel(jnp.sum(x**2))))
  points = jnp.array([[0.0, 0.0], [1e-18, 0.0], [1e-4, 1e-4], [1e3, -1e3]])
  values = gradient(points)
  assert bool(jnp.isfinite(values).all())
  np.testing.assert_array_equal(values[0], 0.0)
  assert bool((values[2:] * points[2:] < 0.0).all())


@pytest.mark.parametrize(
  ("build", "words"),
  [
    (lambda: Matern(0.75), r"nu must be one of 0.5, 1.5, 2.5, got 0.75"),
    (lambda: RationalQuadratic(0.1), "b must be at least 0.25.*got 0.1"),
    (lambda: ExpPower(2.0), "alpha must be from 0.5 to 1.8, got 2.0"),
    (lambda: GeneralisedCauchy(1.0, np.inf), "b must be .*finite, got inf"),
    (lambda: Kummer(a=0.0), "a must be at least 0.25"),
    (lambda: mixing_laws.build_law("laplace"), "Did you mean 'laplacian'"),
    (
      lambda: mixing_laws.build_law("matern", {"mu": 1.5}),
      "law 'matern' has no option 'mu'. Did you mean 'nu'",
    ),
    (
      lambda: mixing_laws.build_law(Matern(), {"nu": 1.5}),
      r"law=Matern\(nu=1.5\) has its own options: give nu to it",
    ),
  ],
)
def test_errors(build, words):
  with pytest.raises(ValueError, match=words):
    build()
