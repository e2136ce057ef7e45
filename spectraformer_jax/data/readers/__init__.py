"""Readers of files that users bring; importing this package registers them."""

import importlib

for _module in (
  "aan",
  "aclimdb",
  "cifar",
  "listops_tsv",
  "lra_pickles",
  "pathfinder_files",
  "tfds_folder",
):
  importlib.import_module(f"{__name__}.{_module}")
