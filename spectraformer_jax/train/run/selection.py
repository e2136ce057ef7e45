"""Which parameters are the best, and when to look no further."""

import math
from collections.abc import Mapping

from ml_collections import ConfigDict

from spectraformer_jax.train.run.meters import Record


def is_better(
  dev: Mapping[str, float], best: Mapping[str, float] | None
) -> bool:
  """Higher dev accuracy; among equals, lower dev loss.

  Parameters whose loss is not finite are worse than any others.

  Example:
    >>> dev = {"accuracy": 0.5, "loss": 1.0}
    >>> is_better(dev, None), is_better(dev, dev)
    (True, False)
  """
  rank = lambda x: (math.isfinite(x["loss"]), x["accuracy"], -x["loss"])
  return best is None or rank(dev) > rank(best)


def out_of_patience(record: Record, section: ConfigDict) -> bool:
  """Whether the last `patience` evaluations brought nothing better.

  It follows from the record alone, so a run that goes on from a checkpoint
  stops where it would have stopped.

  Args:
    record: of the run.
    section: `config.eval`; a patience of 0 has no end.

  Example:
    >>> record = Record({}, dev={"step": 300}, best={"step": 100})
    >>> out_of_patience(record, ConfigDict({"patience": 2, "every": 100}))
    True
  """
  if not section.patience or record.dev is None:
    return False
  since = record.dev["step"] - record.best["step"]
  return since >= section.patience * section.every
