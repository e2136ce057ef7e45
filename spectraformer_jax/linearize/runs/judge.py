"""Compares models with the teacher on a split: answers and logits."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spectraformer_jax.data import Dataset
from spectraformer_jax.nn.from_config import Model
from spectraformer_jax.nn.pretrained import Pretrained
from spectraformer_jax.train.config import Config
from spectraformer_jax.train.inputs import make_batches
from spectraformer_jax.train.step import objectives
from spectraformer_jax.train.step.steps import model_inputs, weighted_sums
from spectraformer_jax.typing import Array, PyTree


class Verdict(NamedTuple):
  """What a model does on a split, beside its teacher.

  Attributes:
    accuracy: share of answers that are the label.
    loss: mean cross-entropy of the labels.
    same_answers: share of answers that are the teacher's.
    cosine: mean cosine of the logits with the teacher's.
  """

  accuracy: float
  loss: float
  same_answers: float
  cosine: float


class _State(NamedTuple):
  """What `objectives.for_objective` needs of a training state."""

  variables: PyTree


_Batch = Mapping[str, Any]
_Outputs = tuple[Array, Array, Array]  # logits, labels and weights
_Program = Callable[[_State, _Batch], _Outputs]


def judge(
  config: Config,
  teacher: Pretrained,
  models: Mapping[str, Pretrained],
  dataset: Dataset,
) -> dict[str, Verdict]:
  """Evaluates models on all examples of a split, each once.

  Args:
    config: of the teacher's run: its objective and batch size.
    teacher: with which the models are compared.
    models: by name.
    dataset: the split.

  Returns:
    A verdict for each model, by name.
  """
  programs: list[tuple[Model, _Program]] = []

  def outputs_of(pretrained: Pretrained) -> Callable[[_Batch], _Outputs]:
    model, variables = pretrained
    equal = (program for known, program in programs if known == model)
    program = next(equal, None)
    if program is None:
      # Equal models, such as other draws of their maps, share a program.
      program = _program(config, model)
      programs.append((model, program))
    return functools.partial(program, _State(variables))

  outputs = {name: outputs_of(model) for name, model in models.items()}
  outputs[""] = outputs_of(teacher)
  totals = {name: jnp.zeros(5) for name in models}
  for batch in make_batches(config, dataset, train=False):
    expected = outputs[""](batch)
    for name in models:
      totals[name] += _sums(outputs[name](batch), expected)
  verdicts = {}
  for name, total in totals.items():
    *sums, weight = (float(x) for x in total)
    verdicts[name] = Verdict(*(x / weight for x in sums))
  return verdicts


def _program(config: Config, model: Model) -> _Program:
  """Returns a compiled function of state and batch."""

  def step(
    state: _State, batch: _Batch, *, axis_name: str | None = None
  ) -> _Outputs:
    del axis_name
    logits = model.apply(state.variables, *model_inputs(batch))
    return jnp.asarray(logits), batch["label"], batch["weight"]

  step = objectives.for_objective(
    step,
    objective=config.train.objective,
    mask_token=model.vocab_size - 1,
  )
  return jax.jit(step)


@jax.jit
def _sums(found: _Outputs, expected: _Outputs) -> Array:
  """Returns the weighted sums of a verdict's figures, and of the weights."""
  logits, label, weight = found
  teacher = expected[0]
  sums = weighted_sums(logits, label, weight)
  is_same = jnp.argmax(logits, -1) == jnp.argmax(teacher, -1)
  norm = lambda x: jnp.linalg.norm(x, axis=-1)
  cosine = jnp.sum(logits * teacher, -1) / (norm(logits) * norm(teacher))
  return jnp.stack(
    [
      sums.correct,
      sums.loss,
      jnp.sum(is_same.astype(jnp.float32) * weight),
      jnp.sum(cosine * weight),
      sums.weight,
    ]
  )
