"""Every public operation lowers for cpu, cuda and tpu, values and gradients.

Lowering needs no device; it finds primitives that a platform lacks.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

import spectraformer_jax as sf
from tests.helpers import smallest_map

pytestmark = pytest.mark.filterwarnings(
  "ignore:.* has the variance:UserWarning"
)

PLATFORMS = ("cpu", "cuda", "tpu")
HEADS, HEAD_DIM = 2, 8
X = jax.ShapeDtypeStruct((1, 12, HEADS, HEAD_DIM), jnp.bfloat16)
RNG = jax.eval_shape(lambda: jax.random.key(0))


def lower(function, *args):
  """Lowers for all platforms; raises if an operation has no rule on one."""
  jax.jit(function).trace(*args).lower(lowering_platforms=PLATFORMS)


def build(component="posrf", matrix="orf"):
  """Returns a map, its `init`, and the shapes of its variables."""
  fm = smallest_map(component, matrix, head_dim=HEAD_DIM)
  draw = lambda rng: fm.init(rng, head_dim=HEAD_DIM, num_heads=HEADS)
  return fm, draw, jax.eval_shape(draw, RNG)


def partner(component=None, matrix=None):
  """Returns the simplest partner that fits a component or a matrix."""
  for c, m in (
    (component or "posrf", matrix or "orf"),
    *sf.list_feature_maps(),
  ):
    wanted = component in (None, c) and matrix in (None, m)
    if wanted and (c, m) in sf.list_feature_maps():
      return c, m
  raise AssertionError


def floats(tree):
  """Returns the sum of all float leaves, to differentiate."""
  return sum(
    jnp.sum(x.astype(jnp.float32))
    for x in jax.tree.leaves(tree)
    if jnp.issubdtype(x.dtype, jnp.floating)
  )


@pytest.mark.slow
@pytest.mark.parametrize("matrix", sf.list_weight_matrices())
def test_weight_matrices(matrix):
  fm, draw, variables = build(*partner(matrix=matrix))
  lower(draw, RNG)
  if fm.weight_matrix.info.redrawable:
    lower(fm.redraw, RNG, variables)


@pytest.mark.slow
@pytest.mark.parametrize("component", sf.list_components())
def test_components(component):
  fm, _, variables = build(*partner(component=component))

  def everything(x, variables):
    maps = {"feature_map": fm, "variables": variables}
    wide = x.astype(jnp.float32)
    stats = fm.calibrate(variables, wide, wide)
    return floats(
      [
        sf.spectral_attention(x, x, x, **maps),
        fm.apply(variables, wide, side="query", stats=stats),
        fm.log_features(variables, wide, side="key", stats=stats),
        {}
        if fm.info.learnable
        else fm.kernel(variables, wide, wide, stats=stats),
      ]
    )

  lower(jax.grad(everything, argnums=(0, 1), allow_int=True), X, variables)


KEY_MASK = jax.ShapeDtypeStruct(X.shape[:2], jnp.bool_)
SEGMENTS = jax.ShapeDtypeStruct(X.shape[:2], jnp.int32)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("packed", [False, True])
def test_attention(is_causal, implementation, packed):
  kwargs = {"is_causal": is_causal, "implementation": implementation}
  fm, _, variables = build()

  def loss(x, variables, key_mask, segment_ids):
    masks = {"key_mask": key_mask, "segment_ids": segment_ids}
    maps = {"feature_map": fm, "variables": variables}
    return floats(
      [
        sf.spectral_attention(x, x, x, **maps, **masks, **kwargs),
        sf.linear_attention(jnp.exp(x), jnp.exp(x), x, **masks, **kwargs),
        sf.exact_attention(x, x, x, is_causal=is_causal, **masks),
      ]
    )

  segment_ids = SEGMENTS if packed else None
  lower(jax.grad(loss), X, variables, KEY_MASK, segment_ids)


def test_decoding():
  fm, _, variables = build()

  def decode(x, variables):
    maps = {"feature_map": fm, "variables": variables}
    sizes = {"batch_size": 1, "num_heads": HEADS, "head_dim": HEAD_DIM}
    state = sf.init_state(fm, variables, **sizes)
    one = x[:, :1]
    out, state = sf.decode_step(state, one, one, one, **maps)
    return out, state, sf.implied_attention_weights(x, x, **maps)

  lower(decode, X, variables)


@pytest.mark.parametrize("is_causal", [False, True])
def test_sequence_parallel(is_causal):
  fm, _, variables = build()
  mesh = AbstractMesh((4,), ("sequence",))

  def loss(x, variables):
    return floats(
      sf.sequence_parallel_attention(
        *(x, x, x),
        mesh=mesh,
        axis="sequence",
        feature_map=fm,
        variables=variables,
        is_causal=is_causal,
      )
    )

  lower(jax.grad(loss), X, variables)


@pytest.mark.parametrize(
  "kind", [sf.nn.Classifier, sf.nn.LanguageModel, sf.nn.MaskedLanguageModel]
)
def test_models(kind):
  fm = build()[0]
  sizes = {"embed_dim": 8, "head_dim": HEAD_DIM, "mlp_dim": 8, "max_len": 16}
  if kind is sf.nn.Classifier:
    sizes["num_classes"] = 3
  model = kind(vocab_size=7, feature_map=fm, **sizes)
  tokens = jax.ShapeDtypeStruct((2, 12), jnp.int32)
  length = jax.ShapeDtypeStruct((2,), jnp.int32)
  variables = jax.eval_shape(model.init, RNG, tokens, length)

  def loss(params, variables, rng, tokens, length):
    return floats(
      model.apply(
        {**variables, "params": params},
        *(tokens, length),
        deterministic=False,
        rngs={"dropout": rng},
      )
    )

  params = variables["params"]
  lower(jax.grad(loss), params, variables, RNG, tokens, length)
  if kind is sf.nn.LanguageModel:
    generate = lambda variables, tokens: sf.nn.generate(
      model, variables, tokens, num_tokens=3
    )
    lower(generate, variables, tokens)
