"""The engine: values, gradients, exact causality, memory, errors."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from spectraformer_jax.attention import _spectral_attention
from tests.linear_attention.helpers import (
  CAUSAL,
  assert_close,
  build_map,
  draw_arrays,
  output_and_gradients,
)


@pytest.mark.parametrize("component", CAUSAL)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", [1, 2, 63, 100, 257])
@pytest.mark.quick_every(11)
def test_values_and_gradients_equal_the_reference(component, is_causal, length):
  fm, variables = build_map(component, **CAUSAL[component])
  arrays = draw_arrays(length, scale=0.5)
  mask = jax.random.bernoulli(jax.random.key(1), 0.7, (2, length))
  kwargs = {"is_causal": is_causal, "key_mask": mask.at[:, 0].set(True)}
  actual = output_and_gradients(arrays, fm, variables, chunk_size=16, **kwargs)
  expected = output_and_gradients(
    arrays, fm, variables, implementation="reference", **kwargs
  )
  # A signed normalizer amplifies rounding where it nearly cancels.
  assert_close(actual, expected, 2e-2 if component == "trigrf" else 5e-5)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.quick_every(2)
def test_bfloat16_inputs(is_causal):
  fm, variables = build_map()
  arrays = tuple(a.astype(jnp.bfloat16) for a in draw_arrays(100))
  exact = tuple(a.astype(jnp.float32) for a in arrays)
  out, grads = output_and_gradients(
    arrays, fm, variables, is_causal=is_causal, chunk_size=16
  )
  expected, expected_grads = output_and_gradients(
    exact, fm, variables, is_causal=is_causal, implementation="reference"
  )
  assert out.dtype == jnp.bfloat16
  assert all(g.dtype == jnp.bfloat16 for g in grads)
  as_float = lambda tree: [x.astype(jnp.float32) for x in tree]
  # One rounding to 8 bits of each result.
  assert_close(as_float([out]), [expected], 2.0**-7)
  assert_close(as_float(grads), expected_grads, 2.0**-6)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.quick_every(2)
def test_second_derivatives_equal_those_of_the_reference(is_causal):
  # The backward pass reads saved outputs; its own derivative must still depend
  # on them.
  fm, variables = build_map()
  arrays = draw_arrays(21, scale=0.5)

  def second(**options):
    loss = lambda *arrays: jnp.sum(
      jnp.sin(
        sf.spectral_attention(
          *arrays,
          feature_map=fm,
          variables=variables,
          is_causal=is_causal,
          **options,
        )
      )
    )
    gradient = jax.grad(loss, (0, 1, 2))
    slope = lambda arrays: sum(jnp.sum(jnp.cos(g)) for g in gradient(*arrays))
    return jax.jit(jax.grad(slope))(arrays)

  expected = second(implementation="reference")
  assert_close(second(chunk_size=8), expected, 1e-5)


@pytest.mark.slow
def test_learnable_parameters_take_gradients_through_every_chunk():
  fm, variables = build_map("oprf", statistics="learned")
  arrays = draw_arrays(50)

  @functools.partial(jax.jit, static_argnames="implementation")
  def grad(params, implementation):
    loss = lambda params: jnp.sum(
      sf.spectral_attention(
        *arrays,
        feature_map=fm,
        variables=variables._replace(params=params),
        is_causal=True,
        chunk_size=8,
        implementation=implementation,
      )
      ** 2
    )
    return jax.grad(loss)(params)

  actual = grad(variables.params, "xla")
  assert all(float(jnp.abs(g).min()) > 0 for g in jax.tree.leaves(actual))
  assert_close(actual, grad(variables.params, "reference"), 1e-4)


# At scale 10 exponents of trigrf spread over more than the 2^150 that one chunk
# holds: what is smaller underflows.
@pytest.mark.parametrize(
  ("component", "scale"),
  [
    ("posrf", 1.0),
    ("posrf", 10.0),
    ("oprf", 1.0),
    ("oprf", 10.0),
    ("trigrf", 1.0),
    ("trigrf", 3.0),
  ],
)
@pytest.mark.quick_every(4)
def test_the_future_changes_no_bit(component, scale):
  fm, variables = build_map(component, **CAUSAL[component])
  attend = jax.jit(
    functools.partial(
      sf.spectral_attention,
      feature_map=fm,
      variables=variables,
      is_causal=True,
      chunk_size=8,
    )
  )
  arrays = draw_arrays(30, scale=scale)
  before = attend(*arrays)
  for changed in (29, 13, 8):
    later = [a.at[:, changed:].multiply(-1.7) for a in arrays]
    after = attend(*later)
    np.testing.assert_array_equal(after[:, :changed], before[:, :changed])
    # Rows whose weights underflow are NaN, before and after.
    assert float(jnp.nanmax(jnp.abs(after - before))) > 0.0


def test_large_norms_are_accurate_in_causal_attention():
  fm, variables = build_map()
  query, key, value = draw_arrays(40, scale=8.0)
  out = sf.spectral_attention(
    query,
    key,
    value,
    feature_map=fm,
    variables=variables,
    is_causal=True,
    chunk_size=8,
  )
  w = np.asarray(variables.projection["rows"]["w"], np.float64)
  x, y, v = (np.asarray(a, np.float64) for a in (query, key, value))
  x, y = x * 4**-0.25, y * 4**-0.25
  log = lambda z: (
    np.einsum("btnh,nmh->btnm", z, w) - 0.5 * np.sum(z**2, -1, keepdims=True)
  )
  pairs = log(x)[:, :, None] + log(y)[:, None]
  causal = np.tril(np.ones((40, 40)))[None, :, :, None]
  top = np.where(causal[..., None] > 0, pairs, -np.inf).max(
    (2, 4), keepdims=True
  )
  weights = np.exp(np.minimum(pairs - top, 0.0)).sum(-1) * causal
  expected = np.einsum("btsn,bsnv->btnv", weights, v)
  expected /= weights.sum(2)[..., None]
  np.testing.assert_allclose(out, expected, atol=2e-3)


@pytest.mark.slow
def test_memory_of_forward_and_backward_does_not_hold_features():
  fm = sf.feature_map("posrf", "orf", num_features=512)
  variables = fm.init(jax.random.key(0), head_dim=4)

  def temp_bytes(length, is_causal):
    shape = jax.ShapeDtypeStruct((1, length, 1, 4), jnp.float32)
    loss = lambda *qkv: jnp.sum(
      sf.spectral_attention(
        *qkv,
        feature_map=fm,
        variables=variables,
        is_causal=is_causal,
        chunk_size=64,
      )
    )
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape)
    return compiled.compile().memory_analysis().temp_size_in_bytes

  features = 4 * fm.feature_dim  # bytes a token
  for is_causal in (False, True):
    short, long = (temp_bytes(n, is_causal) for n in (4096, 65536))
    # One array of features alone would add 2048 bytes a token.
    assert (long - short) / (65536 - 4096) < features / 8


def test_repeated_eager_calls_compile_once():
  fm, variables = build_map()
  arrays = draw_arrays(10)
  sf.spectral_attention(*arrays, feature_map=fm, variables=variables)
  before = _spectral_attention._cache_size()
  for _ in range(3):
    sf.spectral_attention(*arrays, feature_map=fm, variables=variables)
  assert _spectral_attention._cache_size() == before


@hypothesis.settings(deadline=None, max_examples=25, derandomize=True)
@hypothesis.given(
  seed=st.integers(0, 2**16),
  scale=st.sampled_from([0.0, 0.1, 1.0, 30.0, 1e3]),
  fill=st.sampled_from([0.0, 1e30, float("nan"), float("-inf")]),
  hidden=st.integers(0, 12),
  is_causal=st.booleans(),
)
def test_padding_never_matters(seed, scale, fill, hidden, is_causal):
  fm, variables = build_map()
  rngs = jax.random.split(jax.random.key(seed), 3)
  query, key = (scale * jax.random.normal(r, (1, 12, 2, 4)) for r in rngs[:2])
  value = jax.random.normal(rngs[2], (1, 12, 2, 3))
  mask = jnp.arange(12)[None, :] < 12 - hidden
  padded = (jnp.where(mask[:, :, None, None], a, fill) for a in (key, value))
  clean = (jnp.where(mask[:, :, None, None], a, 0.0) for a in (key, value))
  outs = [
    sf.spectral_attention(
      query,
      *kv,
      feature_map=fm,
      variables=variables,
      key_mask=mask,
      is_causal=is_causal,
      chunk_size=4,
    )
    for kv in (padded, clean)
  ]
  np.testing.assert_array_equal(*outs)
  # At larger scales the weights of a causal query may underflow: then it is NaN
  # (docs/attention.md).
  if scale <= 1.0 or not is_causal:
    assert bool(jnp.isfinite(outs[0]).all())


@hypothesis.settings(deadline=None, max_examples=15, derandomize=True)
@hypothesis.given(seed=st.integers(0, 2**16))
def test_order_of_keys_does_not_matter(seed):
  fm, variables = build_map()
  query, key, value = draw_arrays(12)
  order = jax.random.permutation(jax.random.key(seed), 12)
  kwargs = {"feature_map": fm, "variables": variables}
  assert_close(
    sf.spectral_attention(query, key[:, order], value[:, order], **kwargs),
    sf.spectral_attention(query, key, value, **kwargs),
  )


@pytest.mark.parametrize(
  ("kwargs", "words"),
  [
    ({"segment_ids": "ids", "return_state": True}, "cannot be combined"),
    ({"initial_state": "wrong"}, "initial_state must have"),
    ({"segment_ids": "short"}, "segment_ids must be"),
  ],
)
def test_errors(kwargs, words):
  fm, variables = build_map()
  arrays = draw_arrays(10)
  stand_ins = {
    "ids": jnp.zeros((2, 10), int),
    "short": jnp.zeros((2, 9), int),
    "wrong": sf.init_state(
      fm, variables, batch_size=3, num_heads=2, head_dim=4, value_dim=3
    ),
  }
  kwargs = {
    name: stand_ins.get(x, x) if isinstance(x, str) else x
    for name, x in kwargs.items()
  }
  with pytest.raises(ValueError, match=words):
    sf.spectral_attention(
      *arrays, feature_map=fm, variables=variables, is_causal=True, **kwargs
    )
  with pytest.raises(ValueError, match="decode_step takes one token"):
    sf.decode_step(
      stand_ins["wrong"], *arrays, feature_map=fm, variables=variables
    )


def test_packed_rows_refuse_statistics_of_the_whole_row():
  fm, variables = build_map("oprf")
  ids = jnp.zeros((2, 10), int)
  with pytest.raises(ValueError, match="mix segments"):
    sf.spectral_attention(
      *draw_arrays(10), feature_map=fm, variables=variables, segment_ids=ids
    )
