"""Loads and batches tasks as flat token arrays. Imports numpy and not jax.

  >>> import tempfile
  >>> from spectraformer_jax import data
  >>> digits = data.load("digits", "train", cache_dir=tempfile.mkdtemp())
  >>> batch = next(data.Batches(digits, 32, seed=0, train=True))
  >>> batch["tokens"].shape, batch["tokens"].dtype.name
  ((32, 64), 'uint8')

A task is a function that returns a :class:`Source`, registered under its name
in :data:`TASKS`. :func:`load` builds a split into the token cache once and
memory-maps it from then on. ``docs/data.md`` shows how to add a task. The tasks
of Long Range Arena read the user's files from ``data_dir``, except for ListOps,
which can be drawn; see ``docs/lra.md``.
"""

from spectraformer_jax.data.batches import Batches
from spectraformer_jax.data.cache import default_cache_dir
from spectraformer_jax.data.dataset import Dataset, Facts
from spectraformer_jax.data.formats import listops_text
from spectraformer_jax.data.hash_split import split_by_content
from spectraformer_jax.data.prefetch import Prefetch
from spectraformer_jax.data.readers import (
  aan,
  aclimdb,
  cifar,
  listops_tsv,
  lra_pickles,
  pathfinder_files,
  tfds_folder,
)
from spectraformer_jax.data.registry import TASKS, list_tasks, load
from spectraformer_jax.data.source import SPLITS, Source
from spectraformer_jax.data.tasks import (
  digits,
  fashion,
  image,
  imdb_half,
  listops,
  mail_replies,
  pathfinder,
  pathfinder_synthetic,
  pathx,
  retrieval,
  same_speech,
  spam_bodies,
  text,
)
from spectraformer_jax.data.writer import Writer

__all__ = [
  "SPLITS",
  "TASKS",
  "Batches",
  "Dataset",
  "Facts",
  "Prefetch",
  "Source",
  "Writer",
  "aan",
  "aclimdb",
  "cifar",
  "default_cache_dir",
  "digits",
  "fashion",
  "image",
  "imdb_half",
  "list_tasks",
  "listops",
  "listops_text",
  "listops_tsv",
  "load",
  "lra_pickles",
  "mail_replies",
  "pathfinder",
  "pathfinder_files",
  "pathfinder_synthetic",
  "pathx",
  "retrieval",
  "same_speech",
  "spam_bodies",
  "split_by_content",
  "text",
  "tfds_folder",
]
