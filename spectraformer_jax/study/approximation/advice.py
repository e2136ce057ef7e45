"""Gives advice on a setting, in one sentence."""

import math

from spectraformer_jax.components import build_component
from spectraformer_jax.study.approximation.pair_spec import split_options
from spectraformer_jax.study.approximation.results import Measurement
from spectraformer_jax.study.approximation.settings import (
  Setting,
  beats_uniform,
  differ_significantly,
  over_uniform,
)

# The fitted power of M is not extrapolated further than this.
MOST_FEATURES = 1_000_000
# Ratios of times nearer to one than this are within the scatter of calls.
SAME_TIME = 1.25


def advise(setting: Setting) -> str:
  """Returns a sentence that names the pair to use, or says why to use none.

  The sentence holds for the inputs and sizes of this setting only.
  """
  best, uniform_error = setting.best(), setting.uniform_error
  uniform = f"uniform attention ({uniform_error:.3g})"
  size = best.key.num_features
  found = best.pair if size is None else f"{best.pair} with M = {size}"
  component = build_component(*split_options(best.key.component))
  is_other = getattr(component, "kernel", None) != best.key.target
  remark = f"; its kernel is not {best.key.target}" if is_other else ""
  found += f" (error {with_interval(best)}{remark})"
  if beats_uniform(best):
    return (
      f"Use {found}, {over_uniform(best):.2g} of the error of {uniform}"
      f"{_ties(setting, best)}{_speed(best)}."
    )
  verdict, least = "No pair is clearly better", "the least error is that of"
  if best.figures.error >= uniform_error:
    verdict, least = "Every pair is worse", "the least bad is"
  return (
    f"{verdict} than {uniform}, which ignores queries and keys; {least} {found}"
    ": use exact attention or smaller queries and keys"
    f"{_needed(setting, best.pair)}."
  )


def half_width(row: Measurement) -> float | None:
  """Half of the error's confidence interval; None without one."""
  half = row.figures.error_ci
  # Errors that do not depend on the draw still vary by rounding: no interval.
  return half if half and half > 1e-6 * row.figures.error else None


def with_interval(row: Measurement) -> str:
  """Formats the error and its confidence interval."""
  half = half_width(row)
  interval = "" if half is None else f" ± {half:.1g}"
  return f"{row.figures.error:.3g}{interval}"


def _ties(setting: Setting, best: Measurement) -> str:
  """Names the pairs whose errors do not differ significantly from the best.

  Pairs that do not beat uniform attention are left out: their errors may
  scatter too much to differ from anything.
  """
  others = [
    row.pair
    for row in setting.ranking()
    if row.pair != best.pair
    and beats_uniform(row)
    and not differ_significantly(row, best)
  ]
  if not others:
    return ""
  shown = ", ".join(others[:3]) + (" and others" if len(others) > 3 else "")
  return f"; not significantly worse: {shown}"


def _speed(best: Measurement) -> str:
  """Compares the time with that of exact attention."""
  ratio = best.figures.exact_ms / best.figures.ms
  if 1.0 / SAME_TIME < ratio < SAME_TIME:
    return "; it takes about as long as exact attention"
  if ratio > 1.0:
    return f"; it is {ratio:.2g} times as fast as exact attention"
  return (
    f"; but exact attention is {1 / ratio:.2g} times as fast at this length"
  )


def _needed(setting: Setting, pair: str) -> str:
  """Extrapolates to the M at which the error is that of uniform attention.

  Returns no text unless that M lies between the largest measured size and
  `MOST_FEATURES`.
  """
  fit = setting.slope(pair)
  if fit is None or fit.slope >= 0.0 or not setting.uniform_error:
    return ""
  log_size = (math.log(setting.uniform_error) - fit.intercept) / fit.slope
  if not math.log(max(setting.sizes)) < log_size < math.log(MOST_FEATURES):
    return ""
  size = float(f"{math.exp(log_size):.1g}")
  return (
    f" (if its error goes on falling like M^{fit.slope:.2f}, it is as good as "
    f"uniform attention at M of about {size:,.0f})"
  )
