"""The command `evaluate`: loss and accuracy of a checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from spectraformer_jax import commands, data
from spectraformer_jax.nn import load_pretrained
from spectraformer_jax.nn.pretrained import find_step
from spectraformer_jax.train.devices import parallel
from spectraformer_jax.train.inputs import load_data
from spectraformer_jax.train.programs import evaluate_split, on_devices
from spectraformer_jax.train.run import describe, run_folder, strict_json
from spectraformer_jax.train.step import steps
from spectraformer_jax.train.step.state import TrainState


def evaluate(
  workdir: Path | str,
  *,
  step: int | str = "best",
  split: str = "test",
  batch_size: int | None = None,
  cache_dir: str | None = None,
) -> dict[str, Any]:
  """Evaluates a checkpoint of a run again, on any number of devices.

  Args:
    workdir: of the run.
    step: "best" (by dev accuracy), "last", or the number of a checkpoint.
    split: "train", "dev" or "test".
    batch_size: of all devices together; None for the run's, rounded up to a
      multiple of the number of devices.
    cache_dir: root of the token cache; None for the run's.

  Returns:
    "step", "split", "examples", "loss", "accuracy", "devices".

  Raises:
    ValueError: the folder holds no run or no such checkpoint, the checkpoint is
      damaged, the data are not those of the run, or the devices cannot share
      the batch.
  """
  workdir = Path(workdir)
  config = run_folder.stored_config(workdir)
  step = find_step(workdir, step)
  if batch_size is None:
    devices = jax.device_count()
    batch_size = -(-config.eval.batch_size // devices) * devices
  parallel.check_batch_size("batch_size", batch_size)
  config.eval.batch_size = batch_size
  if cache_dir is not None:
    config.task.cache_dir = cache_dir
  (dataset,) = load_data(config, [split]).values()
  run_folder.check_data(workdir, {split: describe.split_facts(dataset)})
  model, variables = load_pretrained(workdir, step=step)
  params = variables.pop("params")
  state = TrainState(jnp.int32(step), params, variables, opt_state=())
  means = evaluate_split(
    config,
    on_devices(config, model, steps.eval_step),
    parallel.replicate(state),
    dataset,
  )
  return {
    "step": step,
    "split": split,
    "examples": len(dataset),
    **means,
    "devices": jax.device_count(),
  }


def main(argv: Sequence[str]) -> None:
  """Prints the result as one JSON object."""
  parser = commands.Parser(
    "spectraformer_jax.train evaluate",
    "Prints loss and accuracy of a checkpoint as a JSON object.",
  )
  parser.add_argument("--workdir", required=True)
  parser.add_argument(
    "--step", default="best", help="best (by dev accuracy), last, or a number"
  )
  parser.add_argument("--split", default="test", choices=data.SPLITS)
  parser.add_argument("--batch_size", type=int)
  parser.add_argument("--cache_dir", help="root of the token cache")
  print(strict_json.dumps(evaluate(**vars(parser.parse_args(argv)))))
