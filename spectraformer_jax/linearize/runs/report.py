"""The report of a conversion: what was lost, layer by layer and in all."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spectraformer_jax.linearize.runs import speed
from spectraformer_jax.linearize.runs.advice import advise
from spectraformer_jax.linearize.runs.outcome import (
  CONVERSION,
  TEACHER,
  LayerFigures,
  Outcome,
)
from spectraformer_jax.study.approximation.report import markdown
from spectraformer_jax.train.run.run_folder import environment, write_text

REPORT = "report.md"
MODEL_NOTES = """\
Accuracy and answers are those of the whole dev split, on which nothing was
fitted. Test accuracy decides nothing. The cosine is that of the logits, mean
over examples. Maps that were not fitted are one draw each, with M = 128.
"""
LAYER_NOTES = """\
Error: Frobenius norm of the difference from exact attention over that of exact
attention, on held-out sequences; uniform attention ignores queries and keys.
KL: of the implied attention weights from the exact ones, in nats. Errors of
layers are not the model's: those of a fitted map are systematic and average out
less than those of a drawn one, so choose by the model where there is one.
"""
SPEED_NOTES = """\
Median of calls that took turns with `jax.nn.dot_product_attention`, one
sequence; four times the length is four copies in a row. State: the numbers of a
head that further queries need, beside all keys and values. The count of
products leaves out the projections, which both have.
"""


def write(
  out: Path, outcome: Outcome, *, command: str, pictures: Sequence[Path]
) -> None:
  """Writes report.md into the folder of the results."""
  env = environment(command)
  devices = env["devices"]
  source = outcome.source
  of = "a file of arrays"
  if source.run is not None:
    of = f"`{source.run.workdir}`, step {source.run.step}"
  text = [f"# Linear attention in the place of {source.target}", ""]
  text += [*warnings(outcome), advise(outcome), "", "```", command, "```", ""]
  text += [
    f"{outcome.pair.name}, {_features(outcome)} features a head, "
    f"{_exact(outcome)}; {outcome.steps} steps a layer; {of}. "
    f"{len(source.fitted[0].query)} sequences of {source.fitted[0].length} "
    f"positions to fit on, {len(source.held_out[0].query)} others to measure "
    f"on. spectraformer_jax {env['spectraformer_jax']}, revision "
    f"{env['git_revision'] or 'unknown'}, jax {env['jax']}, {env['platform']}, "
    f"{len(devices)} x {devices[0]}.",
    "",
  ]
  if outcome.verdicts:
    text += ["## The model", "", *markdown(model_rows(outcome))]
    text += ["", MODEL_NOTES]
  text += ["## The layers", "", *markdown(layer_rows(outcome.layers)), ""]
  text += [LAYER_NOTES]
  text += ["## Time and memory", "", *markdown(speed_rows(outcome)), ""]
  text += [_break_even(outcome), "", SPEED_NOTES]
  for picture in pictures:
    text += [f"![{picture.stem}]({picture.name})", ""]
  write_text(out / REPORT, "\n".join(text))


def warnings(outcome: Outcome) -> list[str]:
  """Returns lines about layers that are not as they were meant to be."""
  lines = []
  for figures in outcome.layers:
    name = figures.layer.name
    if why := figures.why_start:
      lines += [f"**{name} is kept as it was before the fit: {why}.**", ""]
  return lines


def model_rows(outcome: Outcome) -> list[dict[str, str]]:
  """Returns the lines of the table of models."""
  rows = []
  for name, verdict in outcome.verdicts.items():
    is_own = name in (TEACHER, CONVERSION)
    test = outcome.test_accuracy.get(name)
    rows.append(
      {
        "pair": name if is_own else f"{name}, not fitted",
        "dev accuracy": _percent(verdict.accuracy),
        "teacher's answers": _percent(verdict.same_answers),
        "cosine": f"{verdict.cosine:.4f}",
        "test accuracy": "" if test is None else _percent(test),
      }
    )
  return rows


def layer_rows(layers: Sequence[LayerFigures]) -> list[dict[str, str]]:
  """Returns the lines of the table of layers, and one of their means."""
  rows = []
  for figures in layers:
    found = figures.certificate
    start = found.start
    row: dict[str, Any] = {"uniform": found.uniform_error}
    row |= {name: c.error_all for name, c in figures.landmarks.items()}
    row["start"] = np.nan if start is None else start.error_all
    row |= {"fitted": found.error_all, "worst head": found.error.max()}
    row["KL at start"] = np.nan if start is None else np.mean(start.kl)
    row |= {"KL": np.mean(found.kl), "entropy": np.mean(found.entropy)}
    row["std of scores"] = np.mean(found.score_std)
    rows.append({"pair": figures.layer.name, **row})
  mean: dict[str, Any] = {"pair": "mean"}
  mean |= {
    name: np.mean([row[name] for row in rows])
    for name in rows[0]
    if name != "pair"
  }
  table = [*rows, mean] if len(rows) > 1 else rows
  return [
    {name: x if name == "pair" else _figure(x) for name, x in row.items()}
    for row in table
  ]


def speed_rows(outcome: Outcome) -> list[dict[str, str]]:
  """Returns the lines of the table of times and sizes."""
  return [
    {
      "length": str(found.length),
      "ms": _figure(found.ms),
      "ms, jax.nn": _figure(found.exact_ms),
      "times as fast": f"{found.exact_ms / found.ms:.2f}",
      "state": f"{found.state:,}",
      "keys and values": f"{found.cache:,}",
    }
    for found in outcome.speeds
  ]


def _break_even(outcome: Outcome) -> str:
  """Says from which length the conversion needs fewer products."""
  length = speed.break_even(_features(outcome), outcome.exact)
  text = (
    f"Fewer products than exact attention from {length} positions on "
    f"(2 F + exact keys, F = {_features(outcome)})."
  )
  captured = outcome.source.fitted[0].length
  if captured < length:
    text += f" At the {captured} captured here the conversion saves nothing."
  return text


def _features(outcome: Outcome) -> int:
  head_dim = outcome.source.fitted[0].key.shape[-1]
  return speed.num_features_of(outcome.feature_map, head_dim)


def _exact(outcome: Outcome) -> str:
  """Describes the exact keys."""
  window, num_sinks, num_heavy = outcome.exact
  parts: Iterable[str] = (
    "" if window is None else f"window {window[0]} and {window[1]}",
    f"{num_sinks} sinks" if num_sinks else "",
    f"{num_heavy} heavy keys" if num_heavy else "",
  )
  return ", ".join(filter(None, parts)) or "no exact keys"


def _percent(share: float) -> str:
  return f"{100 * share:.1f} %"


def _figure(value: float) -> str:
  return "-" if np.isnan(value) else f"{value:.3g}"
