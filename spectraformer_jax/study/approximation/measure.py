"""Measures a pair at one size, on one set of inputs."""

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats as distributions

import spectraformer_jax as sf
from spectraformer_jax.checks import AttentionArrays
from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.hybrid_attention.exact_keys import ExactKeys
from spectraformer_jax.seeds import make_key
from spectraformer_jax.study import SIGNIFICANCE
from spectraformer_jax.study.approximation.errors import (
  exact_and_uniform,
  relative_error,
  zero_masked,
)
from spectraformer_jax.study.approximation.inputs import Inputs
from spectraformer_jax.study.approximation.kernel_error import (
  has_kernel,
  independent_rows_mse,
  kernel_ratios,
)
from spectraformer_jax.study.approximation.results import Figures
from spectraformer_jax.typing import Array, FeatureVariables

# Timed calls of exact attention. A pair is timed once for each draw.
REPEATS = 5


class Options(NamedTuple):
  """Settings of a measurement.

  Attributes:
    is_causal: query i sees keys 0..i.
    target: kernel of the exact attention that outputs are compared with.
    draws: number of independent draws of W.
    seed: of the draws, and of the points at which kernels are compared.
    points: number of queries, and of keys, of each example at which kernels
      are compared in each head.
    exact: keys that attention sees exactly; the kernel's figures do not.
  """

  is_causal: bool = False
  target: str = "softmax"
  draws: int = 10
  seed: int = 0
  points: int = 32
  exact: ExactKeys = ExactKeys()


class Reference(NamedTuple):
  """Exact and uniform attention, on one set of scaled inputs.

  Attributes:
    exact: exact attention ``[B, T, N, V]`` float64, zero at masked queries.
    uniform_error: error of uniform attention, which ignores queries and keys.
    ms: median time of a call of JAX's own softmax attention.
    temp_mib: memory that this attention plans beside arguments and result.
  """

  exact: np.ndarray
  uniform_error: float
  ms: float
  temp_mib: float


class Program(NamedTuple):
  """A compiled pair with its draws, for inputs of one shape.

  Attributes:
    feature_map: of the pair.
    draws: variables, one for each draw of W.
    compiled: function of variables, query, key, value, key_mask, query_mask.
    compile_s: seconds that compilation took.
  """

  feature_map: FeatureMap
  draws: list[FeatureVariables]
  compiled: Any
  compile_s: float


def device_arrays(inputs: Inputs, scale: float) -> tuple[Array, Array, Array]:
  """Returns query and key times `scale`, and value, on the device."""
  query, key = inputs.query * scale, inputs.key * scale
  as_float = functools.partial(jnp.asarray, dtype=jnp.float32)
  return as_float(query), as_float(key), as_float(inputs.value)


def make_reference(inputs: Inputs, scale: float, options: Options) -> Reference:
  """Computes exact and uniform attention of these inputs; times softmax.

  Raises:
    ValueError: exact attention gives nothing but zeros.
  """
  query, key, value = device_arrays(inputs, scale)
  masks = jnp.asarray(inputs.key_mask), jnp.asarray(inputs.query_mask)
  exact, uniform = exact_and_uniform(
    AttentionArrays(query, key, value, *masks),
    kernel=options.target,
    is_causal=options.is_causal,
  )
  if not exact.any():
    raise ValueError(
      f"inputs {inputs.name!r}: exact attention gives zeros, so there is no "
      "relative error."
    )
  # Times JAX's own attention: the exact one above is written for accuracy.
  attend = functools.partial(
    jax.nn.dot_product_attention,
    mask=masks[0][:, None, None, :],
    is_causal=options.is_causal,
  )
  compiled = jax.jit(attend).lower(query, key, value).compile()
  compiled(query, key, value)
  times = [_timed(compiled, query, key, value)[1] for _ in range(REPEATS)]
  return Reference(
    exact,
    relative_error(uniform, exact),
    statistics.median(times),
    temp_mib(compiled),
  )


def prepare(
  feature_map: FeatureMap, inputs: Inputs, options: Options
) -> Program:
  """Compiles attention for inputs of this shape, and draws W."""
  _, _, num_heads, head_dim = inputs.query.shape
  init = functools.partial(
    feature_map.init, head_dim=head_dim, num_heads=num_heads
  )
  if feature_map.weight_matrix.info.redrawable:
    init = jax.jit(init)  # other matrices cannot be drawn inside jit
  rng = make_key(options.seed)
  draws = [init(jax.random.fold_in(rng, i)) for i in range(options.draws)]

  def attend(
    variables: FeatureVariables,
    query: Array,
    key: Array,
    value: Array,
    key_mask: Array,
    query_mask: Array,
  ) -> Array:
    stats = None
    # Without these, `spectral_attention` takes statistics of the keys alone.
    if feature_map.info.needs_stats and not options.is_causal:
      stats = feature_map.calibrate(
        variables,
        query * head_dim**-0.25,
        key * head_dim**-0.25,
        key_mask=key_mask,
        query_mask=query_mask,
      )
    return sf.spectral_attention(
      query,
      key,
      value,
      feature_map=feature_map,
      variables=variables,
      stats=stats,
      is_causal=options.is_causal,
      key_mask=key_mask,
      query_mask=query_mask,
      **options.exact._asdict(),
    )

  start = time.perf_counter()
  masks = inputs.key_mask, inputs.query_mask
  lowered = jax.jit(attend).lower(draws[0], *device_arrays(inputs, 1.0), *masks)
  compiled = lowered.compile()
  return Program(feature_map, draws, compiled, time.perf_counter() - start)


