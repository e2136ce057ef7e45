"""Packed rows and grouped queries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from tests.linear_attention.helpers import (
  assert_close,
  build_map,
  draw_arrays,
  output_and_gradients,
)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("component", ["posrf", "trigrf"])
@pytest.mark.quick_every(4)
def test_packed_rows_equal_separate_rows(is_causal, component):
  fm, variables = build_map(component)
  query, key, value = draw_arrays(24, batch=1, scale=0.5)
  ids = jnp.array([[3] * 5 + [7] * 1 + [8] * 12 + [9] * 6])
  out, grads = output_and_gradients(
    (query, key, value),
    fm,
    variables,
    is_causal=is_causal,
    segment_ids=ids,
    chunk_size=4,
  )
  tolerance = 1e-2 if component == "trigrf" else 3e-5
  for segment in (3, 7, 8, 9):
    own = np.flatnonzero(np.asarray(ids[0]) == segment)
    alone = sf.spectral_attention(
      query[:, own],
      key[:, own],
      value[:, own],
      feature_map=fm,
      variables=variables,
      is_causal=is_causal,
    )
    assert_close(out[:, own], alone, tolerance)
  expected = output_and_gradients(
    (query, key, value),
    fm,
    variables,
    is_causal=is_causal,
    segment_ids=ids,
    implementation="reference",
  )
  assert_close((out, grads), expected, tolerance)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("chunk_size", [2, 4, 5, None])
def test_a_query_without_keys_in_its_segment_gives_zeros(chunk_size, is_causal):
  fm, variables = build_map("posrf")
  x, _, _ = draw_arrays(12, batch=1, scale=0.5)
  ids = jnp.array([[0] * 6 + [1] * 2 + [2] * 3 + [3]])
  key_mask = jnp.ones((1, 12), bool).at[0, jnp.array([6, 8, 9, 11])].set(False)
  attend = functools.partial(
    sf.spectral_attention,
    x,
    x,
    x,
    feature_map=fm,
    variables=variables,
    segment_ids=ids,
    key_mask=key_mask,
    is_causal=is_causal,
  )
  out = attend(chunk_size=chunk_size)
  # 2e-5 of the largest output: float32 sums in another order.
  assert_close(out, attend(implementation="reference"), 2e-5)
  sees_none = (6, 8, 9, 11) if is_causal else (11,)
  assert not np.any(out[:, sees_none])


def normalizer_share(fm, variables, query, key, sees):
  """The normalizer of each query of trigrf over its sum of absolute weights.

  Returns:
    ``[B, T, N]``, float64.
  """

  def features(x, side):
    scaled = x * x.shape[-1] ** -0.25
    found = fm.log_features(variables, scaled, side=side)
    # The exponent of a token is one for all its features, [B, T, N, 1].
    return np.float64(found.log_magnitude), np.float64(found.factor)

  _, phi = features(query, "query")
  exponent, psi = features(key, "key")
  exponent = np.where(sees[..., None, None], exponent[:, None], -np.inf)
  # Relative to the largest key that a query sees: [B, T, S, N, F].
  psi = np.exp(exponent - exponent.max(2, keepdims=True)) * psi[:, None]
  total = lambda phi, psi: np.einsum("btnf,btsnf->btn", phi, psi)
  return abs(total(phi, psi)) / total(abs(phi), abs(psi))


SCALES = {"posrf": (1.0, 60.0), "trigrf": (20.0, 1.0)}


@pytest.mark.parametrize(
  "implementation, is_causal, chunk_size",
  [
    ("xla", False, None),
    ("xla", True, 1),
    ("xla", False, 5),
    ("reference", False, None),
  ],
)
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("component", ["posrf", "trigrf"])
@pytest.mark.quick_every(14)
def test_segments_of_other_scales_do_not_push_each_other_out(
  implementation, is_causal, chunk_size, backwards, component
):
  fm, variables = build_map(component)
  query, key, value = draw_arrays(36, batch=2, scale=1.0)
  big, small = jnp.array(SCALES[component][:: -1 if backwards else 1])
  # Within a segment all have one scale; the second example has three segments
  # in one chunk, some of one position.
  ids = jnp.array([[0] * 18 + [1] * 18, [0] * 16 + [1] + [2] + [3] * 18])
  factor = jnp.where(ids % 2 == 0, big, small)[:, :, None, None]
  arrays = (query * factor, key * factor, value)
  options = {"is_causal": is_causal, "implementation": implementation}
  is_known = np.ones(query.shape[:3], bool)
  if component == "trigrf":
    sees = np.asarray(ids[:, :, None] == ids[:, None])
    if is_causal:
      sees = sees & np.tri(36, dtype=bool)
    # Cosines of angles of about 100 are off by 1e-5, and so is a normalizer
    # relative to the absolute weights that cancel in it.
    share = normalizer_share(fm, variables, *arrays[:2], sees)
    is_known = share > 1e-3
    assert np.mean(is_known) > 0.98
  is_known = is_known[..., None]
  out, grads = output_and_gradients(
    arrays,
    fm,
    variables,
    segment_ids=ids,
    chunk_size=chunk_size,
    is_counted=is_known,
    **options,
  )
  weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
  weights *= is_known

  def alone(arrays, example, own):
    part = [x[example : example + 1, own] for x in arrays]
    out = sf.spectral_attention(
      *part,
      feature_map=fm,
      variables=variables,
      is_causal=is_causal,
      chunk_size=chunk_size,
    )
    return jnp.sum(out[0] * weights[example, own]), out

  tolerance = 2e-2 if component == "trigrf" else 1e-4
  for example in range(2):
    for segment in range(4):
      own = np.flatnonzero(np.asarray(ids[example]) == segment)
      if not own.size:
        continue
      expected_grads, expected = jax.grad(alone, has_aux=True)(
        arrays, example, own
      )
      assert jnp.all(expected != 0.0)
      known = is_known[example, own]
      assert_close(out[example, own] * known, expected[0] * known, tolerance)
      for got, want in zip(grads, expected_grads, strict=True):
        top = max(1.0, float(jnp.max(jnp.abs(want))))
        np.testing.assert_allclose(
          got[example, own], want[example, own], atol=tolerance * top
        )


@pytest.mark.slow
def test_segments_need_not_be_contiguous_and_may_differ_in_length():
  fm, variables = build_map()
  arrays = draw_arrays(10, keys=14)
  ids = (
    jnp.tile(jnp.arange(10) % 3, (2, 1)),
    jnp.tile(jnp.arange(14) % 4, (2, 1)),
  )
  mask = jnp.tile(jnp.arange(14) != 5, (2, 1))
  kwargs = {"segment_ids": ids, "key_mask": mask}
  actual = output_and_gradients(arrays, fm, variables, chunk_size=4, **kwargs)
  expected = output_and_gradients(
    arrays, fm, variables, implementation="reference", **kwargs
  )
  assert_close(actual, expected)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.quick_every(4)
def test_grouped_queries_equal_repeated_keys(is_causal, packed):
  fm, variables = build_map()
  query, key, value = draw_arrays(20, heads=6)
  kwargs = {"is_causal": is_causal, "chunk_size": 8}
  if packed:
    kwargs["segment_ids"] = jnp.tile(jnp.arange(20) // 7, (2, 1))
  out, grads = output_and_gradients(
    (query, key, value), fm, variables, **kwargs
  )
  repeated = jax.tree.map(lambda x: jnp.repeat(x, 3, axis=0), variables)
  expected, expected_grads = output_and_gradients(
    (query, jnp.repeat(key, 3, axis=2), jnp.repeat(value, 3, axis=2)),
    fm,
    repeated,
    **kwargs,
  )
  assert_close(out, expected)
  summed = [expected_grads[0]] + [
    g.reshape(*g.shape[:2], 2, 3, -1).sum(3) for g in expected_grads[1:]
  ]
  assert_close(list(grads), summed)


@pytest.mark.slow
def test_statistics_for_grouped_queries_are_those_of_their_keys():
  fm, variables = build_map("oprf")
  query, key, value = draw_arrays(20, heads=4)
  mask = jnp.arange(20)[None, :] < jnp.array([[15], [20]])
  out = sf.spectral_attention(
    query, key, value, feature_map=fm, variables=variables, key_mask=mask
  )
  # Query heads 0 and 1 share key head 0, whose visible keys alone count.
  keys = key[:, :, :1] * 4**-0.25
  stats = fm.calibrate(
    fm.init(jax.random.key(0), head_dim=4),
    keys,
    keys,
    key_mask=mask,
    query_mask=mask,
  )
  head = jax.tree.map(lambda x: x[:1], variables)
  expected = sf.spectral_attention(
    query[:, :, :2],
    key[:, :, :1],
    value[:, :, :1],
    feature_map=fm,
    variables=head,
    stats=stats,
    key_mask=mask,
  )
  assert_close(out[:, :, :2], expected)
