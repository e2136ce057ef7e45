"""Centring, as a wrapper of any map of the softmax or Gaussian kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from spectraformer_jax.components import (
  OPRF,
  Centred,
  Component,
  PosRF,
  build_component,
)
from tests.components.helpers import build_case, calibrate, draw_data
from tests.helpers import PAIRS, estimates, standard_scores


def lifted(shift=0.0):
  """Returns queries and keys ``[1, L, 1, H]``, moved by `shift`."""
  return tuple(jnp.asarray(x + shift)[None, :, None, :] for x in draw_data())


@pytest.mark.parametrize("case", ["c_posrf", "c_oprf_hyp", "c_asderf"])
@pytest.mark.parametrize("kernel", ["softmax", "gaussian"])
@pytest.mark.quick_every(6)
def test_relative_error_does_not_change_with_an_offset(case, kernel):
  # Same rows and same centred vectors: the estimate relative to the kernel is
  # the same, only if the factors that make up for centring are exact.
  fm = build_case(case, kernel=kernel)
  (query, key), (far_query, far_key) = lifted(), lifted(1.5)
  variables = fm.init(jax.random.key(0), head_dim=4)

  def estimate(query, key):
    stats = fm.calibrate(variables, query, key)
    phi = fm.apply(variables, query, side="query", stats=stats)[0, :, 0]
    psi = fm.apply(variables, key, side="key", stats=stats)[0, :, 0]
    exact = fm.kernel(
      variables, query[0, :, None, 0], key[0, None, :, 0], stats=stats
    )
    return phi @ psi.T / exact

  np.testing.assert_allclose(
    estimate(query, key), estimate(far_query, far_key), rtol=2e-4
  )


def test_centring_is_the_base_where_means_vanish():
  query, key = lifted()
  query, key = (x - x.mean(1, keepdims=True) for x in (query, key))
  centred, plain = build_case("c_posrf"), build_case("posrf")
  variables = plain.init(jax.random.key(0), head_dim=4)
  stats = centred.calibrate(variables, query, key)
  np.testing.assert_allclose(
    centred.apply(variables, key, side="key", stats=stats),
    plain.apply(variables, key, side="key"),
    rtol=1e-5,
  )


@pytest.mark.parametrize("kernel", ["softmax", "gaussian"])
@pytest.mark.parametrize(
  "name", ["poisrf", "geomrf", "poisrf_plus", "geomrf_plus", "hrf"]
)
@pytest.mark.quick_every(10)
def test_maps_of_other_families_stay_unbiased(name, kernel):
  # Those of the exponential families: test_exponential.
  fm = sf.feature_map(
    name,
    "iid",
    num_features=32,
    component_kwargs={"kernel": kernel, "centred": True},
  )
  assert fm.info.name == f"c_{name}-iid"
  stats = calibrate(fm)
  samples = estimates(fm, jax.random.key(1), PAIRS, 4_000, stats=stats)
  variables = fm.init(jax.random.key(0), head_dim=4)
  x, y = jnp.asarray(PAIRS[:, 0]), jnp.asarray(PAIRS[:, 1])
  scores = standard_scores(samples, fm.kernel(variables, x, y, stats=stats))
  assert np.all(np.abs(scores) < 4.0), scores


def test_gaussian_centre_is_the_mean_of_both_means():
  query, key = lifted(0.5)
  plain = build_case("posrf", kernel="gaussian")
  fm = build_case("c_posrf", kernel="gaussian")
  variables = plain.init(jax.random.key(0), head_dim=4)
  stats = calibrate(fm, query[0, :, 0], key[0, :, 0])
  centre = 0.5 * (query.mean(1, keepdims=True) + key.mean(1, keepdims=True))
  for side, x in (("query", query), ("key", key)):
    np.testing.assert_allclose(
      fm.apply(variables, x, side=side, stats=stats),
      plain.apply(variables, x - centre, side=side),
      rtol=1e-5,
    )


def test_names_facts_and_equal_builds():
  fm = build_case("c_posrf", matrix="orf")
  assert fm.info.name == "c_posrf-orf"
  assert fm.info.needs_stats and fm.info.positive
  assert not build_case("c_trigrf").info.positive
  assert build_case("c_posrf", matrix="orf") is fm
  assert fm is sf.compose(
    Centred(PosRF()), fm.weight_matrix, num_features=fm.num_features
  )
  assert build_component("posrf", {"centred": False}) == PosRF()
  hash(fm)


def test_statistics_are_those_of_the_base_or_its_own():
  assert Centred(OPRF(statistics="ema")).statistics == "ema"
  assert build_case("c_posrf").component.statistics == "batch"
  for name in ("posrf", "oprf"):
    component = build_component(name, {"centred": True, "statistics": "ema"})
    assert component.statistics == "ema" and component.needs_stats


def test_learned_centres_start_at_the_base_and_train():
  query, key = lifted()
  fm, plain = (
    build_case(case, statistics="learned")
    for case in ("c_oprf_hyp", "oprf_hyp")
  )
  variables = fm.init(jax.random.key(0), head_dim=4)
  base = plain.init(jax.random.key(0), head_dim=4)
  assert not fm.info.needs_stats
  assert sorted(variables.params["component"]) == ["base", "centre"]
  np.testing.assert_allclose(
    fm.apply(variables, key, side="key"),
    plain.apply(base, key, side="key"),
    rtol=1e-6,
  )

  @jax.jit
  def loss(params):
    own = variables._replace(params=params)
    phi = fm.apply(own, query, side="query")[0, :, 0]
    psi = fm.apply(own, key, side="key")[0, :, 0]
    exact = jnp.exp(query[0, :, 0] @ key[0, :, 0].T)
    return jnp.mean((phi @ psi.T - exact) ** 2)

  grads = jax.grad(loss)(variables.params)
  assert all(float(jnp.abs(g).max()) > 1e-6 for g in jax.tree.leaves(grads))


class NoKernel(Component):
  """A map of another kernel."""

  info = PosRF().info


@pytest.mark.parametrize(
  ("make", "words"),
  [
    (lambda: Centred(NoKernel()), "cannot be centred"),
    (lambda: Centred(PosRF(), "constant"), "changes nothing"),
    (lambda: Centred(OPRF(statistics="constant")), "changes nothing"),
    (lambda: Centred(PosRF(), "bacth"), "Did you mean 'batch'"),
    (lambda: Centred(OPRF(), "ema"), "must be that of component 'oprf'"),
    (
      lambda: build_component("posrf", {"centred": "yes"}),
      "True or False, got 'yes'",
    ),
    (
      lambda: build_component("posrf", {"centered": True}),
      "Did you mean 'centred'",
    ),
    (
      lambda: build_component("posrf", {"statistics": "ema"}),
      "no option 'statistics'",
    ),
  ],
)
def test_refusals(make, words):
  with pytest.raises(ValueError, match=words):
    make()


def test_causal_attention_refuses_batch_centres():
  x = jnp.ones((1, 5, 1, 4))
  fm = build_case("c_posrf")
  variables = fm.init(jax.random.key(0), head_dim=4)
  with pytest.raises(ValueError, match="leak the future"):
    sf.spectral_attention(
      x, x, x, feature_map=fm, variables=variables, is_causal=True
    )
  learned = build_case("c_posrf", statistics="learned")
  out = sf.spectral_attention(
    x,
    x,
    x,
    feature_map=learned,
    variables=learned.init(jax.random.key(0), head_dim=4),
    is_causal=True,
  )
  assert out.shape == x.shape
