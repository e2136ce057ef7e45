"""Attention inside `jax.shard_map`, and on meshes with Explicit axes.

A process of its own, which runs this file, has eight virtual devices.
"""

import functools
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import spectraformer_jax as sf
from spectraformer_jax.baselines import BASELINES

BATCH, LENGTH, HEADS, HEAD_DIM = 4, 70, 4, 8
CASES = {
  "posrf": {},
  "posrf causal": {"is_causal": True},
  "posrf packed": {"segment_ids": np.arange(LENGTH)[None] // 20},
  "posrf packed causal": {
    "segment_ids": np.arange(LENGTH)[None] // 20,
    "is_causal": True,
  },
  "posrf exact keys": {"window": 5, "num_sinks": 2, "num_heavy": 3},
  "posrf exact keys causal": {"window": 5, "num_sinks": 2, "is_causal": True},
  "posrf exact keys packed": {
    "window": (5, 2),
    "num_sinks": 2,
    "segment_ids": np.arange(LENGTH)[None] // 20,
  },
  "oprf masked": {"key_mask": np.arange(LENGTH)[None] < 50},
  "local masked": {"key_mask": np.arange(LENGTH)[None] < 50},
  "nystromformer masked": {
    "key_mask": np.arange(LENGTH)[None] < 50,
    "num_landmarks": 4,
  },
  "skyformer masked": {
    "key_mask": np.arange(LENGTH)[None] < 50,
    "num_landmarks": 4,
  },
  "linformer": {
    "key_projection": np.random.default_rng(0).normal(size=(HEADS, 5, LENGTH))
  },
}
MASKS = {"key_mask", "segment_ids"}


def attention_of(name):
  """Returns the attention of a case, as a function of x."""
  operation, kwargs = name.split()[0], dict(CASES[name])
  if operation in BASELINES:
    attend = BASELINES[operation].attend
  else:
    fm = sf.feature_map(operation, "orf", num_features=16)
    variables = fm.init(jax.random.key(1), head_dim=HEAD_DIM, num_heads=HEADS)
    attend = functools.partial(
      sf.spectral_attention, feature_map=fm, variables=variables
    )

  def attention(x):
    masks = {
      name: jnp.broadcast_to(jnp.asarray(kwargs[name]), x.shape[:2])
      for name in MASKS & kwargs.keys()
    }
    return attend(x, x, x, **{**kwargs, **masks})

  return attention


def relative(got, expected):
  """Returns the largest difference, relative to the largest number."""
  got, expected = np.asarray(got), np.asarray(expected)
  return float(np.abs(got - expected).max() / np.abs(expected).max())


def collectives(compiled):
  return re.findall(
    r"= \S+ (all-gather|all-to-all|collective-permute)", compiled.as_text()
  )


def on_mesh(name, kind):
  """Measures values and gradients on a mesh: errors, sharding, collectives."""
  mesh = jax.make_mesh((4, 2), ("b", "h"), axis_types=2 * (AxisType[kind],))
  attention = attention_of(name)
  gradient = jax.grad(lambda x: jnp.sum(attention(x) ** 2))
  x = jax.random.normal(jax.random.key(0), (BATCH, LENGTH, HEADS, HEAD_DIM))
  sharding = NamedSharding(mesh, P("b", None, "h", None))
  placed = jax.device_put(x, sharding)
  results = []
  for function in (attention, gradient):
    compiled = jax.jit(function).lower(placed).compile()
    out = compiled(placed)
    results.append(
      {
        "difference": relative(out, jax.jit(function)(x)),
        "same_sharding": out.sharding.is_equivalent_to(sharding, 4),
        "collectives": collectives(compiled),
      }
    )
  return results


def in_shard_map(name):
  """Measures errors of values and gradients inside `jax.shard_map`."""
  mesh = jax.make_mesh((4,), ("b",), axis_types=(AxisType.Auto,))
  attention = attention_of(name)
  gradient = jax.grad(lambda x: jnp.sum(attention(x) ** 2))
  x = jax.random.normal(jax.random.key(0), (BATCH, LENGTH, HEADS, HEAD_DIM))
  results = []
  for function in (attention, gradient):
    inside = jax.shard_map(
      function, mesh=mesh, in_specs=P("b"), out_specs=P("b")
    )
    results.append(relative(jax.jit(inside)(x), jax.jit(function)(x)))
  return results


def models_in_shard_map():
  """Measures errors of a classifier, its gradients, and generated tokens."""
  mesh = jax.make_mesh((2,), ("b",), axis_types=(AxisType.Auto,))
  fm = sf.feature_map("posrf", "orf", num_features=16)
  sizes = {"vocab_size": 16, "max_len": 24, "num_layers": 1, "head_dim": 8}
  classifier = sf.nn.Classifier(num_classes=3, feature_map=fm, **sizes)
  model = sf.nn.LanguageModel(feature_map=fm, **sizes)
  tokens = jax.random.randint(jax.random.key(0), (4, 12), 0, 16)
  length = jnp.array([12, 3, 8, 5])
  weights = classifier.init(jax.random.key(1), tokens, length)
  variables = model.init(jax.random.key(1), tokens)

  def divided(function, *args, out):
    specs = (P(), *(len(args) - 1) * [P("b")])
    return jax.jit(
      jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out)
    )(*args)

  def loss(params, tokens, length):
    every = {**weights, "params": params}
    logits = classifier.apply(every, tokens, length)
    return jax.lax.psum(jnp.sum(logits**2), "b")

  def plain_loss(params, tokens, length):
    logits = classifier.apply({**weights, "params": params}, tokens, length)
    return jnp.sum(logits**2)

  args = (weights["params"], tokens, length)
  got = divided(jax.grad(loss), *args, out=P())
  expected = jax.grad(plain_loss)(*args)
  write = lambda variables, tokens: sf.nn.generate(
    model, variables, tokens, num_tokens=4
  )
  return {
    "gradients": max(
      jax.tree.leaves(
        jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), got, expected)
      )
    ),
    "tokens": bool(
      (
        divided(write, variables, tokens, out=P("b"))
        == write(variables, tokens)
      ).all()
    ),
  }


