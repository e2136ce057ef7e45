"""Captures the inputs of a trained model's attention layers."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np

from spectraformer_jax import data
from spectraformer_jax.nn import SpectralSelfAttention, load_pretrained, rotate
from spectraformer_jax.study.approximation.inputs import (
  ARRAYS,
  Inputs,
  make_inputs,
)
from spectraformer_jax.train.inputs import load_data
from spectraformer_jax.train.run import describe, run_folder
from spectraformer_jax.train.step.steps import model_inputs

PROJECTIONS = ("query", "key", "value")
# Examples that go through the model together, to need less memory.
AT_ONCE = 8


def capture(
  model: linen.Module, variables: Mapping[str, Any], *args: Any
) -> list[Inputs]:
  """Captures queries, keys, values and masks of `SpectralSelfAttention` layers.

  Args:
    model: any module with such layers.
    variables: of the model.
    *args: arguments of the model's call.

  Returns:
    One `Inputs` for each call of a layer, in order; a layer is named by its
    path in the model, without "encoder" and "attention".

  Raises:
    ValueError: the model has no such layer.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from spectraformer_jax import nn
    >>> encoder = nn.Encoder(attention="softmax", num_layers=1, head_dim=4)
    >>> x = jnp.ones((1, 5, 8))
    >>> variables = encoder.init(jax.random.key(0), x)
    >>> [(c.name, c.query.shape) for c in capture(encoder, variables, x)]
    [('layer_0', (1, 5, 2, 4))]
  """
  calls = []

  def intercept(
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: linen.module.InterceptorContext,
  ) -> Any:
    module = context.module
    if context.method_name != "__call__":
      return call(*args, **kwargs)
    if isinstance(module, SpectralSelfAttention):
      mask = args[1] if len(args) > 1 else kwargs.get("mask")
      calls.append({"name": _layer_name(module.path), "key_mask": mask})
      return call(*args, **kwargs)
    out = call(*args, **kwargs)
    layer = module.parent
    # A layer calls its projections, so its own entry is the last one.
    is_part = isinstance(layer, SpectralSelfAttention)
    if is_part and module.name in PROJECTIONS:
      calls[-1][module.name] = out
      if layer.rotary and module.name != "value":
        # The layer rotates its projections before attention.
        calls[-1][module.name] = rotate(out, jnp.arange(out.shape[1]))
    return out

  with linen.intercept_methods(intercept):
    model.apply(variables, *args)
  if not calls:
    raise ValueError(
      f"{type(model).__name__} has no SpectralSelfAttention to capture."
    )
  return [make_inputs(**call) for call in calls]


def _layer_name(path: tuple[str, ...]) -> str:
  """A path without the parts that all layers share."""
  parts = [part for part in path if part not in ("encoder", "attention")]
  return "/".join(parts) or "attention"


def capture_workdir(
  workdir: Path,
  *,
  split: str,
  examples: int,
  step: str,
  seed: int | None = None,
  flag: str = "--examples",
) -> list[Inputs]:
  """Captures the layers' inputs on examples of a split.

  Args:
    workdir: of `train.py`.
    split: "train", "dev" or "test".
    examples: number of examples.
    step: "best" (by dev accuracy), "last", or the number of a step whose
      checkpoint was kept.
    seed: draws the examples; None takes the first ones.
    flag: that chose `examples`, for the message of an error.

  Raises:
    ValueError: the workdir holds no run or no such checkpoint, or the task's
      data have changed since training.
  """
  config = run_folder.stored_config(workdir)
  (dataset,) = load_data(config, [split]).values()
  run_folder.check_data(workdir, {split: describe.split_facts(dataset)})
  if examples > len(dataset):
    raise ValueError(
      f"{flag} must be at most the {len(dataset)} of split {split!r}, got "
      f"{examples}."
    )
  batches = data.Batches(
    dataset,
    examples,
    seed=0 if seed is None else seed,
    train=seed is not None,
    pad_to_multiple=config.task.pad_to_multiple,
  )
  model, variables = load_pretrained(workdir, step=step)
  arrays = model_inputs(jax.tree.map(jnp.asarray, next(batches)))
  parts = [
    capture(model, variables, *(x[i : i + AT_ONCE] for x in arrays))
    for i in range(0, examples, AT_ONCE)
  ]
  return [_joined(layers) for layers in zip(*parts, strict=True)]


def _joined(parts: Sequence[Inputs]) -> Inputs:
  """Returns one layer's inputs on the examples of all parts."""
  return dataclasses.replace(
    parts[0],
    **{
      name: np.concatenate([getattr(part, name) for part in parts])
      for name in ARRAYS
    },
  )
