import jax
import jax.numpy as jnp
import pytest

import spectraformer_jax as sf
from spectraformer_jax.linearize import (
  certify,
  fit_feature_map,
  fit_layers,
  start_from_data,
)
from tests.linearize.helpers import (
  HEAD_DIM,
  build_map,
  draw,
  layer,
  masks_of,
)


def fit(arrays=None, **options):
  arrays = arrays or draw()
  options = {"rng": jax.random.key(0), "steps": 1, **build_map(), **options}
  return fit_feature_map(*arrays[:2], **masks_of(arrays), **options)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"steps": -1}, "steps must be an integer >= 0, got -1"),
    ({"steps": 1.5}, "steps must be an integer >= 0, got 1.5"),
    ({"rows": 0}, "rows must be a positive integer, got 0"),
    (
      {"batch_size": 4},
      "batch_size must be at most the number of sequences, 3, got 4",
    ),
    ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
    ({"loss": "kl"}, "loss must be one of 'cross_entropy', 'output', got 'kl'"),
    ({"loss": "output"}, "loss='output' needs value, got None"),
    ({"target": "relu"}, "target must be one of 'softmax', 'gaussian'"),
    ({"window": -1}, "window must be None, an int of 0 or more"),
    ({"num_sinks": -1}, "num_sinks must be an int of 0 or more, got -1"),
    (
      {"num_heavy": 1, "is_causal": True},
      "num_heavy cannot be combined with is_causal=True",
    ),
    (
      {"window": 1, "target": "gaussian"},
      "need target='softmax', got 'gaussian'",
    ),
    ({"scale": -1.0}, "scale must be positive, got -1.0"),
  ],
)
def test_options(options, message):
  with pytest.raises(ValueError, match=message) as error:
    fit(**options)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("component", "matrix", "message"),
  [
    ("posrf", "iid", "'posrf-iid' has no parameters.*steps=0"),
    ("trigrf", "gmm", "'trigrf-gmm' has negative features.*'prototypes"),
    ("oprf", "gmm", "'oprf-gmm' needs statistics.*statistics='learned'"),
  ],
)
def test_maps(component, matrix, message):
  fm = sf.feature_map(component, matrix, num_features=4)
  maps = {
    "feature_map": fm,
    "variables": fm.init(jax.random.key(0), head_dim=HEAD_DIM),
  }
  with pytest.raises(ValueError, match=message) as error:
    fit(**maps)
  assert "\n" not in str(error.value)


def test_arrays():
  arrays = draw()
  at = lambda name, place, value: arrays._replace(
    **{name: getattr(arrays, name).at[place].set(value)}
  )
  for changed, message in (
    (at("key", (1, 0, 0, 0), jnp.nan), "key is not finite at all visible"),
    (at("query", (1, 0, 0, 0), jnp.inf), "query is not finite at all visible"),
    (at("key_mask", 1, False), "key_mask hides all of sequence 1"),
    (at("query_mask", 2, False), "query_mask hides all of sequence 2"),
    (arrays._replace(key=arrays.key[..., :2]), "must share head_dim"),
    (
      jax.tree.map(lambda leaf: leaf[:0], arrays),
      r"must not be empty, got query.shape=\(0, 12",
    ),
  ):
    with pytest.raises(ValueError, match=message):
      fit(changed)
    with pytest.raises(ValueError, match=message):
      start_from_data(
        jax.random.key(0),
        query=changed.query,
        key=changed.key,
        **masks_of(changed),
        **build_map(),
      )
    with pytest.raises(ValueError, match=message):
      certify(*changed[:3], **masks_of(changed), **build_map())


def test_a_window_needs_queries_and_keys_of_one_length():
  arrays = draw(keys=20)
  with pytest.raises(ValueError, match="window needs query and key of one len"):
    fit(arrays, window=1)


def test_variables_of_other_heads():
  with pytest.raises(ValueError, match="variables hold 3 heads"):
    fit(**build_map(num_heads=3))


def test_held_out_sequences_are_others():
  arrays = draw()
  half = jax.tree.map(lambda leaf: leaf[1:], arrays)
  message = "2 of the 2 held-out sequences are among the 3 that are fitted"
  with pytest.raises(ValueError, match=message):
    fit(arrays, held_out=half)


def fit_some(inputs, held_out, **options):
  return fit_layers(
    inputs,
    held_out=held_out,
    **{
      "feature_map": build_map()["feature_map"],
      "rng": jax.random.key(0),
      "steps": 1,
    }
    | options,
  )


def test_layers():
  one, two = layer("one"), layer("two", seed=1)
  for inputs, held_out, options, message in (
    (
      [one, one],
      [two, two],
      {},
      "layers of different names, got .'one', 'one'",
    ),
    ([], [], {}, "layers of different names"),
    ([one], [two], {}, r"the layers of inputs, \['one'\], got \['two'\]"),
    ([one], [one], {}, "layer 'one': 3 of the 3 held-out sequences"),
    ([one], [layer("one", seed=1)], {"step": 3}, "unknown option 'step'"),
    (
      [one],
      [layer("one", seed=1)],
      {"feature_map": sf.feature_map("posrf", "iid", num_features=4)},
      "layer 'one': feature map 'posrf-iid' has no parameters",
    ),
  ):
    with pytest.raises(ValueError, match=message) as error:
      fit_some(inputs, held_out, **options)
    assert "\n" not in str(error.value)
