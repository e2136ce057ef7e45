"""Texts and facts about a run, for its log, config.json and metrics.jsonl."""

import collections
import math
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from spectraformer_jax.data import Dataset
from spectraformer_jax.train.config import Config, pair_name
from spectraformer_jax.train.devices import parallel
from spectraformer_jax.train.run.meters import Evaluation, Record
from spectraformer_jax.train.step.state import TrainState
from spectraformer_jax.typing import PyTree


def split_facts(dataset: Dataset) -> dict[str, Any]:
  """Returns the facts about a split that config.json holds."""
  return {
    **dataset.facts(),
    "num_examples": dataset.num_examples,
    "fingerprint": dataset.fingerprint,
    "baselines": dict(dataset.baselines),
  }


def run_lines(
  config: Config,
  workdir: Path,
  facts: Mapping[str, Mapping[str, Any]],
  sizes: Mapping[str, int],
  start: int,
) -> list[str]:
  """Returns lines about the data, the model and the steps of a run."""
  train = facts["train"]
  counts = ", ".join(f"{f['num_examples']:,} {s}" for s, f in facts.items())
  kinds = parallel.device_kinds()
  begins = f"resumes at step {start}" if start else "starts"
  is_spectral = config.model.attention == "spectral"
  unused = "" if is_spectral else " (config.feature_map has no effect)"
  return [
    f"data: {train['name']} ({train['provenance']}), {counts}",
    f"model: {pair_name(config)}{unused}, {sizes['parameters']:,} parameters, "
    f"{sizes['projection_size']:,} projection numbers, "
    f"on {len(kinds)} x {kinds[0]}",
    f"workdir: {workdir}, {begins}, {config.train.num_steps} steps of "
    f"{config.train.batch_size}",
  ]


def teacher_lines(facts: Mapping[str, Any] | None) -> list[str]:
  """Returns one line about the teacher; none without one.

  Example:
    >>> teacher_lines({"workdir": "runs/x", "step": 3, "fingerprint": "ab"})
    ['teacher: runs/x, step 3, fingerprint ab']
  """
  if facts is None:
    return []
  return [
    f"teacher: {facts['workdir']}, step {facts['step']}, fingerprint "
    f"{facts['fingerprint']}"
  ]


def variable_lines(state: TrainState) -> list[str]:
  """Returns lines: parameters and projection numbers of each part of the model.

  Example:
    >>> import numpy as np
    >>> params = {"head": {"kernel": np.ones((2, 3))}, "encoder": {
    ...   "layer_0": {"query": {"kernel": np.ones((2, 2))}}}}
    >>> drawn = {"encoder": {"layer_0": {"rows": np.ones((8, 2))}}}
    >>> state = TrainState(0, params, {"random_features": drawn}, ())
    >>> for line in variable_lines(state):
    ...   print(line)
    part             parameters  projection
    encoder/layer_0           4          16
    head                      6           0
  """
  trees = state.params, state.collections.get("random_features", {})
  counts = [_counts(tree) for tree in trees]
  parts = sorted(counts[0] | counts[1])
  width = max(map(len, parts))
  return [
    f"{'part':{width}}  parameters  projection",
    *(
      f"{part:{width}}  {counts[0][part]:10,}  {counts[1][part]:10,}"
      for part in parts
    ),
  ]


def _counts(tree: PyTree) -> collections.Counter[str]:
  """Counts numbers by part: the first two names of a path, never the leaf's."""
  counts = collections.Counter[str]()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    names = [str(getattr(part, "key", part)) for part in path]
    counts["/".join(names[:-1][:2] or names)] += leaf.size
  return counts


def memory_line(plan: Mapping[str, int]) -> str:
  """Returns one line about the memory of a training step.

  Example:
    >>> memory_line({"arguments": 2**20, "temporary": 2**21})
    'memory of a step on each device: 1.0 MiB arguments, 2.0 MiB temporary'
  """
  sizes = ", ".join(f"{x / 2**20:,.1f} MiB {name}" for name, x in plan.items())
  return f"memory of a step on each device: {sizes}"


def dev_line(dev: Evaluation, best: Evaluation | None) -> str:
  """Returns one line about the evaluation `dev`."""
  mark = "  (best so far)" if dev is best else ""
  return (
    f"step {dev['step']}: dev accuracy {dev['accuracy']:.4f}, "
    f"loss {dev['loss']:.4f}{mark}"
  )


def early_stop_line(record: Record, patience: int) -> str:
  """Returns one line about why the run ends before its last step."""
  assert record.dev and record.best  # without evaluations no run stops early
  return (
    f"stops early at step {record.dev['step']}: {patience} evaluations without "
    f"a better one than that of step {record.best['step']} "
    f"(dev accuracy {record.best['accuracy']:.4f})"
  )


def divergence(
  record: Record, dev: Evaluation, test_losses: Mapping[str, float]
) -> str | None:
  """Returns why the result of a run is no good; None if it is good.

  Args:
    record: at the end of the run.
    dev: the last evaluation.
    test_losses: by name of the split and the parameters.

  Example:
    >>> dev = {"step": 3, "loss": float("nan"), "accuracy": 0.1}
    >>> divergence(Record(), dev, {})
    'diverged: the loss on the dev split is nan after step 3'
  """
  faults = [
    f"the loss on the {name} is {loss:.4g} after step {dev['step']}"
    for name, loss in {"dev split": dev["loss"], **test_losses}.items()
    if not math.isfinite(loss)
  ]
  if record.skipped_in_a_row:
    faults.append(
      f"the last {record.skipped_in_a_row} steps were skipped, since loss or "
      "gradient was not finite"
    )
  return f"diverged: {', and '.join(faults)}" if faults else None


def result_values(
  config: Config,
  test: Dataset,
  record: Record,
  dev: Evaluation,
  best: Evaluation,
) -> dict[str, Any]:
  """Returns the values of the last row, except test metrics and sizes.

  Args:
    config: of the run.
    test: the test split.
    record: at the end of the run.
    dev: the last evaluation.
    best: the best evaluation.
  """
  batch_size = config.train.batch_size
  speed = dev["step"] * batch_size / record.train_seconds
  learns_labels = config.train.objective == "classify"
  return {
    "dev/accuracy_best": best["accuracy"],
    "dev/accuracy_last": dev["accuracy"],
    "best_step": best["step"],
    "num_steps": config.train.num_steps,
    "skipped_steps": record.skipped,
    "task": test.name,
    "pair": pair_name(config),
    "provenance": test.provenance,
    # Accuracies of simple rules for the labels.
    "baselines": dict(test.baselines) if learns_labels else {},
    "examples_per_second": speed,
    "step_seconds": batch_size / speed,
    "train_seconds": record.train_seconds,
    "compile_seconds": record.compile_seconds,
    "peak_memory_bytes": peak_process_bytes(),
    "peak_device_bytes": parallel.peak_device_bytes(),
  }


def peak_process_bytes() -> int:
  """Returns the largest resident memory of this process so far."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  # macOS gives bytes, Linux KiB.
  return peak if sys.platform == "darwin" else peak * 1024
