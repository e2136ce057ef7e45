"""Feature maps in the place of exact attention, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectraformer_jax.hybrid_attention.exact_keys import ExactKeys
from spectraformer_jax.linearize.runs.swap import spectral_config, swap
from spectraformer_jax.nn.from_config import make_feature_map, make_model
from spectraformer_jax.nn.pretrained import Pretrained
from spectraformer_jax.study.approximation.capture import capture
from spectraformer_jax.study.approximation.pair_spec import parse_pair
from spectraformer_jax.typing import FeatureVariables
from tests.linearize.runs.helpers import run_config, sharpen

FACTS = {"name": "toy", "num_classes": 3, "length": 12, "pair": False}
IDS = 8
# Half of the exponent's scale at which a share is a nearest prototype.
SHARPNESS = 64.0


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
  """Teacher, config and maps of a model whose keys have eight values."""
  config = run_config(
    tmp_path_factory.mktemp("tokens"),
    **{"model.num_layers": 1, "model.positions": "none"},
  )
  facts = FACTS | {"vocab_size": IDS}
  model = make_model(config, make_feature_map(config), facts)
  tokens = jax.random.randint(jax.random.key(0), (4, 12), 0, IDS)
  length = jnp.array([12, 9, 5, 12])
  variables = jax.jit(model.init)(jax.random.key(1), tokens, length)
  variables = jax.tree_util.tree_map_with_path(sharpen, dict(variables))
  (layer,) = capture(model, variables, jnp.arange(IDS)[None], jnp.array([IDS]))
  # Rows of all eight keys: w = p, v = kappa p, c = -kappa |p|^2 / 2.
  keys = jnp.swapaxes(layer.key[0], 0, 1) * layer.key.shape[-1] ** -0.25
  half_square = 0.5 * jnp.sum(jnp.square(keys), axis=-1)
  params = {
    "query_rows": keys,
    "query_bias": jnp.zeros(keys.shape[:2]),
    "key_rows": SHARPNESS * keys,
    "key_bias": -SHARPNESS * half_square,
  }
  pair = parse_pair("prototypes(share=1.0)-none")
  spectral = spectral_config(config, pair, IDS, ExactKeys())
  maps = {layer.name: FeatureVariables({"component": params}, {})}
  return Pretrained(model, variables), spectral, facts, maps, (tokens, length)


def test_a_map_that_is_exact_changes_no_logit(parts):
  teacher, config, facts, maps, inputs = parts
  found = swap(teacher, config, facts, maps)
  assert found.model.attention == "spectral"
  model, variables = found.pretrained
  logits = jax.jit(model.apply)(variables, *inputs)
  expected = jax.jit(teacher.model.apply)(teacher.variables, *inputs)
  np.testing.assert_allclose(logits, expected, atol=1e-4)
  # Uniform attention, of rows that do not know the keys, is something else.
  blind = jax.tree.map(jnp.zeros_like, maps)
  model, variables = swap(teacher, config, facts, blind).pretrained
  logits = jax.jit(model.apply)(variables, *inputs)
  assert np.abs(logits - expected).max() > 1e-2


def test_every_leaf_is_taken_over(parts):
  teacher, config, facts, maps, _ = parts
  found = swap(teacher, config, facts, maps).state.variables
  attention = found["params"]["encoder"]["layer_0"]["attention"]
  fitted = attention.pop("feature_map")
  jax.tree.map(np.testing.assert_array_equal, fitted, maps["layer_0"].params)
  jax.tree.map(
    np.testing.assert_array_equal, found["params"], teacher.variables["params"]
  )


def without(tree, *path):
  """A copy of nested dictionaries without one entry."""
  first, *rest = path
  if not rest:
    return {name: x for name, x in tree.items() if name != first}
  return {**tree, first: without(tree[first], *rest)}


def test_leaves_that_are_not_taken_over_are_errors(parts):
  teacher, config, facts, maps, _ = parts
  kernel = ("params", "head_logits", "kernel")
  variables = without(teacher.variables, *kernel)
  with pytest.raises(ValueError, match="head_logits/kernel of the converted"):
    swap(teacher._replace(variables=variables), config, facts, maps)
  params = {**teacher.variables["params"], "more": {"bias": np.ones(3)}}
  variables = {**teacher.variables, "params": params}
  with pytest.raises(
    ValueError, match="params/more/bias of the teacher has no"
  ):
    swap(teacher._replace(variables=variables), config, facts, maps)
  with pytest.raises(ValueError, match="feature_map/.* of the converted model"):
    swap(teacher, config, facts, {})
  short = jax.tree.map(lambda leaf: leaf[:, :3], maps)
  with pytest.raises(ValueError, match="needs shape .* the fit has"):
    swap(teacher, config, facts, short)


def test_config_keeps_all_but_the_attention(tmp_path):
  before = run_config(tmp_path, **{"model.num_layers": 1})
  pair = parse_pair("prototypes(share=1)-none")
  after = spectral_config(before, pair, 5, ExactKeys((3, 2), 1, 0))
  assert (after.model.window, after.model.num_sinks) == ((3, 2), 1)
  assert after.feature_map.component_kwargs.to_dict() == {"share": 1}
  assert after.feature_map.num_features == 5
  assert after.optim == before.optim and after.task == before.task
  assert before.model.attention == "softmax"
