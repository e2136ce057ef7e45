"""Fits a map for each of several layers, and keeps the results in a folder."""

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.linearize import layer_files
from spectraformer_jax.linearize.fit import fit_feature_map
from spectraformer_jax.linearize.records import (
  FittedLayer,
  NonFiniteLossError,
)
from spectraformer_jax.linearize.start import start_from_data
from spectraformer_jax.study.approximation.inputs import ARRAYS, Inputs
from spectraformer_jax.typing import Array

# Called with a layer's name and the number of its steps that are done.
OnProgress = Callable[[str, int], None]


def fit_layers(
  inputs: Sequence[Inputs],
  *,
  feature_map: FeatureMap,
  rng: Array,
  held_out: Sequence[Inputs],
  out: Path | None = None,
  overwrite: bool = False,
  num_heads: int | None = None,
  on_progress: OnProgress | None = None,
  **options: Any,
) -> list[FittedLayer]:
  """Fits a feature map to each layer, from its keys on.

  Layers of equal shapes share one compiled program. With `out`, each layer is
  written to ``out/layers/<name>.npz`` when it is done, and read from there if
  it is done already: a call that was stopped goes on with the missing layers,
  and its files are those of a call that was not stopped, bit by bit.

  Args:
    inputs: of each layer, as from `study.approximation.capture`.
    feature_map: one map for all layers; each gets variables of its own.
    rng: PRNG key. A layer's randomness depends on it and on the layer's name.
    held_out: inputs of the same layers on other sequences.
    out: folder for the layers; None: nothing is written.
    overwrite: fits anew, whatever `out` holds.
    num_heads: N, or 1 for one map of all heads; None: N.
    on_progress: called with a layer's name and the number of its steps that
      are done, every 25 steps, and once for a layer that is read.
    **options: `steps`, `rows`, `batch_size`, `learning_rate`, `loss`, `scale`,
      `is_causal`, `window`, `num_sinks`, `num_heavy` and `target` of
      `fit_feature_map`.

  Returns:
    The layers, in the order of `inputs`.

  Raises:
    ValueError: names of layers repeat or are not those of `held_out`, a file in
      `out` is of other data or settings, or `fit_feature_map` refuses a layer;
      the message names the layer.
    NonFiniteLossError: see `fit_feature_map`.

  Example:
    >>> import spectraformer_jax as sf
    >>> from spectraformer_jax.study.approximation.inputs import random_inputs
    >>> draw = lambda seed: random_inputs(
    ...   batch=2, length=8, num_heads=2, head_dim=4, seed=seed)
    >>> (layer,) = fit_layers(
    ...   [draw(0)],
    ...   feature_map=sf.feature_map("prototypes", "none", num_features=4),
    ...   rng=jax.random.key(0), held_out=[draw(1)], steps=0)
    >>> layer.name, layer.report.checked_steps.tolist()
    ('random', [0])
  """
  names = [layer.name for layer in inputs]
  if len(set(names)) < len(names) or not names:
    raise ValueError(f"inputs must be layers of different names, got {names}.")
  if names != [layer.name for layer in held_out]:
    raise ValueError(
      f"held_out must have the layers of inputs, {names}, got "
      f"{[layer.name for layer in held_out]}."
    )
  tell = on_progress or (lambda name, step: None)
  layers = []
  for fitted, checked in zip(inputs, held_out, strict=True):
    settings = layer_files.settings_of(
      fitted, checked, feature_map, rng, num_heads=num_heads, **options
    )
    layer = None
    if out is not None and not overwrite:
      layer = layer_files.read(out, fitted.name, settings)
    if layer is None:
      layer = _fit_layer(
        fitted, checked, feature_map, rng, num_heads, tell, options
      )
      if out is not None:
        layer_files.write(out, layer, settings)
    else:
      tell(layer.name, len(layer.report.losses))
    layers.append(layer)
  return layers


def _fit_layer(
  fitted: Inputs,
  checked: Inputs,
  feature_map: FeatureMap,
  rng: Array,
  num_heads: int | None,
  tell: OnProgress,
  options: dict[str, Any],
) -> FittedLayer:
  """Starts and fits the map of one layer."""
  name = fitted.name
  rng = jax.random.fold_in(rng, zlib.crc32(name.encode()))
  init_rng, start_rng, fit_rng = jax.random.split(rng, 3)
  _, _, heads, head_dim = fitted.key.shape
  query, key, value, key_mask, query_mask = (
    jnp.asarray(getattr(fitted, array)) for array in ARRAYS
  )
  masks = {"key_mask": key_mask, "query_mask": query_mask}
  try:
    start = start_from_data(
      start_rng,
      feature_map,
      feature_map.init(
        init_rng, head_dim=head_dim, num_heads=num_heads or heads
      ),
      query,
      key,
      scale=options.get("scale"),
      **masks,
    )
    variables, report = fit_feature_map(
      query,
      key,
      value=value,
      feature_map=feature_map,
      variables=start,
      rng=fit_rng,
      held_out=checked,
      on_check=lambda step: tell(name, step),
      **masks,
      **options,
    )
  except NonFiniteLossError as error:
    raise NonFiniteLossError(f"layer {name!r}: {error}") from None
  except ValueError as error:
    raise ValueError(f"layer {name!r}: {error}") from None
  return FittedLayer(name, variables, start, report)
