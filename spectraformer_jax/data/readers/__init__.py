"""Readers of files that users bring; importing this package registers them."""

from spectraformer_jax.data.readers import (
  aan,
  aclimdb,
  cifar,
  listops_tsv,
  lra_pickles,
  pathfinder_files,
  tfds_folder,
)

__all__ = [
  "aan",
  "aclimdb",
  "cifar",
  "listops_tsv",
  "lra_pickles",
  "pathfinder_files",
  "tfds_folder",
]
