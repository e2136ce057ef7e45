"""What a conversion starts from: a run of train.py, or a file of arrays."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from spectraformer_jax.kernels import KERNELS
from spectraformer_jax.nn import load_pretrained
from spectraformer_jax.nn.pretrained import Pretrained, checksum, find_step
from spectraformer_jax.study.approximation.capture import capture_workdir
from spectraformer_jax.study.approximation.inputs import Inputs, read_npz
from spectraformer_jax.train.config import Config
from spectraformer_jax.train.run import run_folder

# Numbers of sequences where the flags say nothing.
EXAMPLES, HELD_OUT = 32, 8


class Run(NamedTuple):
  """A run whose model is converted.

  Attributes:
    workdir: of the run.
    config: of the run.
    stored: its config.json.
    step: of the checkpoint.
    teacher: model and variables of that checkpoint.
  """

  workdir: Path
  config: Config
  stored: Mapping[str, Any]
  step: int
  teacher: Pretrained

  @property
  def facts(self) -> dict[str, Any]:
    """JSON values that identify the model."""
    return {
      "workdir": str(self.workdir),
      "step": self.step,
      "attention": self.config.model.attention,
      "fingerprint": checksum(self.teacher.variables)[:12],
    }


class Source(NamedTuple):
  """The inputs of all layers, and where they come from.

  Attributes:
    fitted: inputs of each layer, to fit on.
    held_out: inputs of the same layers on other sequences.
    is_causal: query i sees keys 0..i.
    target: kernel of the exact attention.
    run: the run; None for a file.
  """

  fitted: list[Inputs]
  held_out: list[Inputs]
  is_causal: bool
  target: str
  run: Run | None


def open_run(workdir: Path, step: str) -> Run:
  """Loads the model of a run with exact attention.

  Raises:
    ValueError: the folder holds no run or no such checkpoint, or its attention
      is not exact.
  """
  stored = run_folder.stored_run(workdir)
  config = run_folder.stored_config(workdir)
  attention = config.model.attention
  if attention not in KERNELS:
    why = "has no softmax to copy"
    if attention == "spectral":
      why = "is linear already"
    raise ValueError(
      f"--workdir {str(workdir)!r} {why}: its config.model.attention is "
      f"{attention!r}, and must be {' or '.join(map(repr, KERNELS))}."
    )
  number = find_step(workdir, step)
  teacher = load_pretrained(workdir, step=number)
  return Run(workdir, config, stored, number, teacher)


def capture_run(run: Run, *, examples: int, held_out: int, seed: int) -> Source:
  """Captures the inputs of each layer, on training and on dev examples.

  Args:
    run: from `open_run`.
    examples: number of training examples, drawn by `seed`.
    held_out: number of dev examples, drawn by `seed`.
    seed: of the draw.

  Raises:
    ValueError: a split has fewer examples, or other ones than the run had.
  """
  options: dict[str, Any] = {"step": str(run.step), "seed": seed}
  return Source(
    capture_workdir(run.workdir, split="train", examples=examples, **options),
    capture_workdir(
      run.workdir,
      split="dev",
      examples=held_out,
      flag="--held_out",
      **options,
    ),
    is_causal=run.config.train.objective == "causal",
    target=run.config.model.attention,
    run=run,
  )


def read_file(
  path: Path, *, examples: int | None, held_out: int | None, is_causal: bool
) -> Source:
  """Reads a file of `study`, and holds its last sequences out.

  Args:
    path: of the file.
    examples: number of sequences to fit on, the first ones; None: up to 32 of
      those that are not held out.
    held_out: number of sequences to hold out, the last ones; None: a fifth, up
      to 8.
    is_causal: query i sees keys 0..i.

  Raises:
    ValueError: the file is not one of such arrays, or has too few sequences.
  """
  layers = read_npz(path, may_group=True)
  counts = {len(layer.query) for layer in layers}
  if len(counts) > 1:
    raise ValueError(
      f"--inputs {str(path)!r}: layers have different numbers of sequences, "
      f"{sorted(counts)}."
    )
  (count,) = counts
  if held_out is None:
    held_out = min(HELD_OUT, max(1, count // 5))
  if examples is None:
    examples = min(EXAMPLES, max(1, count - held_out))
  if examples + held_out > count:
    raise ValueError(
      f"--inputs {str(path)!r} holds {count} sequences, which must be at least "
      f"those to fit on and those to hold out, {examples} + {held_out}; see "
      "--examples and --held_out."
    )
  return Source(
    [layer.sequences(slice(0, examples)) for layer in layers],
    [layer.sequences(slice(count - held_out, count)) for layer in layers],
    is_causal,
    "softmax",
    None,
  )
