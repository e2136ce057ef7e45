"""Gives advice on a conversion, in one sentence."""

from spectraformer_jax.linearize.runs import speed
from spectraformer_jax.linearize.runs.outcome import (
  CONVERSION,
  TEACHER,
  LayerFigures,
  Outcome,
)

# Share of the teacher's answers from which a conversion may take its place.
SAME_ANSWERS = 0.98
# Share of the error of uniform attention above which a layer is named.
LARGE_ERROR = 0.5


def advise(outcome: Outcome) -> str:
  """Returns a sentence: whether to use the conversion, and what limits it."""
  worst = max(outcome.layers, key=_over_uniform)
  clauses = [_on_model(outcome), _on_layer(outcome, worst), _on_speed(outcome)]
  text = "; ".join(filter(None, clauses))
  return f"{text[0].upper()}{text[1:]}."


def _over_uniform(figures: LayerFigures) -> float:
  """The layer's error over that of uniform attention."""
  found = figures.certificate
  return found.error_all / max(found.uniform_error, 1e-12)


def _on_model(outcome: Outcome) -> str:
  """Judges the model by its answers on the dev split."""
  if not outcome.verdicts:
    return ""
  found = outcome.verdicts[CONVERSION]
  share = f"{100 * found.same_answers:.1f} % of the dev examples"
  if found.same_answers >= SAME_ANSWERS:
    is_long = outcome.speeds[0].length >= _break_even(outcome)
    subject = "use the conversion: it" if is_long else "the conversion"
    text = f"{subject} gives the teacher's answer to {share}"
  else:
    text = (
      f"the conversion gives the teacher's answer to {share} only, so try more "
      "features, a window, or a short run of fine-tuning"
    )
  others = {
    name: verdict.same_answers
    for name, verdict in outcome.verdicts.items()
    if name not in (CONVERSION, TEACHER)
  }
  name = max(others, key=lambda name: others[name])
  if others[name] >= found.same_answers:
    text += f"; {name} without any fit gives it to {100 * others[name]:.1f} %"
  return text


def _on_layer(outcome: Outcome, worst: LayerFigures) -> str:
  """Names the layer with the largest error, relative to uniform attention."""
  found = worst.certificate
  figures = f"{found.error_all:.2g} (uniform {found.uniform_error:.2g})"
  if _over_uniform(worst) <= LARGE_ERROR:
    largest = max(outcome.layers, key=lambda x: x.certificate.error_all)
    found = largest.certificate
    return (
      f"the largest error of a layer is {found.error_all:.2g} "
      f"({largest.layer.name}, uniform {found.uniform_error:.2g})"
    )
  more = []
  if outcome.feature_map.num_features:
    more.append(f"--num_features {2 * outcome.feature_map.num_features}")
  if outcome.exact.window is None:
    more.append("a window")
  return (
    f"{worst.layer.name} keeps an error of {figures}: give it "
    f"{', '.join([*more, 'or leave it exact'])}"
  )


def _on_speed(outcome: Outcome) -> str:
  """Says at which lengths linear attention is worth its while."""
  length = _break_even(outcome)
  first = outcome.speeds[0]
  ratio = first.exact_ms / first.ms
  text = f"by the count of products it pays from {length} positions on"
  if first.length < length:
    return f"{text}, which is more than the {first.length} captured here"
  return f"{text}, and at {first.length} it was {ratio:.2g} times as fast"


def _break_even(outcome: Outcome) -> int:
  """Returns the length from which linear attention needs fewer products."""
  features = speed.num_features_of(
    outcome.feature_map, outcome.source.fitted[0].key.shape[-1]
  )
  return speed.break_even(features, outcome.exact)
