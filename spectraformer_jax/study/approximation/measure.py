"""One row of the table: a pair at one size, on one set of inputs."""

import functools
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats as distributions

import spectraformer_jax as sf
from spectraformer_jax.attention import statistics_of
from spectraformer_jax.checks import split_scale
from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.seeds import make_key
from spectraformer_jax.study.approximation.inputs import Inputs
from spectraformer_jax.study.approximation.kernel_error import (
  has_kernel,
  independent_rows_mse,
  kernel_ratios,
)
from spectraformer_jax.typing import Array, FeatureVariables

# Calls of a reference that are timed; a pair is timed at each draw.
REPEATS = 5
CONFIDENCE = 0.95


class Options(NamedTuple):
  """How to measure.

  Attributes:
    draws: of W, independent.
    seed: of the draws, and of the points at which kernels are compared.
    is_causal: query i sees keys 0..i.
    target: exact kernel of the attention that outputs are compared with.
    points: queries, and as many keys, of each head and example at which
      kernels are compared.
  """

  draws: int
  seed: int = 0
  is_causal: bool = False
  target: str = "softmax"
  points: int = 32


class Reference(NamedTuple):
  """What a pair is compared with, on one set of scaled inputs.

  Attributes:
    exact: exact attention ``[B, T, N, V]`` float64, zero at queries that do
      not count.
    uniform_error: of the answer that ignores queries and keys.
    ms: time of a call of exact attention.
    temp_mib: memory it plans beside arguments and result.
  """

  exact: np.ndarray
  uniform_error: float
  ms: float
  temp_mib: float


class Program(NamedTuple):
  """A pair that is compiled and drawn, for inputs of one shape.

  Attributes:
    feature_map: of the pair.
    draws: variables, one for each draw of W.
    compiled: of variables, query, key, value, key_mask and query_mask.
    compile_s: how long it took.
  """

  feature_map: FeatureMap
  draws: list[FeatureVariables]
  compiled: Any
  compile_s: float


def arrays_of(inputs: Inputs, scale: float) -> tuple[Array, ...]:
  """Query, key and value on the device, query and key times `scale`."""
  scaled = (inputs.query * scale, inputs.key * scale, inputs.value)
  return tuple(jnp.asarray(array, jnp.float32) for array in scaled)


def refer(inputs: Inputs, scale: float, options: Options) -> Reference:
  """Exact attention and uniform attention of these inputs."""
  query, key, value = arrays_of(inputs, scale)
  kwargs = {
    "key_mask": jnp.asarray(inputs.key_mask),
    "is_causal": options.is_causal,
  }
  exact = sf.exact_attention(
    *(query, key, value), kernel=options.target, **kwargs
  )
  # All scores are equal where queries are zero.
  uniform = sf.exact_attention(jnp.zeros_like(query), key, value, **kwargs)
  exact, uniform = (
    counted(np.asarray(out, np.float64), inputs) for out in (exact, uniform)
  )
  if not exact.any():
    raise ValueError(
      f"inputs {inputs.name!r}: exact attention gives zeros, so there is no "
      "relative error."
    )
  # Jax's own attention, since the exact one above is written for accuracy.
  visible = jnp.asarray(inputs.key_mask)[:, None, None, :]
  attend = jax.jit(
    lambda *qkv: jax.nn.dot_product_attention(
      *qkv, mask=visible, is_causal=options.is_causal
    )
  )
  compiled = attend.lower(query, key, value).compile()
  compiled(query, key, value)
  times = [_timed(compiled, query, key, value)[1] for _ in range(REPEATS)]
  return Reference(
    exact,
    relative_error(uniform, exact),
    statistics.median(times),
    temp_mib(compiled),
  )


def counted(out: np.ndarray, inputs: Inputs) -> np.ndarray:
  """Outputs ``[B, T, N, V]`` with zeros at queries that do not count."""
  return np.where(inputs.query_mask[:, :, None, None], out, 0.0)


def relative_error(out: np.ndarray, exact: np.ndarray) -> float:
  """Frobenius norm of the difference over that of `exact`.

  Example:
    >>> relative_error(np.array([3.0, 5.0]), np.array([3.0, 4.0]))
    0.2
  """
  return float(np.linalg.norm(out - exact) / np.linalg.norm(exact))


def prepare(
  feature_map: FeatureMap, inputs: Inputs, options: Options
) -> Program:
  """Compiles attention for inputs of this shape, and draws."""
  _, _, num_heads, head_dim = inputs.query.shape
  init = functools.partial(
    feature_map.init, head_dim=head_dim, num_heads=num_heads
  )
  if feature_map.weight_matrix.info.redrawable:
    init = jax.jit(init)  # others cannot be drawn inside jit
  rng = make_key(options.seed)
  draws = [init(jax.random.fold_in(rng, i)) for i in range(options.draws)]

  def attend(variables, query, key, value, key_mask, query_mask):
    stats = None
    if not options.is_causal:
      root = split_scale(None, head_dim)
      masks = key_mask, query_mask
      stats = statistics_of(
        feature_map, variables, None, query, key, *masks, root
      )
    return sf.spectral_attention(
      *(query, key, value),
      feature_map=feature_map,
      variables=variables,
      stats=stats,
      is_causal=options.is_causal,
      key_mask=key_mask,
      query_mask=query_mask,
    )

  start = time.perf_counter()
  masks = inputs.key_mask, inputs.query_mask
  lowered = jax.jit(attend).lower(draws[0], *arrays_of(inputs, 1.0), *masks)
  compiled = lowered.compile()
  return Program(feature_map, draws, compiled, time.perf_counter() - start)


