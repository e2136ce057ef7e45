"""One plain sentence about a setting."""

import math

from spectraformer_jax.components import build_component
from spectraformer_jax.study.approximation.pair_spec import split_options
from spectraformer_jax.study.approximation.settings import (
  Setting,
  beats_uniform,
  over_uniform,
  told_apart,
)

# Extrapolating the fit further than this says nothing.
MOST_FEATURES = 1_000_000
# Ratios of times nearer to one are within what single calls scatter.
SAME_TIME = 1.25


def advise(setting: Setting) -> str:
  """What to use, or what not to expect.

  The sentence is about this setting's inputs and sizes and nothing else.
  """
  best = setting.best()
  uniform = f"uniform attention ({setting.uniform_error:.3g})"
  found = f"{with_size(best)} (error {with_interval(best)}{_other(best)})"
  if best["error"] >= setting.uniform_error:
    return (
      f"Every pair is worse than {uniform}, which ignores queries and keys; "
      f"the least bad is {found}: use exact attention or smaller queries and "
      f"keys{_needed(setting, best.pair)}."
    )
  if not beats_uniform(best):
    return (
      f"No pair is clearly better than {uniform}, which ignores queries and "
      f"keys; the least error is that of {found}: use exact attention or "
      f"smaller queries and keys{_needed(setting, best.pair)}."
    )
  share = over_uniform(best)
  return (
    f"Use {found}, {share:.2g} of the error of {uniform}{_ties(setting, best)}"
    f"{_speed(best)}."
  )


def with_size(row) -> str:
  """A pair and its number of features."""
  size = row.num_features
  return row.pair if size is None else f"{row.pair} with M = {size}"


def half_width(row) -> float | None:
  """Half of the error's confidence interval; None without one."""
  half = row["error_ci"]
  # What does not depend on the draw varies by rounding all the same.
  return half if half and half > 1e-6 * row["error"] else None


def with_interval(row) -> str:
  """The error and its confidence interval."""
  half = half_width(row)
  return f"{row['error']:.3g}" + ("" if half is None else f" ± {half:.1g}")


def _other(row) -> str:
  """A remark on maps that estimate another kernel than was asked for."""
  component = build_component(*split_options(row.key["component"]))
  if getattr(component, "kernel", None) == row.key["target"]:
    return ""
  return "; its kernel is another one"


def _ties(setting, best) -> str:
  """Other pairs that the draws do not tell from the best."""
  others = [
    row.pair
    for row in setting.ranking()
    if row.pair != best.pair
    and beats_uniform(row)  # or its draws scatter so that nothing can be told
    and not told_apart(row, best)
  ]
  if not others:
    return ""
  shown = ", ".join(others[:3]) + (" and others" if len(others) > 3 else "")
  return f"; these draws do not tell {shown} from it"


def _speed(best) -> str:
  """How its time compares with that of exact attention."""
  ratio = best["exact_ms"] / best["ms"]
  if max(ratio, 1.0 / ratio) < SAME_TIME:
    return "; it takes about as long as exact attention"
  if ratio < 1.0:
    return (
      f"; but exact attention is {1.0 / ratio:.2g} times as fast at this length"
    )
  return f"; it is {ratio:.2g} times as fast as exact attention"


def _needed(setting, pair) -> str:
  """How many features the fit would ask for to be as good as uniform."""
  fit = setting.slope(pair)
  if fit is None or fit.slope >= 0.0 or not setting.uniform_error:
    return ""
  log_size = (math.log(setting.uniform_error) - fit.intercept) / fit.slope
  largest = max(setting.sizes)
  if not math.log(largest) < log_size < math.log(MOST_FEATURES):
    return ""
  size = float(f"{math.exp(log_size):.1g}")
  return (
    f" (if its error goes on falling like M^{fit.slope:.2f}, it is as good as "
    f"uniform attention at M of about {size:,.0f})"
  )
