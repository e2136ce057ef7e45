"""Names to factories, with errors that name the nearest known one."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

Factory = TypeVar("Factory", bound=Callable[..., Any])


def nearest(name: str, known: Iterable[str]) -> str:
  """Returns " Did you mean ...? Known: ..." for an error about `name`."""
  known = sorted(known)
  close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
  hint = f" Did you mean {close[0]!r}?" if close else ""
  return f"{hint} Known: {', '.join(known)}."


class Registry:
  """Maps names to factories.

  Args:
    kind: what the entries are, for messages: "component", "weight matrix".

  Example:
    >>> shapes = Registry("shape")
    >>> @shapes.register("square")
    ... def square(side=1):
    ...   return side * side
    >>> shapes.build("square", {"side": 3})
    9
  """

  def __init__(self, kind: str):
    self.kind = kind
    self._factories: dict[str, Callable[..., Any]] = {}

  def register(self, name: str) -> Callable[[Factory], Factory]:
    """Decorator that files a factory under `name`; a second one raises."""
    if name in self._factories:
      raise ValueError(f"{self.kind} {name!r} is registered already.")

    def decorate(factory: Factory) -> Factory:
      self._factories[name] = factory
      return factory

    return decorate

  def names(self) -> tuple[str, ...]:
    """All names, sorted."""
    return tuple(sorted(self._factories))

  def get(self, name: str) -> Callable[..., Any]:
    """The factory called `name`; ValueError with the nearest name if none."""
    if not isinstance(name, str) or name not in self._factories:
      raise ValueError(
        f"Unknown {self.kind} {name!r}.{nearest(name, self._factories)}"
      )
    return self._factories[name]

  def options(self, name: str) -> tuple[str, ...]:
    """Keywords that the factory called `name` takes."""
    return tuple(inspect.signature(self.get(name)).parameters)

  def build(
    self,
    name: str,
    kwargs: Mapping[str, Any] | None = None,
    shared_options: tuple[str, ...] = (),
  ) -> Any:
    """Calls the factory called `name`, refusing keywords it does not take.

    Args:
      name: of an entry.
      kwargs: for its factory.
      shared_options: what the caller takes for every entry, for the message.
    """
    factory = self.get(name)
    takes = self.options(name)
    for keyword in kwargs or {}:
      if keyword not in takes:
        known = (*takes, *shared_options)
        options = nearest(keyword, known) if known else " It takes none."
        raise ValueError(
          f"{self.kind} {name!r} has no option {keyword!r}.{options}"
        )
    return factory(**(kwargs or {}))