def measure(
  program: Program,
  inputs: Inputs,
  scale: float,
  reference: Reference,
  options: Options,
) -> dict[str, float | None]:
  """All figures of a row; None where one does not exist."""
  arrays = *arrays_of(inputs, scale), inputs.key_mask, inputs.query_mask
  arrays = jax.block_until_ready(jax.device_put(arrays))
  program.compiled(program.draws[0], *arrays)
  outputs, times = [], []
  for variables in program.draws:
    out, ms = _timed(program.compiled, variables, *arrays)
    outputs.append(counted(np.asarray(out, np.float64), inputs))
    times.append(ms)
  return {
    **attention_figures(outputs, reference),
    **kernel_figures(program, inputs, scale, options),
    "ms": statistics.median(times),
    "exact_ms": reference.ms,
    "temp_mib": temp_mib(program.compiled),
    "exact_temp_mib": reference.temp_mib,
    "compile_s": program.compile_s,
  }


def attention_figures(
  outputs: list[np.ndarray], reference: Reference
) -> dict[str, float | None]:
  """Error of outputs, one for each draw, and the share that draws make.

  The mean square over draws is that of the mean output, which more draws would
  not change, and the variance about it; both are unbiased estimates, so the
  first may come out below zero.
  """
  errors = [relative_error(out, reference.exact) for out in outputs]
  mean, half, std = summarise(errors)
  variance = bias2 = None
  if len(outputs) > 1:
    norm2 = np.sum(reference.exact**2)
    variance = float(np.sum(np.var(outputs, axis=0, ddof=1)) / norm2)
    bias2 = float(np.mean(np.square(errors))) - variance
  return {
    "error": mean,
    "error_ci": half,
    "error_std": std,
    "uniform_error": reference.uniform_error,
    "output_variance": variance,
    "output_bias2": bias2,
  }


def kernel_figures(
  program: Program, inputs: Inputs, scale: float, options: Options
) -> dict[str, float | None]:
  """Bias and squared error of the kernel, relative to it."""
  names = ("kernel_bias", "kernel_bias_ci", "kernel_mse", "kernel_mse_ci")
  names += ("kernel_mse_median", "kernel_mse_iid", "kernel_mse_iid_median")
  figures: dict[str, float | None] = dict.fromkeys(names)
  fm = program.feature_map
  if not has_kernel(fm):
    return figures
  root = inputs.query.shape[-1] ** -0.25
  query, key, _ = arrays_of(inputs, scale)
  query, key = query * root, key * root
  stats = ()
  if fm.info.needs_stats:
    masks = {"key_mask": inputs.key_mask, "query_mask": inputs.query_mask}
    stats = fm.calibrate(program.draws[0], query, key, **masks)
  rng = np.random.default_rng(options.seed)
  x, y = (
    _pick(rng, array, mask, options.points)
    for array, mask in ((query, inputs.query_mask), (key, inputs.key_mask))
  )
  off = np.stack(
    [
      np.asarray(kernel_ratios(fm, variables, x, y, stats), np.float64) - 1.0
      for variables in program.draws
    ]
  )
  off = off.reshape(len(off), -1)
  off = off[:, ~np.isnan(off).any(axis=0)]  # where the kernel is not zero
  if not off.size:
    return figures
  bias, bias_half, _ = summarise(off.mean(axis=1))
  mse, mse_half, _ = summarise(np.square(off).mean(axis=1))
  median = float(np.median(np.square(off).mean(axis=0)))
  values = [bias, bias_half, mse, mse_half, median]
  try:
    iid = independent_rows_mse(fm, program.draws[0], x, y, stats)
    iid = np.asarray(iid, np.float64)
    values += [float(iid.mean()), float(np.median(iid))]
  except NotImplementedError:
    values += [None, None]
  return dict(zip(names, values, strict=True))


def summarise(sample) -> tuple[float, float | None, float | None]:
  """Mean, half width of its confidence interval, and standard deviation.

  The interval is Student's; it has no width for a single number.

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
  quantile = distributions.t.ppf(0.5 + CONFIDENCE / 2, count - 1)
  return mean, float(quantile * std / count**0.5), std


def temp_mib(compiled) -> float:
  """Memory a program plans beside its arguments and results, in MiB."""
  return compiled.memory_analysis().temp_size_in_bytes / 2**20


def _timed(function, *args):
  """The result of a call and its time in milliseconds."""
  start = time.perf_counter()
  out = jax.block_until_ready(function(*args))
  return out, 1e3 * (time.perf_counter() - start)


def _pick(rng, x: Array, mask: np.ndarray, count: int) -> Array:
  """`count` visible positions of each example, ``[B, count, N, H]``.

  Fewer where the example with most has fewer; one with less repeats some.
  """
  count = min(count, int(mask.sum(axis=1).max()))
  indices = np.stack(
    [
      rng.choice(visible, count, replace=len(visible) < count)
      for visible in map(np.flatnonzero, mask)
    ]
  )
  return jnp.take_along_axis(x, jnp.asarray(indices)[:, :, None, None], axis=1)
