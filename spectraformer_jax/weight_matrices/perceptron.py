"""A small multilayer perceptron that starts as zero."""

import jax
import jax.numpy as jnp

from spectraformer_jax.typing import Array, Params


def init_perceptron(rng: Array, widths: tuple[int, ...]) -> Params:
  """Parameters of a perceptron whose output is zero for every input.

  The last layer starts at zero, the others with Gaussian kernels of variance 1
  over fan-in and zero biases. So the first step moves the last layer alone;
  the layers before it have a gradient from the second step on.

  Args:
    rng: PRNG key.
    widths: of the input, the hidden layers and the output.

  Returns:
    ``{"layer_0": {"kernel": [in, out], "bias": [out]}, ...}`` float32.

  Example:
    >>> sorted(init_perceptron(jax.random.key(0), (3, 8, 2)))
    ['layer_0', 'layer_1']
  """
  params = {}
  last = len(widths) - 2
  for i, layer_rng in enumerate(jax.random.split(rng, last + 1)):
    shape = widths[i : i + 2]
    kernel = jnp.zeros(shape, jnp.float32)
    if i < last:
      kernel = jax.random.normal(
        layer_rng, shape, dtype=jnp.float32
      ) / jnp.sqrt(float(shape[0]))
    params[f"layer_{i}"] = {
      "kernel": kernel,
      "bias": jnp.zeros(shape[1:], jnp.float32),
    }
  return params


def apply_perceptron(params: Params, x: Array) -> Array:
  """The perceptron's output: GELU between layers, linear at the end.

  Args:
    params: from `init_perceptron`.
    x: ``[..., in]`` float32.

  Returns:
    ``[..., out]`` float32.

  Example:
    >>> params = init_perceptron(jax.random.key(0), (3, 8, 2))
    >>> apply_perceptron(params, jnp.ones((5, 3))).tolist()[0]
    [0.0, 0.0]
  """
  for i in range(len(params)):
    if i:
      x = jax.nn.gelu(x)
    layer = params[f"layer_{i}"]
    bias = jnp.expand_dims(layer["bias"], tuple(range(x.ndim - 1)))
    x = jnp.matmul(x, layer["kernel"], precision="highest") + bias
  return x
