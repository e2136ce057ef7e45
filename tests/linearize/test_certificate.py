import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from spectraformer_jax.hybrid_attention.exact_keys import ExactKeys
from spectraformer_jax.linearize import certify
from spectraformer_jax.study.approximation import measure
from tests.linearize.helpers import (
  CASES,
  HEADS,
  LENGTH,
  build_map,
  draw,
  layer,
  loss_by_definition,
  masks_of,
  weights_by_definition,
)


def certificate(arrays, maps=None, **options):
  return certify(
    *arrays[:3], **(maps or build_map()), **masks_of(arrays), **options
  )


@pytest.mark.parametrize("groups", [2, 1])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.quick_every(8)
def test_figures_are_those_of_the_definition(case, groups):
  arrays, maps = draw(groups=groups), build_map(num_heads=groups)
  found = certificate(arrays, maps, **CASES[case])
  value = np.asarray(arrays.value, np.float64)
  outputs = np.zeros((3, *arrays.query.shape[:3], value.shape[-1]))
  entropies = [[] for _ in range(HEADS * groups)]
  for b, i, h, keys, *weights in weights_by_definition(
    arrays, **maps, **CASES[case]
  ):
    weights.append(np.full(len(keys), 1 / len(keys)))
    for out, w in zip(outputs, weights, strict=True):
      out[b, i, h] = w @ value[b, keys, h // groups]
    entropies[h].append((b, -np.sum(weights[0] * np.log(weights[0]))))
  exact, implied, uniform = outputs
  norm = lambda x: np.sqrt(np.sum(x**2, axis=(0, 1, 3)))
  close = lambda expected: pytest.approx(expected, rel=1e-4)  # float32
  assert found.error == close(norm(implied - exact) / norm(exact))
  assert found.uniform == close(norm(uniform - exact) / norm(exact))
  whole = np.linalg.norm
  assert found.error_all == close(whole(implied - exact) / whole(exact))
  assert found.uniform_error == close(whole(uniform - exact) / whole(exact))
  expected = loss_by_definition(arrays, **maps, **CASES[case])
  assert found.kl == close(expected)
  of_head = lambda found: np.mean(
    [np.mean([e for c, e in found if c == b]) for b in range(len(value))]
  )
  assert found.entropy == close([of_head(found) for found in entropies])


@pytest.mark.slow
@pytest.mark.parametrize("is_causal", [False, True])
def test_errors_are_those_of_the_study(is_causal):
  inputs, window = layer(), (1, 0)
  # The study also times JAX's attention, which needs values of this size.
  inputs = dataclasses.replace(inputs, value=inputs.key)
  options = measure.Options(
    is_causal, draws=1, exact=ExactKeys(window, num_sinks=1)
  )
  fm = build_map()["feature_map"]
  program = measure.prepare(fm, inputs, options)
  reference = measure.make_reference(inputs, 1.0, options)
  figures = measure.measure(program, inputs, 1.0, reference, options)
  found = certify(
    inputs.query,
    inputs.key,
    inputs.value,
    feature_map=fm,
    variables=program.draws[0],
    is_causal=is_causal,
    window=window,
    num_sinks=1,
    key_mask=inputs.key_mask,
    query_mask=inputs.query_mask,
  )
  assert found.error_all == pytest.approx(figures.error, rel=1e-6)
  assert found.uniform_error == pytest.approx(figures.uniform_error, rel=1e-6)


@pytest.mark.slow
def test_scores_and_scale():
  arrays = draw(mask=False)
  plain = certificate(arrays)
  x, y = (np.asarray(x, np.float64) for x in arrays[:2])
  scores = np.einsum("btnh,bsnh->bnts", x, y) / x.shape[-1] ** 0.5
  variance = np.var(scores, axis=(2, 3)).mean(axis=0)
  assert plain.score_std == pytest.approx(variance**0.5, rel=1e-5)
  scaled = certificate(
    arrays._replace(query=4.0 * arrays.query), scale=0.25 * x.shape[-1] ** -0.5
  )
  # Features see a query four times as large, at half of its square root.
  assert scaled.score_std == pytest.approx(plain.score_std, rel=1e-5)
  assert scaled.entropy == pytest.approx(plain.entropy, rel=1e-4)


def test_other_variables_are_measured_beside():
  arrays, others = draw(), build_map(seed=1)
  found = certificate(arrays, start=others["variables"])
  alone = certificate(arrays, others)
  jax.tree.map(np.testing.assert_array_equal, found.start, alone)
  assert found.start.error_all != found.error_all


def test_hidden_numbers_change_no_bit():
  arrays = draw()
  hide = lambda x, mask: jnp.where(mask[:, :, None, None], x, jnp.nan)
  hidden = arrays._replace(
    query=hide(arrays.query, arrays.query_mask),
    key=hide(arrays.key, arrays.key_mask),
    value=hide(arrays.value, arrays.key_mask),
  )
  jax.tree.map(
    np.testing.assert_array_equal, certificate(arrays), certificate(hidden)
  )


@pytest.mark.slow
def test_weights_of_both_signs_have_no_divergence():
  fm = sf.feature_map("trigrf", "orf", num_features=8)
  variables = fm.init(jax.random.key(0), head_dim=4)
  maps = {"feature_map": fm, "variables": variables}
  found = certificate(draw(), maps)
  assert np.isnan(found.kl).all() and np.isfinite(found.error_all)


@pytest.mark.slow
def test_the_target_is_the_kernel_of_exact_attention():
  fm = sf.feature_map(
    "posrf", "orf", num_features=8, component_kwargs={"kernel": "gaussian"}
  )
  maps = {
    "feature_map": fm,
    "variables": fm.init(jax.random.key(0), head_dim=4),
  }
  softmax, gaussian = (
    certificate(draw(), maps, target=target, window=LENGTH)
    for target in ("softmax", "gaussian")
  )
  assert gaussian.error_all < 1e-5 and gaussian.kl.max() < 1e-6
  assert softmax.error_all > 0.1 and softmax.kl.min() > 0.01
