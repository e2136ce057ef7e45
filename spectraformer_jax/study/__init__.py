"""Compares attentions: their error, and the cost and result of training.

Command line: ``python -m spectraformer_jax.study``.
"""

import importlib
import sys
import warnings

# Level of both studies' tests. Confidence intervals hold 1 - SIGNIFICANCE.
SIGNIFICANCE = 0.05


def moved(former: str, place: str) -> None:
  """Puts a module in the place of its old name, and warns the importer.

  Args:
    former: the old name, ``__name__`` in the module that calls this.
    place: name of the module to use instead.
  """
  warnings.warn(f"{former} is now {place}.", DeprecationWarning, stacklevel=3)
  sys.modules[former] = importlib.import_module(place)
