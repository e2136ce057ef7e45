"""The matrix that depends on the sequence: context, causality, divergence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from spectraformer_jax import weight_matrices
from tests.helpers import standard_scores
from tests.weight_matrices.helpers import (
  compiled_init_and_draw,
  draw_learner_rows,
  quick_jit,
  randomise,
)


def map_and_inputs(component="posrf", component_kwargs=None, **kwargs):
  """A pair with parameters away from the start, and inputs [3, 5, 2, 6]."""
  fm = sf.feature_map(
    component,
    "variational",
    num_features=12,
    component_kwargs=component_kwargs,
    weight_matrix_kwargs=kwargs,
  )
  init = lambda rng: fm.init(rng, head_dim=6, num_heads=2)
  variables = quick_jit(init)(jax.random.key(0))
  variables = variables._replace(params=randomise(variables.params, scale=0.2))
  query, key, value = jax.random.normal(jax.random.key(1), (3, 3, 5, 2, 6))
  return fm, variables, query, key, value


def test_context_is_the_mean_of_the_visible_keys():
  fm, variables, query, key, _ = map_and_inputs()
  mask = jnp.arange(5)[None, :] < jnp.array([5, 2, 0])[:, None]
  dirty = jnp.where(mask[:, :, None, None], key, jnp.nan)
  context = fm.calibrate(variables, query, dirty, key_mask=mask)["rows"]
  assert context.shape == (3, 2, 6)
  np.testing.assert_allclose(context[0], key[0].mean(axis=0), atol=1e-6)
  np.testing.assert_allclose(context[1], key[1, :2].mean(axis=0), atol=1e-6)
  np.testing.assert_array_equal(context[2], jnp.zeros((2, 6)))


def test_every_example_has_its_own_rows():
  fm, variables, query, key, _ = map_and_inputs()
  stats = fm.calibrate(variables, query, key)
  prepared = fm.prepare(variables, stats)
  assert prepared.rows.w.shape == (3, 2, 12, 6)
  for example in range(3):
    for head in range(2):
      params, projection = jax.tree.map(lambda leaf, i=head: leaf[i], variables)
      own = fm.weight_matrix.rows(
        params["rows"], projection["rows"], key[example, :, head].mean(axis=0)
      )
      np.testing.assert_allclose(
        prepared.rows.w[example, head], own.w, rtol=1e-4, atol=1e-5
      )
  assert jnp.std(prepared.rows.w, axis=0).min() > 1e-3


def test_attention_takes_the_context_of_each_example():
  fm, variables, *inputs = map_and_inputs()
  attend = quick_jit(
    lambda *inputs: sf.spectral_attention(
      *inputs, feature_map=fm, variables=variables
    )
  )
  out = attend(*inputs)
  changed = attend(*(x.at[1].multiply(-2.0) for x in inputs))
  np.testing.assert_array_equal(changed[0], out[0])
  assert not np.allclose(changed[1], out[1], atol=1e-2)
  # Keys far away move the rows, and with them every position's output.
  far = attend(inputs[0], inputs[1].at[:, -1].add(1.0), inputs[2])
  stats = fm.calibrate(variables, *(6**-0.25 * x for x in inputs[:2]))
  given = sf.spectral_attention(
    *inputs, feature_map=fm, variables=variables, stats=stats
  )
  np.testing.assert_allclose(given, out, atol=1e-5)
  assert not np.allclose(far, out, atol=1e-3)


def test_the_context_has_no_gradient():
  fm, variables, query, key, _ = map_and_inputs()

  def total(key):
    return jnp.sum(fm.calibrate(variables, query, key)["rows"])

  assert (jax.grad(total)(key) == 0.0).all()


@pytest.mark.parametrize(
  ("kwargs", "leak"),
  [
    ({"is_causal": True}, "leak the future"),
    ({"segment_ids": jnp.zeros((3, 5), jnp.int32)}, "mix segments"),
  ],
)
def test_a_context_of_what_must_not_be_seen_is_refused(kwargs, leak):
  fm, variables, *inputs = map_and_inputs()
  attend = lambda **more: sf.spectral_attention(
    *inputs, feature_map=fm, variables=variables, **kwargs, **more
  )
  with pytest.raises(ValueError) as error:
    attend()
  message = str(error.value)
  for part in ("'variational'", leak, "context='learned'", "pass stats"):
    assert part in message
  assert "component" not in message and "\n" not in message
  stats = {"rows": jnp.full((1, 2, 6), 0.3)}
  assert jnp.isfinite(attend(stats=stats)).all()


def test_causal_attention_with_a_learned_context_sees_no_future():
  fm, variables, *inputs = map_and_inputs(context="learned")
  assert not fm.info.needs_stats
  assert fm.calibrate(variables, *inputs[:2]) == ()
  assert variables.params["rows"]["context"].shape == (2, 6)
  attend = quick_jit(
    lambda *inputs: sf.spectral_attention(
      *inputs, feature_map=fm, variables=variables, is_causal=True
    )
  )
  out = attend(*inputs)
  changed = attend(*(x.at[:, -1].multiply(-3.0) for x in inputs))
  # The stabiliser alone sees the last key: rounding.
  np.testing.assert_allclose(changed[:, :-1], out[:, :-1], atol=1e-5)
  assert not np.allclose(changed[:, -1], out[:, -1], atol=1e-2)


def test_features_without_a_context_are_refused():
  fm, variables, query, key, _ = map_and_inputs()
  assert fm.info.needs_stats
  for stats in (None, (), {}):
    with pytest.raises(ValueError, match="'variational' needs the context"):
      fm.log_features(variables, query, side="query", stats=stats)
  fm, variables, query, key, _ = map_and_inputs("oprf")
  stats = fm.calibrate(variables, query, key)
  assert sorted(stats) == ["component", "rows"]
  with pytest.raises(ValueError, match="'variational' needs the context"):
    fm.apply(
      variables, query, side="query", stats={"component": stats["component"]}
    )


def test_running_statistics_carry_the_context():
  fm = sf.feature_map(
    "oprf",
    "variational",
    num_features=8,
    component_kwargs={"statistics": "ema"},
  )
  layer = sf.nn.SpectralSelfAttention(
    num_heads=2, head_dim=4, feature_map=fm, is_causal=True
  )
  x = jax.random.normal(jax.random.key(0), (2, 5, 8))
  rngs = {"params": jax.random.key(1), "features": jax.random.key(2)}
  variables = quick_jit(layer.init)(rngs, x)
  running = variables["feature_stats"]["moments"]
  assert running["rows"].shape == (1, 2, 4)

  @quick_jit
  def train(variables):
    return layer.apply(
      variables, x, deterministic=False, mutable=["feature_stats"]
    )

  out, updated = train(variables)
  assert jnp.isfinite(out).all()
  moved = updated["feature_stats"]["moments"]["rows"] - running["rows"]
  assert jnp.abs(moved).min() > 0.0


@pytest.mark.parametrize("context", ["keys", "learned"])
def test_kl_is_the_divergence_of_its_rows(context):
  matrix = weight_matrices.Variational(base="iid", context=context)
  params, _ = compiled_init_and_draw(matrix, 13, 6)
  given = () if context == "learned" else jnp.linspace(-1.0, 0.8, 6)
  assert matrix.kl(params, given) == 0.0
  params = randomise(params, scale=0.3)
  kl = matrix.kl(params, given)
  value = params["context"] if context == "learned" else given
  mu, log_sigma = matrix.mean_and_log_sigma(params, value)
  assert jnp.abs(log_sigma).max() > 0.1
  rows, _ = draw_learner_rows(matrix, params, 13, 6, 1000, given)
  mu, sigma = np.asarray(mu, float), np.exp(np.asarray(log_sigma, float))
  log_ratio = (
    0.5 * rows**2 - 0.5 * ((rows - mu) / sigma) ** 2 - np.log(sigma)
  ).sum(axis=-1)
  scores = standard_scores(
    log_ratio.mean(axis=1, keepdims=True), np.array([float(kl)])
  )
  assert abs(scores[0]) < 4.0


def test_kl_takes_any_leading_axes_and_trains_the_network():
  matrix = weight_matrices.Variational()
  params, _ = compiled_init_and_draw(matrix, 13, 6)
  params = randomise(params, scale=0.3)
  context = jax.random.normal(jax.random.key(1), (3, 2, 6))
  kl = matrix.kl(params, context)
  assert kl.shape == (3, 2) and (kl > 0.0).all()
  np.testing.assert_allclose(
    kl[2, 1], matrix.kl(params, context[2, 1]), rtol=1e-5
  )
  loss = lambda params: matrix.kl(params, context).mean()
  gradient = quick_jit(jax.grad(loss))(params)
  smaller = jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient)
  assert matrix.kl(smaller, context).mean() < kl.mean()
