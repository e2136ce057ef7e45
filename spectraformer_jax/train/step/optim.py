"""The optimiser: AdamW, warm-up, decay and gradient clipping.

The schedule "linear", of the official recipe, is PyTorch's one-cycle schedule
with linear annealing: from 1/25 of the learning rate up to it, then down to
about 0. "rsqrt" is the schedule of Long Range Arena's code for texts.
"""

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.typing import Array, PyTree

# PyTorch's defaults: one-cycle starts at lr / 25 and ends at lr / 25 / 10,000.
START_DIVISOR = 25.0
END_DIVISOR = 25.0 * 1e4

# The name of the learnable parameters of a layer's feature map.
FEATURE_MAP = "feature_map"

# A parameter with any of these in its path has no weight decay. The number of
# axes is not enough to tell: biases of heads have two.
NOT_DECAYED = {"bias", "scale", "position_embedding", "cls_token", FEATURE_MAP}


class OptimOptions(Protocol):
  """The values of `config.optim` that an optimiser is made from."""

  lr: float
  schedule: str
  warmup_steps: int
  b1: float
  b2: float
  eps: float
  weight_decay: float
  clip: str
  clip_threshold: float
  feature_map_lr: float | None


def learning_rate(optim: OptimOptions, num_steps: int) -> optax.Schedule:
  """Makes the schedule of the learning rate.

  Args:
    optim: `config.optim`.
    num_steps: of the run; the decay of "linear" and "cosine" ends there.

  Returns:
    A function of the step, from 0 on. "linear" and "cosine": lr/25 at 0, lr at
    `warmup_steps`, then decay to lr/250000 at `num_steps`; without warm-up, lr
    at 0. "rsqrt": lr * step / warmup_steps up to `warmup_steps`, then
    lr * sqrt(warmup_steps / step); without warm-up it decays from step 1 on.

  Example:
    >>> from spectraformer_jax.train.config import default_config
    >>> schedule = learning_rate(default_config().optim, 50_000)
    >>> [f"{float(schedule(step)):.1e}" for step in (0, 1000, 50_000)]
    ['4.0e-06', '1.0e-04', '4.0e-10']
  """
  warmup = optim.warmup_steps
  if optim.schedule == "rsqrt":
    return functools.partial(_rsqrt, lr=optim.lr, warmup=warmup)
  decay_steps, end = num_steps - warmup, optim.lr / END_DIVISOR
  if optim.schedule == "linear":
    decay = optax.linear_schedule(optim.lr, end, decay_steps)
  else:
    decay = optax.cosine_decay_schedule(
      optim.lr, decay_steps, alpha=1 / END_DIVISOR
    )
  if warmup == 0:
    return decay
  rise = optax.linear_schedule(optim.lr / START_DIVISOR, optim.lr, warmup)
  return optax.join_schedules([rise, decay], [warmup])


def _rsqrt(step: ArrayLike, *, lr: float, warmup: int) -> Array:
  """Rises linearly from 0, then falls with the square root of the step."""
  step, peak_step = jnp.asarray(step, jnp.float32), max(warmup, 1)
  rise = step / warmup if warmup else 1.0
  fall = jnp.sqrt(peak_step / jnp.maximum(step, peak_step))
  return lr * jnp.minimum(rise, fall)


def decay_mask(params: PyTree) -> PyTree:
  """Returns True for each parameter with weight decay.

  Biases, norms and other vectors have none, nor do embeddings of positions and
  of the CLS token. The learnable parameters of feature maps are frequencies:
  decay would change which kernel they estimate, so they have none either.

  Example:
    >>> import jax.numpy as jnp
    >>> decay_mask({"mlp": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}})
    {'mlp': {'bias': False, 'kernel': True}}
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf.ndim > 1 and not _names(path) & NOT_DECAYED, params
  )


def check_feature_map_lr(
  optim: OptimOptions, feature_map: FeatureMap | None
) -> None:
  """Refuses `feature_map_lr` for a model without parameters of feature maps.

  Args:
    optim: `config.optim`.
    feature_map: that of the model; None for a baseline attention.

  Raises:
    ValueError: `feature_map_lr` is set and the map has no parameters.

  Example:
    >>> from spectraformer_jax.train.config import default_config
    >>> check_feature_map_lr(default_config().optim, None)
  """
  if optim.feature_map_lr is None:
    return
  init = feature_map and feature_map.init_params
  # Any sizes will do: only whether there are parameters matters.
  if not init or not init(jax.random.key(0), head_dim=4, num_heads=1):
    name = feature_map.info.name if feature_map else "this attention"
    raise ValueError(
      f"config.optim.feature_map_lr must be None for {name}, which has no "
      f"feature map with parameters to learn, got {optim.feature_map_lr}."
    )


def feature_map_mask(params: PyTree) -> PyTree:
  """Returns True for each learnable parameter of a feature map.

  Example:
    >>> import jax.numpy as jnp
    >>> feature_map_mask({"feature_map": {"rows": jnp.ones(2)}, "w": 0.0})
    {'feature_map': {'rows': True}, 'w': False}
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, _: FEATURE_MAP in _names(path), params
  )


def _names(path: tuple[Any, ...]) -> set[str]:
  return {str(getattr(part, "key", part)) for part in path}


def make_optimizer(
  optim: OptimOptions, num_steps: int
) -> optax.GradientTransformation:
  """Makes the optimiser: clipping, then AdamW.

  With `feature_map_lr` the learnable parameters of feature maps have their own
  learning rate, on the same schedule.

  Args:
    optim: `config.optim`.
    num_steps: of the run.

  Example:
    >>> from spectraformer_jax.train.config import default_config
    >>> tx = make_optimizer(default_config().optim, 50_000)
  """
  clip = {
    "value": optax.clip,
    "global_norm": optax.clip_by_global_norm,
    "none": lambda _: optax.identity(),
  }[optim.clip](optim.clip_threshold)
  adamw = optax.adamw(
    learning_rate(optim, num_steps),
    b1=optim.b1,
    b2=optim.b2,
    eps=optim.eps,
    weight_decay=optim.weight_decay,
    mask=decay_mask,
  )
  if optim.feature_map_lr is None:
    return optax.chain(clip, adamw)
  # AdamW's update, weight decay included, is proportional to the learning rate,
  # so scaling the update changes the rate.
  ratio = optax.scale(optim.feature_map_lr / optim.lr)
  return optax.chain(clip, adamw, optax.masked(ratio, feature_map_mask))
