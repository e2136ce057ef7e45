"""The tasks, one module each; importing this package registers them."""

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

__all__ = [
  "digits",
  "fashion",
  "image",
  "imdb_half",
  "listops",
  "mail_replies",
  "pathfinder",
  "pathfinder_synthetic",
  "pathx",
  "retrieval",
  "same_speech",
  "spam_bodies",
  "text",
]
