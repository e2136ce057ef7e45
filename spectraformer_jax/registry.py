"""Registries of named factories, with errors that suggest the nearest name."""

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np

Factory = TypeVar("Factory", bound=Callable[..., Any])
Dataclass = TypeVar("Dataclass")
Entry = TypeVar("Entry")
Info = TypeVar("Info")


def nearest(name: object, known: Iterable[str]) -> str:
  """Returns the end of an error about `name`: the nearest name and all names.

  The text starts with a space; without a near name it lists all names only.
  """
  known = sorted(known)
  return f"{_hint(name, known)} Known: {', '.join(known)}."


def _hint(name: object, known: Sequence[str]) -> str:
  """Returns " Did you mean ...?" with the nearest name, or ""."""
  close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
  return f" Did you mean {close[0]!r}?" if close else ""


def check_choice(option: str, value: object, choices: Iterable[Any]) -> None:
  """Raises ValueError unless the value of `option` is one of `choices`."""
  choices = tuple(choices)
  if value not in choices:
    raise ValueError(
      f"{option} must be one of {', '.join(map(repr, choices))}, got "
      f"{value!r}.{_hint(value, [*map(str, choices)])}"
    )


def check_int(
  option: str, value: Any, least: int, most: int | None = None
) -> int:
  """Returns an integer as an int; raises ValueError for one out of range."""
  is_int = isinstance(value, int | np.integer) and not isinstance(value, bool)
  if not is_int or not least <= value <= (value if most is None else most):
    limits = f">= {least}" if most is None else f"from {least} to {most}"
    raise ValueError(f"{option} must be an integer {limits}, got {value!r}.")
  return int(value)


def info_from_options(info_of: Callable[[Entry], Info]) -> Info:
  """Makes `info` a property, for a class whose options change its facts.

  Args:
    info_of: method that returns the facts about an entry.

  Returns:
    The property, declared with the type of its value: in the base class `info`
    is a class variable, and a type checker does not let a property replace it.
  """
  return cast(Info, property(info_of))


class Registry:
  """Maps names to factories.

  Args:
    kind: what an entry is, for error messages, such as "weight matrix".

  Example:
    >>> shapes = Registry("shape")
    >>> @shapes.register("square")
    ... def square(side=1):
    ...   return side * side
    >>> shapes.build("square", {"side": 3})
    9
  """

  def __init__(self, kind: str) -> None:
    self.kind = kind
    self._factories: dict[str, Callable[..., Any]] = {}

  def register(self, name: str) -> Callable[[Factory], Factory]:
    """Returns a decorator that registers a factory under `name`.

    Args:
      name: registry name.

    Raises:
      ValueError: `name` is registered already.
    """
    if name in self._factories:
      raise ValueError(f"{self.kind} {name!r} is registered already.")

    def decorate(factory: Factory) -> Factory:
      self._factories[name] = factory
      return factory

    return decorate

  def alias(
    self, name: str, class_name: str, base: type[Dataclass], **fixed: Any
  ) -> type[Dataclass]:
    """Registers a subclass of a dataclass, with some options fixed.

    Args:
      name: registry name; also the class attribute `name` of the result.
      class_name: name of the result. Objects can be pickled if the module of
        `base` assigns the result to a variable of this name.
      base: a frozen dataclass.
      **fixed: values of the fixed options, which the result does not accept.

    Returns:
      A subclass of `base`. Its objects never equal those of `base`.

    Raises:
      ValueError: `name` is registered already.

    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Box:
      ...   width: int = 1
      ...   height: int = 1
      >>> shapes = Registry("shape")
      >>> Flat = shapes.alias("flat", "Flat", Box, height=0)
      >>> Flat(width=3), shapes.options("flat")
      (Flat(width=3, height=0), ('width',))
    """
    settings = ", ".join(f"{key}={value!r}" for key, value in fixed.items())
    cls = dataclasses.make_dataclass(
      class_name,
      [
        (option, Any, dataclasses.field(default=value, init=False))
        for option, value in fixed.items()
      ],
      bases=(base,),
      namespace={"name": name},
      frozen=True,
    )
    cls.__module__ = base.__module__
    text = (inspect.getdoc(base) or "").partition("Example:")[0]
    example = f"Example:\n  >>> {class_name}()\n  {cls()!r}\n"
    cls.__doc__ = f"`{base.__name__}` with {settings}.\n\n{text}{example}"
    return self.register(name)(cls)

  def names(self) -> tuple[str, ...]:
    """Returns all names, sorted."""
    return tuple(sorted(self._factories))

  def get(self, name: str) -> Callable[..., Any]:
    """Returns the factory registered under `name`.

    Args:
      name: registry name.

    Raises:
      ValueError: unknown `name`; the message suggests the nearest one.
    """
    if not isinstance(name, str) or name not in self._factories:
      raise ValueError(
        f"Unknown {self.kind} {name!r}.{nearest(name, self._factories)}"
      )
    return self._factories[name]

  def options(self, name: str) -> tuple[str, ...]:
    """Returns the keywords that the factory called `name` accepts."""
    return tuple(inspect.signature(self.get(name)).parameters)

  def build(
    self,
    name: str,
    kwargs: Mapping[str, Any] | None = None,
    shared_options: tuple[str, ...] = (),
  ) -> Any:
    """Calls the factory registered under `name` and returns its result.

    Args:
      name: registry name.
      kwargs: keywords for the factory.
      shared_options: options that the caller of `build` handles itself; the
        error about an unknown keyword lists them, too.

    Raises:
      ValueError: unknown `name`, or a keyword that the factory does not accept.
    """
    factory = self.get(name)
    options = self.options(name)
    for keyword in kwargs or {}:
      if keyword not in options:
        known = (*options, *shared_options)
        hint = nearest(keyword, known) if known else " It takes none."
        raise ValueError(
          f"{self.kind} {name!r} has no option {keyword!r}.{hint}"
        )
    return factory(**(kwargs or {}))
