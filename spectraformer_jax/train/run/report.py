"""The report of a finished run: report.md, curves.png, and a table.

They are made from config.json and metrics.jsonl alone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from spectraformer_jax.nn.pretrained import damaged
from spectraformer_jax.train.config import default_config, flatten, to_dict
from spectraformer_jax.train.run import run_folder
from spectraformer_jax.train.run.writers import read_rows, result_row

# Okabe and Ito's colours can be told apart with any colour vision, and in grey.
_LINE = {"lw": 1.5, "ms": 3}
_CURVES = {
  "train": {"color": "#0072B2", "ls": "-", "marker": "", **_LINE},
  "dev": {"color": "#D55E00", "ls": "--", "marker": "o", **_LINE},
}
BASELINE_COLOURS = ("#555555", "#009E73", "#CC79A7")

_NUMBER = int | float
_NUMBER_OR_NONE = _NUMBER | None
# The types of the values in the last row of a finished run.
_RESULT = {
  "test/accuracy_best": _NUMBER,
  "test/accuracy_last": _NUMBER,
  "dev/accuracy_best": _NUMBER,
  "dev/accuracy_last": _NUMBER,
  "best_step": _NUMBER,
  "examples_per_second": _NUMBER,
  "step_seconds": _NUMBER,
  "train_seconds": _NUMBER,
  "parameters": _NUMBER,
  "projection_size": _NUMBER,
  "pair": str,
  "provenance": str,
  "task": str,
  "compile_seconds": _NUMBER_OR_NONE,
  "peak_memory_bytes": _NUMBER_OR_NONE,
  "peak_device_bytes": _NUMBER_OR_NONE,
  "baselines": Mapping,
}

Row = Mapping[str, Any]


def summary(workdir: Path) -> dict[str, str]:
  """Returns the result as texts by name, for report and terminal.

  Raises:
    ValueError: the run in `workdir` has not finished, or its result or its
      config is damaged.
  """
  stored = run_folder.stored_run(workdir)
  result = result_row(read_rows(workdir))
  if result is None:
    raise ValueError(f"workdir {str(workdir)!r} holds no finished run.")
  _check_result(workdir, result)
  try:
    return _lines(stored, result)
  except (KeyError, TypeError, ValueError) as error:
    raise damaged(workdir, f"an entry is missing or wrong: {error}") from error


def _lines(stored: Row, result: Row) -> dict[str, str]:
  """Makes `summary` from the contents of config.json and the last row."""
  config = flatten(to_dict(default_config())) | flatten(stored["config"])
  objective, compiling = config["train.objective"], result["compile_seconds"]
  lines = {"diverged": result["diverged"]} if result.get("diverged") else {}
  lines["task"] = stored["data"]["test"]["name"]
  lines["attention"] = result["pair"]
  if objective != "classify":
    lines["objective"] = f"{objective}: accuracy is that of guessed tokens"
  lines["data"] = f"{result['provenance']}; {_split_sizes(stored['data'])}"
  lines["seeds"] = (
    f"training {config['train.seed']}, data {config['task.seed']}"
  )
  if teacher := stored.get(run_folder.TEACHER):
    lines["teacher"] = f"{teacher['workdir']}, step {teacher['step']}"
  lines["steps"] = _steps(result["step"], config["train.num_steps"])
  if skipped := result.get("skipped_steps", 0):
    lines["skipped steps"] = f"{skipped:,}, loss or gradient not finite"
  for kind, name, step in (
    ("best-dev parameters", "best", result["best_step"]),
    ("last parameters", "last", result["step"]),
  ):
    accuracy = _percent(result[f"test/accuracy_{name}"])
    lines[f"test accuracy, {kind}"] = f"{accuracy} (step {step})"
  for name in ("best", "last"):
    lines[f"dev accuracy, {name}"] = _percent(result[f"dev/accuracy_{name}"])
  for name, value in result["baselines"].items():
    lines[f"baseline, {name}"] = _percent(value)
  return lines | {
    "speed": f"{result['examples_per_second']:.1f} examples/s, "
    f"{1e3 * result['step_seconds']:.1f} ms a step of "
    f"{config['train.batch_size']}",
    "compile time": "unknown" if compiling is None else f"{compiling:.1f} s",
    "training time": f"{result['train_seconds']:.0f} s without compilation",
    "peak memory, process": _mebibytes(result["peak_memory_bytes"]),
    "peak memory, device": _mebibytes(result["peak_device_bytes"]),
    "parameters": f"{result['parameters']:,}",
    "random projections": f"{result['projection_size']:,} numbers",
  }


def write_report(workdir: Path) -> None:
  """Writes report.md and curves.png of a finished run.

  Raises:
    ValueError: the run in `workdir` has not finished.
  """
  lines = summary(workdir)
  stored = run_folder.stored_run(workdir)
  plot_curves(workdir)
  environments = stored["environments"]
  command = environments[-1].get("command") or (
    "train_and_evaluate(config, workdir)  # with the config of config.json"
  )
  table = "\n".join(f"| {name} | {value} |" for name, value in lines.items())
  environment = "\n".join(_environment_lines(environments))
  config, metrics = run_folder.CONFIG, run_folder.METRICS
  text = f"""\
