"""The tasks, one module each; importing this package registers them."""

import importlib

for _module in (
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
):
  importlib.import_module(f"{__name__}.{_module}")