def measure(
  program: Program,
  inputs: Inputs,
  scale: float,
  reference: Reference,
  options: Options,
) -> Figures:
  """Measures all figures of a pair."""
  arrays = *device_arrays(inputs, scale), inputs.key_mask, inputs.query_mask
  arrays = jax.block_until_ready(jax.device_put(arrays))
  # The first call may be slower, and is not timed.
  program.compiled(program.draws[0], *arrays)
  outputs, times = [], []
  for variables in program.draws:
    out, ms = _timed(program.compiled, variables, *arrays)
    outputs.append(zero_masked(out, inputs.query_mask))
    times.append(ms)
  return attention_figures(outputs, reference)._replace(
    **kernel_figures(program, inputs, scale, options),
    ms=statistics.median(times),
    exact_ms=reference.ms,
    temp_mib=temp_mib(program.compiled),
    exact_temp_mib=reference.temp_mib,
    compile_s=program.compile_s,
  )


def attention_figures(
  outputs: list[np.ndarray], reference: Reference
) -> Figures:
  """Measures the error of outputs, one for each draw, and its variance.

  The mean squared error over draws is the variance plus the squared bias, which
  more draws would not change. The squared bias is the difference of two
  estimates, so it may come out below zero.
  """
  errors = [relative_error(out, reference.exact) for out in outputs]
  variance = bias2 = None
  if len(outputs) > 1:
    norm2 = np.sum(reference.exact**2)
    variance = float(np.sum(np.var(outputs, axis=0, ddof=1)) / norm2)
    bias2 = float(np.mean(np.square(errors))) - variance
  return Figures(*summarise(errors), reference.uniform_error, variance, bias2)


def kernel_figures(
  program: Program, inputs: Inputs, scale: float, options: Options
) -> dict[str, float | None]:
  """Measures bias and squared error of the kernel's estimate over the kernel.

  Returns figures by name; none for a map without a fixed kernel, or where the
  kernel is zero at all points.
  """
  fm = program.feature_map
  if not has_kernel(fm):
    return {}
  sqrt_scale = inputs.query.shape[-1] ** -0.25
  query, key, _ = device_arrays(inputs, scale)
  query, key = query * sqrt_scale, key * sqrt_scale
  stats = fm.calibrate(
    program.draws[0],
    query,
    key,
    key_mask=jnp.asarray(inputs.key_mask),
    query_mask=jnp.asarray(inputs.query_mask),
  )
  rng = np.random.default_rng(options.seed)
  x = _draw_positions(rng, query, inputs.query_mask, options.points)
  y = _draw_positions(rng, key, inputs.key_mask, options.points)
  ratios = [kernel_ratios(fm, draw, x, y, stats) for draw in program.draws]
  error = np.stack([np.asarray(ratio, np.float64) - 1.0 for ratio in ratios])
  error = error.reshape(len(error), -1)
  # Leaves out points where the kernel is zero.
  error = error[:, ~np.isnan(error).any(axis=0)]
  if not error.size:
    return {}
  square = np.square(error)
  figures = {"kernel_mse_median": float(np.median(square.mean(axis=0)))}
  for name, sample in (("bias", error), ("mse", square)):
    mean, half, _ = summarise(sample.mean(axis=1))
    figures |= {f"kernel_{name}": mean, f"kernel_{name}_ci": half}
  with contextlib.suppress(NotImplementedError):
    iid = independent_rows_mse(fm, program.draws[0], x, y, stats)
    iid = np.asarray(iid, np.float64)
    figures["kernel_mse_iid"] = float(iid.mean())
    figures["kernel_mse_iid_median"] = float(np.median(iid))
  return figures


def summarise(
  sample: Sequence[float] | np.ndarray,
) -> tuple[float, float | None, float | None]:
  """Returns the mean, half of its confidence interval, and standard deviation.

  The interval is of Student's t; a single number has no interval and no
  deviation.

  Example:
    >>> mean, half, std = summarise([1.0, 2.0, 3.0])
    >>> mean, round(half, 2), std
    (2.0, 2.48, 1.0)
  """
  mean, count = float(np.mean(sample)), len(sample)
  if count < 2:
    return mean, None, None
  with np.errstate(invalid="ignore"):  # infinite errors have no spread
    std = float(np.std(sample, ddof=1))
  quantile = distributions.t.ppf(1.0 - SIGNIFICANCE / 2.0, count - 1)
  return mean, float(quantile * std / count**0.5), std


def temp_mib(compiled: Any) -> float:
  """Memory that a program plans beside its arguments and results, in MiB."""
  return compiled.memory_analysis().temp_size_in_bytes / 2**20


def _timed(
  function: Callable[..., Array], *args: Array | FeatureVariables
) -> tuple[Array, float]:
  """Returns the result of a call and its time in milliseconds."""
  start = time.perf_counter()
  out = jax.block_until_ready(function(*args))
  return out, 1e3 * (time.perf_counter() - start)


def _draw_positions(
  rng: np.random.Generator, x: Array, mask: np.ndarray, count: int
) -> Array:
  """Draws `count` visible positions of each example: ``[B, count, N, H]``.

  If every example has fewer, draws as many as the longest example has. Examples
  with fewer positions than are drawn repeat some.
  """
  count = min(count, int(mask.sum(axis=1).max()))
  indices = np.stack(
    [
      rng.choice(visible, count, replace=len(visible) < count)
      for visible in map(np.flatnonzero, mask)
    ]
  )
  return jnp.take_along_axis(x, jnp.asarray(indices)[:, :, None, None], axis=1)
