"""Modules that have moved still import, and say where they are now."""

import importlib
import sys

import pytest


@pytest.mark.parametrize(
  ("name", "place"),
  [
    ("cells", "sweep"),
    ("capture", "approximation.capture"),
    ("inputs", "approximation.inputs"),
  ],
)
def test_a_former_place_warns_and_has_the_same_objects(name, place):
  former = f"spectraformer_jax.study.{name}"
  new = f"spectraformer_jax.study.{place}"
  sys.modules.pop(former, None)
  with pytest.warns(DeprecationWarning, match=f"{former} is now {new}"):
    module = importlib.import_module(former)
  for exported in module.__all__:
    there = getattr(importlib.import_module(new), exported)
    assert getattr(module, exported) is there
