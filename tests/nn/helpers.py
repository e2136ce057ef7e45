"""Maps, inputs and variables that tests of modules share."""

import jax

import spectraformer_jax as sf


def make_map(component="posrf", **component_kwargs):
  """Makes a small feature map with orthogonal rows."""
  return sf.feature_map(
    component, "orf", num_features=8, component_kwargs=component_kwargs
  )


def normal(seed, *shape):
  """Draws normal numbers."""
  return jax.random.normal(jax.random.key(seed), shape)


def with_larger_embeddings(variables):
  """Multiplies embeddings by 50, so that tokens matter without training."""

  def enlarge(path, leaf):
    is_embedding = "embedding" in jax.tree_util.keystr(path)
    return 50.0 * leaf if is_embedding else leaf

  params = jax.tree_util.tree_map_with_path(enlarge, variables["params"])
  return {**variables, "params": params}
