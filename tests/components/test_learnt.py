"""Maps with learnt kernels, and DPFP, through attention, against papers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from tests.components.helpers import build

BATCH, LENGTH, HEADS, HEAD_DIM, NUM_FEATURES = 2, 9, 2, 4, 6
MASK = np.arange(LENGTH)[None] < np.array([[5], [LENGTH]])
SEGMENT_IDS = np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0] * 5 + [1] * 4])

# Component, its number of features, and its options.
CASES = {
  "prototypes": ("prototypes", NUM_FEATURES, {}),
  "prototypes_fixed": ("prototypes", NUM_FEATURES, {"share": 0.5}),
  "learned_exp": ("learned_exp", NUM_FEATURES, {}),
  "hedgehog": ("hedgehog", NUM_FEATURES, {}),
  "t2r": ("t2r", NUM_FEATURES, {}),
  "rebased": ("rebased", None, {}),
  "dpfp": ("dpfp", None, {"nu": 2}),
}
# Rounding of float32 features, of size one, and of their sums. Squares of
# products lose more where they are small.
TOLERANCE = {"rebased": 1e-5, "dpfp": 2e-6, "t2r": 2e-6}


@functools.cache
def build_case(case):
  """Builds the map of a case, and variables of which no leaf is trivial."""
  name, num_features, kwargs = CASES[case]
  fm = build(name, "none", num_features, **kwargs)
  variables = fm.init(jax.random.key(0), head_dim=HEAD_DIM, num_heads=HEADS)
  leaves, structure = jax.tree.flatten(variables)
  rngs = jax.random.split(jax.random.key(1), max(len(leaves), 1))
  leaves = [
    leaf + 0.3 * jax.random.normal(rng, leaf.shape)
    for leaf, rng in zip(leaves, rngs, strict=False)
  ]
  return fm, structure.unflatten(leaves)


@functools.cache
def draw_inputs():
  """Draws query, key and value ``[B, T, N, H]``."""
  shape = (BATCH, LENGTH, HEADS, HEAD_DIM)
  rngs = jax.random.split(jax.random.key(2), 3)
  return tuple(jax.random.normal(rng, shape) for rng in rngs)


def softmax(scores):
  weights = np.exp(scores)
  return weights / weights.sum(-1, keepdims=True)


def paper_features(case, params, x, side):
  """Computes the features of one head, ``[B, T, H] -> [B, T, F]``, float64."""
  name, _, options = CASES[case]
  own = {
    leaf.removeprefix(f"{side}_"): np.asarray(value, np.float64)
    for leaf, value in params.items()
  }
  if name == "rebased":
    norm = (x - x.mean(-1, keepdims=True)) / np.sqrt(
      x.var(-1, keepdims=True) + 1e-5
    )
    u = own["gamma"] * norm + own["beta"]
    # All H^2 products: the same kernel as those of a <= b.
    return np.reshape(u[..., None] * u[..., None, :], (*u.shape[:-1], -1))
  if name == "dpfp":
    q = HEAD_DIM**0.25 * x
    r = np.maximum(np.concatenate([q, -q], -1), 0)
    size = r.shape[-1]
    indices = [[(i + j) % size for i in range(size)] for j in (1, 2)]
    return np.concatenate([r * r[..., index] for index in indices], -1)
  scores = x @ own["rows"].T
  if name == "hedgehog":
    return np.concatenate([softmax(scores), softmax(-scores)], -1)
  scores = scores + own.get("bias", 0.0)
  if name == "t2r":
    return np.maximum(scores, 0) + 1e-6
  if side == "key" and name == "prototypes":
    share = own["share"] if "share" in own else options["share"]
    return np.exp(scores) / np.exp(scores).sum(-1, keepdims=True) ** share
  return np.exp(scores)


def expected_output(case, visible):
  """Computes attention from its T x S weights in float64.

  Args:
    case: see `CASES`.
    visible: bool, broadcast against ``[B, T, S]``.
  """
  fm, variables = build_case(case)
  query, key, value = (np.asarray(x, np.float64) for x in draw_inputs())
  out = np.zeros_like(value)
  for head in range(HEADS):
    params = jax.tree.map(
      lambda leaf, head=head: np.asarray(leaf[head], np.float64),
      variables.params.get("component", {}),
    )
    phi, psi = (
      paper_features(case, params, x[:, :, head] * HEAD_DIM**-0.25, side)
      for x, side in ((query, "query"), (key, "key"))
    )
    weights = np.where(visible, phi @ np.swapaxes(psi, 1, 2), 0.0)
    total = weights.sum(-1, keepdims=True)
    # DPFP may have no product in common with any key: zeros.
    weights /= np.where(total == 0.0, 1.0, total)
    out[:, :, head] = weights @ value[:, :, head]
  return out


def check(case, out, visible, rows=np.s_[:]):
  tolerance = TOLERANCE.get(CASES[case][0], 1e-6)
  np.testing.assert_allclose(
    out[rows], expected_output(case, visible)[rows], rtol=0, atol=tolerance
  )


def attend(case, *arrays, **kwargs):
  fm, variables = build_case(case)
  run = functools.partial(
    sf.spectral_attention, feature_map=fm, variables=variables, **kwargs
  )
  return jax.jit(run)(*arrays)


CAUSAL = np.tril(np.ones((LENGTH, LENGTH), bool))


@pytest.mark.parametrize("case", CASES)
def test_attention_with_masks_is_that_of_the_paper(case):
  out = attend(case, *draw_inputs(), key_mask=MASK, query_mask=MASK)
  check(case, out, MASK[:, None], rows=MASK)
  assert (out[~MASK] == 0.0).all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.quick_every(2)
def test_causal_attention_and_decoding_are_those_of_the_paper(case):
  fm, variables = build_case(case)
  first = [x[:, :-1] for x in draw_inputs()]
  last = [x[:, -1:] for x in draw_inputs()]
  out, state = attend(case, *first, is_causal=True, return_state=True)
  step, _ = sf.decode_step(state, *last, feature_map=fm, variables=variables)
  check(case, jnp.concatenate([out, step], axis=1), CAUSAL)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.quick_every(4)
def test_packed_attention_is_that_of_the_paper(case, is_causal):
  out = attend(
    case, *draw_inputs(), segment_ids=SEGMENT_IDS, is_causal=is_causal
  )
  visible = SEGMENT_IDS[:, :, None] == SEGMENT_IDS[:, None]
  check(case, out, visible & (CAUSAL if is_causal else True))