# {stored["data"]["test"]["name"]}: {lines["attention"]}

| | |
|---|---|
{table}

The best-dev parameters are those of the evaluation with the highest dev \
accuracy, the lower dev loss among equals. Test accuracy decides nothing. A \
baseline is the accuracy of a simple rule; a result near it says that no more \
than this rule was learnt.

![Loss and accuracy]({run_folder.CURVES})

## Reproduce

```
{command}
```

{environment}

All settings: [{config}]({config}). All metrics: [{metrics}]({metrics}).
"""
  run_folder.write_text(workdir / run_folder.REPORT, text)


def plot_curves(workdir: Path) -> None:
  """Draws loss and accuracy against the step into curves.png."""
  # Imported here, because the import takes a second. Agg needs no display.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  rows = read_rows(workdir)
  result = result_row(rows) or {}
  figure = Figure(figsize=(9, 3.8), layout="constrained", dpi=150)
  FigureCanvasAgg(figure)
  loss_axes, accuracy_axes = figure.subplots(1, 2)
  for axes, metric in ((loss_axes, "loss"), (accuracy_axes, "accuracy")):
    for split, style in _CURVES.items():
      name = f"{split}/{metric}"
      points = [(row["step"], row[name]) for row in rows if name in row]
      if points:
        axes.plot(*zip(*points, strict=True), label=split, **style)
    axes.set(xlabel="step", ylabel=metric)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
  loss_axes.set_ylim(bottom=0)
  baselines = result.get("baselines", {})
  for i, (name, value) in enumerate(baselines.items()):
    colour = BASELINE_COLOURS[i % len(BASELINE_COLOURS)]
    label = f"{name} {value:.3f}"
    accuracy_axes.axhline(value, color=colour, ls=":", lw=1.5, label=label)
  if result:
    accuracy_axes.plot(
      result["best_step"],
      result["test/accuracy_best"],
      marker="*",
      ms=12,
      ls="",
      color="black",
      label=f"test, best-dev {result['test/accuracy_best']:.3f}",
    )
    figure.suptitle(f"{result['task']}: {result['pair']}")
  highest = accuracy_axes.dataLim.y1
  accuracy_axes.set_ylim(0, min(1.02, 1.2 * highest))
  loss_axes.legend(frameon=False)
  accuracy_axes.legend(frameon=False, fontsize=8)
  partial = workdir / f".{run_folder.CURVES}.partial"
  figure.savefig(partial, format="png")
  partial.replace(workdir / run_folder.CURVES)


def print_summary(workdir: Path) -> None:
  """Prints the result as a table on stdout."""
  lines = summary(workdir)
  table = Table("", "", show_header=False, title=f"result ({workdir})")
  for name, value in lines.items():
    table.add_row(name, value, style="bold" if "best-dev" in name else "")
  Console().print(table)


def _environment_lines(environments: Sequence[Row]) -> list[str]:
  """Returns a table of the last environment; says if there were others."""
  env = dict(environments[-1])
  env.pop("command", None)
  devices = env.pop("devices", None) or ["unknown"]
  env["devices"] = f"{len(devices)} x {devices[0]}"
  lines = ["| | |", "|---|---|"]
  lines += [f"| {name} | {value} |" for name, value in env.items()]
  if len(environments) > 1:
    lines += [
      "",
      f"Started in {len(environments)} different environments; "
      "these are the last one's.",
    ]
  return lines


def _check_result(workdir: Path, result: Row) -> None:
  """Refuses a result in which a value is missing or has a wrong type."""
  wrong = [
    repr(name)
    for name, kind in _RESULT.items()
    if not isinstance(result.get(name), kind)
  ]
  if wrong:
    raise ValueError(
      f"The result, the last row of {str(workdir / run_folder.METRICS)!r}, is "
      f"damaged: {', '.join(wrong)} missing or wrong; delete the row, and "
      "train.py makes it again from the last checkpoint."
    )


def _split_sizes(data: Row) -> str:
  return ", ".join(f"{s['num_examples']:,} {name}" for name, s in data.items())


def _steps(done: int, planned: int) -> str:
  early = f" of {planned:,}, stopped early" if done < planned else ""
  return f"{done:,}{early}"


def _percent(value: float) -> str:
  return f"{100 * value:.2f} %"


def _mebibytes(value: float | None) -> str:
  if value is None:
    return "not reported by this device"
  return f"{value / 2**20:,.0f} MiB"