def sequence_parallel():
  """Measures errors on an Explicit mesh, for arrays on it and off it."""
  mesh = jax.make_mesh((2, 4), ("b", "s"), axis_types=2 * (AxisType.Explicit,))
  fm = sf.feature_map("oprf", "orf", num_features=16)
  maps = {
    "feature_map": fm,
    "variables": fm.init(jax.random.key(1), head_dim=HEAD_DIM),
  }
  x = jax.random.normal(jax.random.key(0), (BATCH, 64, HEADS, HEAD_DIM))
  attention = lambda x: sf.sequence_parallel_attention(
    *(x, x, x), mesh=mesh, axis="s", **maps
  )
  gradient = jax.grad(lambda x: jnp.sum(attention(x) ** 2))
  expected = sf.spectral_attention(x, x, x, **maps)
  plain = jax.grad(
    lambda x: jnp.sum(sf.spectral_attention(x, x, x, **maps) ** 2)
  )
  results = {}
  for name, spec in {"none": None, "s": P(None, "s"), "b": P("b", "s")}.items():
    y = x if spec is None else jax.device_put(x, NamedSharding(mesh, spec))
    results[name] = [
      relative(attention(y), expected),
      relative(jax.jit(gradient)(y), plain(x)),
    ]
  return results


def models_on_mesh():
  """Measures errors of models and of their parameters' gradients."""
  mesh = jax.make_mesh((4, 2), ("b", "h"), axis_types=2 * (AxisType.Explicit,))
  fm = sf.feature_map("posrf", "orf", num_features=16)
  sizes = {"vocab_size": 16, "max_len": 24, "num_layers": 1, "head_dim": 8}
  tokens = jax.random.randint(jax.random.key(0), (4, 12), 0, 16)
  length = jnp.array([12, 3, 8, 5])
  models = {
    "classifier": (sf.nn.Classifier(num_classes=3, feature_map=fm, **sizes), 2),
    "language model": (sf.nn.LanguageModel(feature_map=fm, **sizes), 2),
    "pairs": (sf.nn.DualClassifier(num_classes=3, feature_map=fm, **sizes), 4),
    "seq2seq": (sf.nn.Seq2Seq(feature_map=fm, **sizes), 3),
  }
  results = {}
  for name, (model, count) in models.items():
    args = (tokens, length, tokens, length)[:count]
    variables = model.init(jax.random.key(1), *args)

    def loss(params, *args, model=model, variables=variables):
      return jnp.sum(model.apply({**variables, "params": params}, *args) ** 2)

    for function, first in (
      (model.apply, variables),
      (jax.grad(loss), variables["params"]),
    ):
      got = jax.jit(function)(
        jax.device_put(first, NamedSharding(mesh, P())),
        *jax.device_put(args, NamedSharding(mesh, P("b"))),
      )
      expected = jax.jit(function)(first, *args)
      worst = max(jax.tree.leaves(jax.tree.map(relative, got, expected)))
      results.setdefault(name, []).append(worst)
  return results


