"""Modules that have moved still import, and say where they are now."""

import importlib
import sys

import pytest


@pytest.mark.parametrize(
  ("name", "place", "exported"),
  [
    ("cells", "sweep", ["Sweep"]),
    ("capture", "approximation.capture", ["capture", "capture_workdir"]),
    ("inputs", "approximation.inputs", ["Inputs", "make_inputs", "write_npz"]),
  ],
)
def test_a_former_place_warns_and_has_the_same_objects(name, place, exported):
  former = f"spectraformer_jax.study.{name}"
  new = f"spectraformer_jax.study.{place}"
  sys.modules.pop(former, None)
  with pytest.warns(DeprecationWarning, match=f"{former} is now {new}"):
    module = importlib.import_module(former)
  for name in exported:
    assert getattr(module, name) is getattr(importlib.import_module(new), name)
