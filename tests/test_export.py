"""Programs saved by `jax.export`: fixed and symbolic sizes, two platforms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import spectraformer_jax as sf

FM = sf.feature_map("posrf", "orf", num_features=16)
SIZES = {"vocab_size": 16, "max_len": 200, "num_layers": 1, "head_dim": 8}


def check(function, args, batch, length, atol=1e-6):
  """Checks that an exported program equals the jitted one."""
  shapes = [
    jax.ShapeDtypeStruct((batch, length, *x.shape[2:])[: x.ndim], x.dtype)
    for x in args
  ]
  saved = export.export(jax.jit(function), platforms=["cpu", "tpu"])(*shapes)
  got, expected = saved.call(*args), jax.jit(function)(*args)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=atol)


def symbols(which):
  batch, length = export.symbolic_shape("b, t")
  return batch if "b" in which else 3, length if "t" in which else 150


@pytest.mark.quick_every(3)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("which", ["", "b", "t", "bt"])
def test_attention(which, is_causal):
  variables = FM.init(jax.random.key(1), head_dim=8)
  x = jax.random.normal(jax.random.key(0), (3, 150, 2, 8))
  attend = lambda x: sf.spectral_attention(
    x, x, x, feature_map=FM, variables=variables, is_causal=is_causal
  )
  check(attend, (x,), *symbols(which))


@pytest.mark.slow
@pytest.mark.parametrize("which", ["", "b", "t", "bt"])
@pytest.mark.parametrize(
  "exact",
  [
    {"window": 9, "num_sinks": 2, "num_heavy": 3},
    {"window": 9, "num_sinks": 2, "is_causal": True},
    {"num_heavy": 3},
  ],
)
def test_exact_keys(which, exact):
  variables = FM.init(jax.random.key(1), head_dim=8)
  x = jax.random.normal(jax.random.key(0), (3, 150, 2, 8))
  attend = lambda x: sf.spectral_attention(
    x, x, x, feature_map=FM, variables=variables, **exact
  )
  check(attend, (x,), *symbols(which))


@pytest.mark.slow
def test_gradients():
  variables = FM.init(jax.random.key(1), head_dim=8)
  x = jax.random.normal(jax.random.key(0), (3, 150, 2, 8))
  gradient = jax.grad(
    lambda x: jnp.sum(
      sf.spectral_attention(x, x, x, feature_map=FM, variables=variables) ** 2
    )
  )
  check(gradient, (x,), *symbols("b"), atol=1e-4)


@pytest.mark.quick_every(3)
@pytest.mark.parametrize("attention", ["spectral", "softmax"])
@pytest.mark.parametrize("kind", ["Classifier", "LanguageModel"])
def test_models(kind, attention):
  fm = FM if attention == "spectral" else None
  more = {"num_classes": 3} if kind == "Classifier" else {}
  model = getattr(sf.nn, kind)(
    attention=attention, feature_map=fm, **SIZES, **more
  )
  tokens = jax.random.randint(jax.random.key(0), (3, 150), 0, 16)
  length = jnp.array([150, 3, 40])
  variables = model.init(jax.random.key(1), tokens, length)
  apply = lambda *args: model.apply(variables, *args)
  check(apply, (tokens, length), *symbols("b"))
