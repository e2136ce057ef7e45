"""Baselines: exact in their limits, and independent of padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from spectraformer_jax import baselines

LENGTH, HEADS, HEAD_DIM = 12, 2, 4
REAL = np.array([12, 7, 1])


def draw_inputs(length=LENGTH, dtype=jnp.float32):
  """Draws query, key and value, and returns a ragged mask."""
  shape = (3, 3, length, HEADS, HEAD_DIM)
  mask = jnp.arange(length)[None] < REAL[:, None]
  return *jax.random.normal(jax.random.key(0), shape).astype(dtype), mask


def linformer(query, key, value, **kwargs):
  projections = baselines.linformer_projections(
    jax.random.key(1), num_heads=HEADS, max_len=40, projected_length=5
  )
  return baselines.linformer_attention(
    query, key, value, **projections, **kwargs
  )


def with_defaults(baseline):
  """A baseline with its default options and, if any, new parameters."""

  def attend(query, key, value, **kwargs):
    params = {}
    if baseline.init_params:
      params = baseline.init_params(
        jax.random.key(1), num_heads=HEADS, max_len=40
      )
    return baseline.attend(query, key, value, **params, **kwargs)

  return attend


# Every baseline, with smaller options than its defaults where they are named.
ATTENDS = {
  name: with_defaults(baseline)
  for name, baseline in baselines.BASELINES.items()
} | {
  "softmax": sf.exact_attention,
  "gaussian": functools.partial(sf.exact_attention, kernel="gaussian"),
  "linformer": linformer,
  "local": functools.partial(baselines.local_attention, block_size=4),
  "local_neighbours": functools.partial(
    baselines.local_attention, block_size=3, neighbours=1
  ),
  "local_causal": functools.partial(
    baselines.local_attention, block_size=3, neighbours=1, is_causal=True
  ),
  "nystromformer": functools.partial(
    baselines.nystromformer_attention, num_landmarks=4
  ),
  "skyformer": functools.partial(
    baselines.skyformer_attention, num_landmarks=6
  ),
}
# Jitted, because one program for each is quicker than op-by-op.
ATTENDS = {name: jax.jit(attend) for name, attend in ATTENDS.items()}
every = pytest.mark.parametrize("name", ATTENDS)


def fill(array, mask, poison):
  """Replaces the padding of an array."""
  return jnp.where(mask[:, :, None, None], array, poison)


@every
@pytest.mark.parametrize("poison", [jnp.nan, 1e4])
@pytest.mark.quick_every(3)
def test_content_of_padding_changes_nothing(name, poison):
  *qkv, mask = draw_inputs()
  # Without a mask of queries, padded queries have outputs.
  of_keys = name in ("softmax", "gaussian", "linformer")

  @jax.jit
  def run(poison):
    def loss(query, key, value):
      if not of_keys:
        query = fill(query, mask, poison)
      key, value = fill(key, mask, poison), fill(value, mask, poison)
      out = ATTENDS[name](query, key, value, key_mask=mask)
      out = fill(out, mask, 0.0)
      return jnp.sum(jnp.sin(out)), out

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*qkv)

  for poisoned, clean in zip(
    jax.tree.leaves(run(poison)), jax.tree.leaves(run(0.0)), strict=True
  ):
    assert bool(jnp.all(jnp.isfinite(clean)))
    np.testing.assert_allclose(poisoned, clean, atol=1e-6)


@every
@pytest.mark.quick_every(3)
def test_amount_of_padding_changes_nothing(name):
  *qkv, mask = draw_inputs()
  out = ATTENDS[name](*qkv, key_mask=mask)
  pad = ((0, 0), (0, 7), (0, 0), (0, 0))
  longer = ATTENDS[name](
    *(jnp.pad(a, pad, constant_values=3.0) for a in qkv),
    key_mask=jnp.pad(mask, pad[:2]),
  )
  np.testing.assert_allclose(
    fill(longer[:, :LENGTH], mask, 0.0), fill(out, mask, 0.0), atol=2e-6
  )


@every
@pytest.mark.quick_every(3)
def test_batch_neighbours_change_nothing(name):
  *qkv, mask = draw_inputs()
  out = ATTENDS[name](*qkv, key_mask=mask)
  loud = [a.at[0].multiply(30.0) for a in qkv]
  with_loud = ATTENDS[name](*loud, key_mask=mask)
  np.testing.assert_allclose(with_loud[1:], out[1:], atol=1e-6)
  alone = ATTENDS[name](*(a[1:2] for a in qkv), key_mask=mask[1:2])
  np.testing.assert_allclose(alone, out[1:2], atol=1e-6)


@every
@pytest.mark.quick_every(3)
def test_a_row_without_keys_gives_zeros_and_no_nan(name):
  *qkv, mask = draw_inputs()
  mask = mask.at[1].set(False)
  run = lambda *qkv: ATTENDS[name](*qkv, key_mask=mask)
  np.testing.assert_array_equal(run(*qkv)[1], 0.0)
  grads = jax.jit(jax.grad(lambda *a: run(*a).sum(), argnums=(0, 1, 2)))(*qkv)
  assert all(bool(jnp.all(jnp.isfinite(g))) for g in grads)


@every
@pytest.mark.quick_every(3)
def test_output_has_the_dtype_of_value(name):
  *qkv, mask = draw_inputs(dtype=jnp.bfloat16)
  out = ATTENDS[name](*qkv, key_mask=mask)
  assert out.dtype == jnp.bfloat16 and out.shape == qkv[2].shape
  full = ATTENDS[name](*(a.astype(jnp.float32) for a in qkv), key_mask=mask)
  # One rounding of the output; those of the inputs are in both.
  np.testing.assert_allclose(
    out.astype(jnp.float32), full, rtol=2**-8, atol=1e-3
  )


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("block_size", [12, 16])
@pytest.mark.quick_every(3)
def test_local_with_one_block_is_exact(block_size, is_causal):
  *qkv, mask = draw_inputs()
  kwargs = {"key_mask": mask, "is_causal": is_causal}
  out = baselines.local_attention(*qkv, block_size=block_size, **kwargs)
  exact = fill(sf.exact_attention(*qkv, **kwargs), mask, 0.0)
  np.testing.assert_allclose(fill(out, mask, 0.0), exact, atol=1e-6)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("neighbours", [0, 1, 9])
@pytest.mark.quick_every(4)
def test_local_sees_its_blocks_and_no_others(neighbours, is_causal):
  q, k, v, _ = draw_inputs(length=11)
  block = np.arange(11) // 3
  sees = np.abs(block[:, None] - block[None]) <= neighbours
  if is_causal:
    sees &= np.tri(11, dtype=bool)
  scores = np.einsum("btnh,bsnh->bnts", q, k) / HEAD_DIM**0.5
  weights = np.exp(scores) * sees
  weights /= weights.sum(-1, keepdims=True)
  out = baselines.local_attention(
    q, k, v, block_size=3, neighbours=neighbours, is_causal=is_causal
  )
  np.testing.assert_allclose(
    out, np.einsum("bnts,bsnv->btnv", weights, v), atol=1e-5
  )


def test_linformer_with_identity_is_exact():
  q, k, v, _ = draw_inputs()
  identity = jnp.tile(jnp.eye(LENGTH, 20)[None], (HEADS, 1, 1))
  out = baselines.linformer_attention(q, k, v, key_projection=identity)
  np.testing.assert_allclose(out, sf.exact_attention(q, k, v), atol=1e-6)


def test_linformer_uses_both_projections():
  q, k, v, _ = draw_inputs()
  params = baselines.linformer_projections(
    jax.random.key(1),
    num_heads=HEADS,
    max_len=LENGTH,
    projected_length=3,
    share_key_value=False,
  )
  assert sorted(params) == ["key_projection", "value_projection"]
  e, f = (np.asarray(params[f"{n}_projection"]) for n in ("key", "value"))
  assert abs(e.var() * 3 - 1) < 0.5
  scores = np.einsum("btnh,nps,bsnh->bntp", q, e, k) / HEAD_DIM**0.5
  weights = np.asarray(jax.nn.softmax(scores))
  expected = np.einsum("bntp,nps,bsnv->btnv", weights, f, v)
  out = baselines.linformer_attention(q, k, v, **params)
  np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("num_landmarks", [12, 17])
@pytest.mark.quick_every(2)
def test_nystromformer_with_all_landmarks_is_exact(num_landmarks):
  *qkv, mask = draw_inputs()
  # Keys that are far apart, so that the inverse converges.
  qkv[0] = qkv[1] = 4.0 * qkv[1]
  out = baselines.nystromformer_attention(
    *qkv, num_landmarks=num_landmarks, iterations=30, key_mask=mask
  )
  exact = fill(sf.exact_attention(*qkv, key_mask=mask), mask, 0.0)
  # float32 times the condition number of the landmarks' matrix.
  np.testing.assert_allclose(fill(out, mask, 0.0), exact, atol=1e-3)


@pytest.mark.slow
def test_nystromformer_landmarks_are_means_of_real_segments():
  q, k, v, mask = draw_inputs()
  out = baselines.nystromformer_attention(
    q, k, v, num_landmarks=3, iterations=30, key_mask=mask
  )
  row, real = 1, 7
  x, y = (np.asarray(a[row, :real]) / HEAD_DIM**0.25 for a in (q, k))
  parts = [np.arange(real)[np.arange(real) * 3 // real == i] for i in range(3)]
  x_mean, y_mean = (np.stack([a[p].mean(0) for p in parts]) for a in (x, y))
  soft = lambda a, b: np.asarray(
    jax.nn.softmax(np.einsum("tnh,snh->nts", a, b), axis=-1)
  )
  weights = (
    soft(x, y_mean) @ np.linalg.pinv(soft(x_mean, y_mean)) @ soft(x_mean, y)
  )
  expected = np.einsum("nts,snv->tnv", weights, v[row, :real])
  np.testing.assert_allclose(out[row, :real], expected, rtol=1e-3, atol=1e-3)


def gaussian_sums(q, k, v):
  """Computes ``C(Q, K) V``, not normalised."""
  x, y = (np.asarray(a, np.float64) / HEAD_DIM**0.25 for a in (q, k))
  difference = x[:, :, None] - y[:, None]
  weights = np.exp(-0.5 * np.sum(difference**2, axis=-1))
  return np.einsum("btsn,bsnv->btnv", weights, v)


@pytest.mark.parametrize("num_landmarks", [24, 30])
@pytest.mark.quick_every(2)
def test_skyformer_with_all_landmarks_is_exact(num_landmarks):
  q, k, v, _ = draw_inputs()
  q, k = 2.0 * q, 2.0 * k
  out = baselines.skyformer_attention(
    q,
    k,
    v,
    num_landmarks=num_landmarks,
    regularisation=1e-5,
    iterations=30,
  )
  np.testing.assert_allclose(out, gaussian_sums(q, k, v), atol=1e-3)


@pytest.mark.slow
def test_skyformer_gets_better_with_landmarks():
  q, k, v, _ = draw_inputs()
  attend = jax.jit(
    baselines.skyformer_attention, static_argnames="num_landmarks"
  )
  exact = gaussian_sums(q, k, v)
  errors = [
    float(np.mean((attend(q, k, v, num_landmarks=m) - exact) ** 2))
    for m in (2, 8, 24)
  ]
  assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2], errors


@pytest.mark.parametrize(
  ("attend", "kwargs", "words"),
  [
    (baselines.local_attention, {"block_size": 0}, "block_size must be"),
    (baselines.local_attention, {"neighbours": -1}, "neighbours must be"),
    (baselines.nystromformer_attention, {"num_landmarks": 0}, "num_landmarks"),
    (baselines.nystromformer_attention, {"iterations": 0}, "iterations must"),
    (baselines.skyformer_attention, {"num_landmarks": 5}, "even .* got 5"),
    (baselines.skyformer_attention, {"regularisation": 0.0}, "regularisation"),
    (
      baselines.linformer_attention,
      {"key_projection": jnp.ones((HEADS, 3, 8))},
      "the sequence has 12 positions",
    ),
    (
      baselines.linformer_attention,
      {"key_projection": jnp.ones((3, 12))},
      "must be .heads, projected, length.",
    ),
  ],
)
def test_errors(attend, kwargs, words):
  q, k, v, _ = draw_inputs()
  with pytest.raises(ValueError, match=words):
    attend(q, k, v, **kwargs)


def test_options_are_checked_by_name():
  with pytest.raises(ValueError, match="Did you mean 'block_size'"):
    baselines.check_options("local", {"blok_size": 3})
  with pytest.raises(ValueError, match="'softmax' has no option 'a'.*none"):
    baselines.check_options("softmax", {"a": 3})
  with pytest.raises(ValueError, match="cannot be causal"):
    baselines.check_options("linformer", {}, is_causal=True)
  baselines.check_options("local", {}, is_causal=True)


@pytest.mark.parametrize("name", baselines.BASELINES)
def test_empty_sequences_give_empty_outputs(name):
  *empty, mask = draw_inputs(length=0)
  attend = (
    linformer if name == "linformer" else baselines.BASELINES[name].attend
  )
  assert attend(*empty, key_mask=mask).shape == (3, 0, HEADS, HEAD_DIM)
