"""Which kernel, for which data, at what cost: ``python -m ...study``."""

import importlib
import sys
import warnings


def moved(former: str, place: str) -> None:
  """Replaces a module that has moved, with a warning for its importer.

  Args:
    former: the module's ``__name__``.
    place: the module to use instead.
  """
  warnings.warn(f"{former} is now {place}.", DeprecationWarning, stacklevel=3)
  sys.modules[former] = importlib.import_module(place)
