"""Which evaluation is the best, and when a run stops early."""

import math

from spectraformer_jax.train.config import EvalSection
from spectraformer_jax.train.run.meters import Evaluation, Record


def is_better(dev: Evaluation, best: Evaluation | None) -> bool:
  """Whether `dev` has the higher accuracy, or an equal one and the lower loss.

  An evaluation whose loss is not finite is worse than any other.

  Example:
    >>> dev = {"accuracy": 0.5, "loss": 1.0}
    >>> is_better(dev, None), is_better(dev, dev)
    (True, False)
  """
  rank = lambda x: (math.isfinite(x["loss"]), x["accuracy"], -x["loss"])
  return best is None or rank(dev) > rank(best)


def out_of_patience(record: Record, section: EvalSection) -> bool:
  """Whether none of the last `patience` evaluations was the best one.

  The answer depends on the record alone, so a resumed run stops at the same
  step.

  Args:
    record: of the run.
    section: `config.eval`; with a patience of 0 no run stops early.

  Example:
    >>> from spectraformer_jax.train.config import default_config
    >>> section = default_config().eval
    >>> section.update(patience=2, every=100)
    >>> record = Record(dev={"step": 300}, best={"step": 100})
    >>> out_of_patience(record, section)
    True
  """
  if not section.patience or record.dev is None or record.best is None:
    return False
  since = record.dev["step"] - record.best["step"]
  return since >= section.patience * section.every