def refusal():
  mesh = jax.make_mesh((8,), ("s",), axis_types=(AxisType.Explicit,))
  x = jnp.ones((1, 16, 2, HEAD_DIM))
  x = jax.device_put(x, NamedSharding(mesh, P(None, "s")))
  fm = sf.feature_map("posrf", "orf", num_features=16)
  variables = fm.init(jax.random.key(1), head_dim=HEAD_DIM)
  try:
    sf.spectral_attention(x, x, x, feature_map=fm, variables=variables)
  except ValueError as error:
    return str(error)


@pytest.fixture(scope="module")
def measured():
  """The differences that a process with eight devices measured."""
  env = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "PYTHONPATH": os.getcwd(),
  }
  process = subprocess.run(
    [sys.executable, "-m", "tests.test_meshes"],
    capture_output=True,
    text=True,
    env=env,
    timeout=1200,
  )
  assert process.returncode == 0, process.stderr[-2000:]
  return json.loads(process.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_inside_shard_map(measured, name):
  assert max(measured["shard_map"][name]) < 1e-5


@pytest.mark.slow
def test_models_inside_shard_map(measured):
  assert measured["models"]["gradients"] < 1e-5
  assert measured["models"]["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
@pytest.mark.parametrize("name", CASES)
def test_examples_and_heads_divided_over_a_mesh(measured, name, kind):
  for result in measured[kind][name]:
    assert result["difference"] < 1e-5
    assert result["same_sharding"]
    # XLA gathers the scores of all keys for its own top_k.
    gathers = kind == "Auto" and "num_heavy" in CASES[name]
    assert gathers or not result["collectives"]


@pytest.mark.slow
def test_sequence_parallel_on_explicit_axes(measured):
  for name, differences in measured["sequence_parallel"].items():
    assert max(differences) < 1e-5, name


@pytest.mark.slow
def test_models_on_explicit_axes(measured):
  for name, differences in measured["models_on_mesh"].items():
    assert max(differences) < 1e-4, name


@pytest.mark.slow
def test_a_divided_length_is_refused(measured):
  assert "sequence_parallel_attention" in measured["refusal"]


@pytest.mark.parametrize(
  "name", ["posrf causal", *(name for name in CASES if "exact keys" in name)]
)
@pytest.mark.quick_every(2)
def test_loops_take_the_types_of_shard_map(name):
  # One device is enough for the check of types.
  mesh = jax.make_mesh((1,), ("b",), axis_types=(AxisType.Auto,))
  attention = attention_of(name)
  x = jax.random.normal(jax.random.key(0), (2, LENGTH, HEADS, HEAD_DIM))
  inside = jax.shard_map(
    attention, mesh=mesh, in_specs=P("b"), out_specs=P("b")
  )
  assert relative(jax.jit(inside)(x), attention(x)) < 1e-5


if __name__ == "__main__":
  print(
    json.dumps(
      {
        "shard_map": {name: in_shard_map(name) for name in CASES},
        "models": models_in_shard_map(),
        "models_on_mesh": models_on_mesh(),
        **{
          kind: {name: on_mesh(name, kind) for name in CASES}
          for kind in ("Explicit", "Auto")
        },
        "sequence_parallel": sequence_parallel(),
        "refusal": refusal(),
      }
    )
  )
