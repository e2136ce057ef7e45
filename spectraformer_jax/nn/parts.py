"""Modules inside modules: attributes are handed down, not listed again."""

import dataclasses
from typing import TypeVar

import flax.linen as nn

_Module = TypeVar("_Module", bound=nn.Module)


def part_of(module: nn.Module, kind: type[_Module], **attributes) -> _Module:
  """A module of another kind with the attributes that `module` has as well.

  Args:
    module: to be called inside its compact method.
    kind: class of the part.
    attributes: those of the part that differ. Without a "name" the variables of
      the part are those of `module`.
  """
  names = {field.name for field in dataclasses.fields(kind)}
  names -= {"parent", "name", *attributes}
  same = {
    name: getattr(module, name) for name in names if hasattr(module, name)
  }
  part = kind(**same, **attributes)
  if "name" not in attributes:
    nn.share_scope(module, part)
  return part
