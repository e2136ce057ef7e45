"""Makes the workdir of a converted run."""

import dataclasses
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spectraformer_jax.data import Dataset
from spectraformer_jax.hybrid_attention.exact_keys import ExactKeys
from spectraformer_jax.linearize.loading import RECORD
from spectraformer_jax.linearize.runs.judge import Verdict, judge
from spectraformer_jax.linearize.runs.outcome import (
  CONVERSION,
  LANDMARK_FEATURES,
  TEACHER,
  Outcome,
)
from spectraformer_jax.linearize.runs.source import Run
from spectraformer_jax.linearize.runs.swap import (
  Conversion,
  spectral_config,
  swap,
)
from spectraformer_jax.study.approximation.pair_spec import Pair, parse_pair
from spectraformer_jax.train.config import pair_name, to_dict
from spectraformer_jax.train.devices import parallel
from spectraformer_jax.train.inputs import load_data
from spectraformer_jax.train.run import describe, run_folder, strict_json
from spectraformer_jax.train.run.checkpoints import Checkpointer
from spectraformer_jax.train.run.meters import Evaluation, Record
from spectraformer_jax.train.step.state import sizes
from spectraformer_jax.typing import FeatureVariables

# Part of config.json of a converted run.
PART = "linearize"


def check_folder(out: Path) -> None:
  """Refuses a folder that holds something else than an earlier conversion.

  Raises:
    ValueError: it is the workdir of a run of train.py, or a file.
  """
  if out.exists() and not out.is_dir():
    raise ValueError(f"--out must be a folder, got the file {str(out)!r}.")
  stored = run_folder.read_config(out, parts=())
  if stored is not None and PART not in stored:
    raise ValueError(
      f"--out {str(out)!r} is the workdir of a run of train.py: use another "
      "folder."
    )


def convert(
  out: Path,
  run: Run,
  found: Outcome,
  landmarks: Mapping[str, Mapping[str, FeatureVariables]],
  record: Mapping[str, Any],
  command: str,
) -> Outcome:
  """Swaps, judges, and writes the converted run into the folder.

  Args:
    out: folder of the results.
    run: the teacher's.
    found: results of the layers.
    landmarks: variables of the maps that were not fitted, by pair and layer.
    record: from `record_of`, for config.json.
    command: the command line.

  Returns:
    The results, with those of the models.

  Raises:
    ValueError: the data are not those of the run.
  """
  datasets = load_data(run.config, ("dev", "test"))
  facts = {name: describe.split_facts(x) for name, x in datasets.items()}
  run_folder.check_data(run.workdir, facts)
  maps = {x.layer.name: x.layer.variables for x in found.layers}
  size = found.feature_map.num_features
  conversion = _swap(run, found.exact, found.pair, size, maps)
  models = {TEACHER: run.teacher, CONVERSION: conversion.pretrained}
  for name, drawn in landmarks.items():
    pair = parse_pair(name)
    swapped = _swap(run, found.exact, pair, LANDMARK_FEATURES, drawn)
    models[name] = swapped.pretrained
  verdicts = judge(run.config, run.teacher, models, datasets["dev"])
  both = {name: models[name] for name in (TEACHER, CONVERSION)}
  tests = judge(run.config, run.teacher, both, datasets["test"])
  result = _result(
    conversion, datasets["test"], verdicts[CONVERSION], tests[CONVERSION]
  )
  best = Evaluation(
    step=0,
    loss=verdicts[CONVERSION].loss,
    accuracy=verdicts[CONVERSION].accuracy,
  )
  contents = {
    "config": to_dict(conversion.config),
    "data": run.stored["data"],
    "environments": [run_folder.environment(command)],
    PART: {**record, "source": run.facts},
  }
  run_folder.write_text(
    out / run_folder.CONFIG, json.dumps(contents, indent=2) + "\n"
  )
  shutil.rmtree(out / run_folder.CHECKPOINTS, ignore_errors=True)
  with Checkpointer(out / run_folder.CHECKPOINTS, keep=1) as checkpointer:
    checkpointer.save(
      parallel.to_host(conversion.state),
      dataclasses.asdict(Record(dev=best, best=best)),
      best_step=0,
    )
  run_folder.write_text(
    out / run_folder.METRICS, strict_json.dumps(result) + "\n"
  )
  return found._replace(
    verdicts=verdicts,
    test_accuracy={name: verdict.accuracy for name, verdict in tests.items()},
  )


def _swap(
  run: Run,
  exact: ExactKeys,
  pair: Pair,
  num_features: int | None,
  maps: Mapping[str, FeatureVariables],
) -> Conversion:
  """Puts maps of a pair into the run's model."""
  config = spectral_config(run.config, pair, num_features, exact)
  return swap(run.teacher, config, run.stored["data"]["train"], maps)


def _result(
  conversion: Conversion, test: Dataset, on_dev: Verdict, on_test: Verdict
) -> dict[str, Any]:
  """Returns the last row of metrics.jsonl; no step was made."""
  kinds = ("best", "last")
  return {
    "step": 0,
    **{f"test/loss_{kind}": on_test.loss for kind in kinds},
    **{f"test/accuracy_{kind}": on_test.accuracy for kind in kinds},
    **{f"dev/accuracy_{kind}": on_dev.accuracy for kind in kinds},
    "best_step": 0,
    "num_steps": conversion.config.train.num_steps,
    "skipped_steps": 0,
    "task": test.name,
    "pair": pair_name(conversion.config),
    "provenance": test.provenance,
    "baselines": dict(test.baselines),
    "examples_per_second": 0.0,
    "step_seconds": 0.0,
    "train_seconds": 0.0,
    "compile_seconds": None,
    "peak_memory_bytes": describe.peak_process_bytes(),
    "peak_device_bytes": parallel.peak_device_bytes(),
    **sizes(conversion.state),
    "diverged": None,
    "test/accuracy": on_test.accuracy,
    "time": round(time.time(), 3),
  }


def record_of(found: Outcome, options: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what `linearize.load` and a reader need to know, as JSON values.

  Args:
    found: results of the layers.
    options: of the fit.
  """
  exact = found.exact._asdict()
  layers = zip(
    found.layers, found.source.fitted, found.source.held_out, strict=True
  )
  return {
    "pair": found.pair.name,
    "num_features": found.feature_map.num_features,
    "is_causal": found.source.is_causal,
    "target": found.source.target,
    **exact,
    **options,
    "layers": [
      {
        "name": figures.layer.name,
        "data": fitted.fingerprint,
        "held_out": held_out.fingerprint,
        "best_step": figures.layer.report.best_step,
        "learning_rate": figures.layer.report.learning_rate,
        "error": figures.certificate.error_all,
        "uniform_error": figures.certificate.uniform_error,
      }
      for figures, fitted, held_out in layers
    ],
  }


def write_record(
  out: Path, found: Outcome, record: Mapping[str, Any], command: str
) -> None:
  """Writes linearize.json: settings, results, versions."""
  run = found.source.run
  contents = {
    **record,
    "source": run and run.facts,
    "models": {name: x._asdict() for name, x in found.verdicts.items()},
    "environment": run_folder.environment(command),
  }
  run_folder.write_text(out / RECORD, json.dumps(contents, indent=2) + "\n")
