"""Files in the layouts that users bring, made up and small."""

import gzip
import io
import pickle
import tarfile

import numpy as np
from PIL import Image

LISTOPS = ("( ( ( [MAX 2 ) 3 ) ] )", "( ( ( [MIN 2 ) 3 ) ] )")
CONTOUR = "curv_contour_length_14"


def write_listops(folder, count=30, header="Source\tTarget"):
  """The three TSV files, in the form of the release."""
  folder.mkdir(parents=True, exist_ok=True)
  for name in ("train", "val", "test"):
    rows = [f"{LISTOPS[i % 2]}\t{3 - i % 2}" for i in range(count)]
    text = "\n".join([header, *rows]) + "\n"
    (folder / f"basic_{name}.tsv").write_text(text)
  return folder


def write_aan(folder, rows=None, name="new_aan_pairs.{}.tsv"):
  """The three TSV files; each row is a line of bytes."""
  folder.mkdir(parents=True, exist_ok=True)
  rows = rows or [
    b"%d.0\tA%02d\tB%02d\tb'one \"%d\\n'\tb'two \\xc3\\xa9'" % (i % 2, i, i, i)
    for i in range(20)
  ]
  for split in ("train", "eval", "test"):
    path = folder / name.format(split)
    path.write_bytes(b"\n".join(rows) + b"\n")
  return folder


def write_aclimdb(folder, count=20):
  """Reviews of both labels in both parts, and an unlabelled one."""
  for part in ("train", "test"):
    for label, stars in (("neg", 2), ("pos", 9)):
      (folder / part / label).mkdir(parents=True)
      for i in range(count):
        path = folder / part / label / f"{i}_{stars}.txt"
        path.write_bytes(f" {part} {label} {i}<br />é\n".encode())
  (folder / "train" / "unsup").mkdir()
  (folder / "train" / "unsup" / "0_0.txt").write_bytes(b"nobody reads this")
  (folder / "train" / "pos" / ".DS_Store").write_bytes(b"\0")
  return folder


def cifar_images(count, seed):
  """Colour rows [count, 3072] and labels [count], uint8."""
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 256, (count, 3072), np.uint8)
  return images, (np.arange(count) % 10).astype(np.uint8)


def write_cifar_binary(folder, count=10):
  """Six binary batches."""
  folder.mkdir(parents=True)
  for seed, name in enumerate(cifar_names()):
    images, labels = cifar_images(count, seed)
    records = np.concatenate([labels[:, None], images], axis=1)
    (folder / f"{name}.bin").write_bytes(records.tobytes())
  return folder


def write_cifar_python(folder, count=10):
  """Six batches as Python 3 would pickle them."""
  folder.mkdir(parents=True)
  for seed, name in enumerate(cifar_names()):
    images, labels = cifar_images(count, seed)
    batch = {b"data": images, b"labels": labels.tolist(), b"batch_label": b"x"}
    (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
  return folder


def cifar_names():
  return [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def png(pixels):
  """The bytes of a gray PNG."""
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, format="PNG")
  return file.getvalue()


def write_pathfinder(top, side=32, batches=2, count=30, as_array=False, seed=0):
  """Pictures whose top left pixel is the label, and the lists of them."""
  rng = np.random.default_rng(seed)
  folder = top / f"pathfinder{side}" / CONTOUR
  (folder / "metadata").mkdir(parents=True)
  for batch in range(batches):
    (folder / "imgs" / str(batch)).mkdir(parents=True)
    rows = []
    for i in range(count):
      pixels = rng.integers(0, 256, (side, side), np.uint8)
      label = int(rng.integers(2))
      pixels[0, :2] = label, 0
      picture = folder / "imgs" / str(batch) / f"sample_{i}.png"
      picture.write_bytes(png(pixels))
      rows.append([f"imgs/{batch}", picture.name, str(i), str(label), "1.8"])
    path = folder / "metadata" / f"{batch}.npy"
    rows.reverse()
    if as_array:
      np.save(path, np.array(rows))
    else:
      path.write_text("".join(" ".join(row) + "\n" for row in rows))
  return folder


def write_pickles(folder, stem, examples, protocol=4):
  """A list of dicts for each split."""
  folder.mkdir(parents=True, exist_ok=True)
  for split in ("train", "dev", "test"):
    path = folder / f"{stem}.{split}.pickle"
    path.write_bytes(pickle.dumps(examples, protocol=protocol))
  return folder


def padded(ids, length):
  """Ids as the older code pads them."""
  ids = np.asarray(ids, np.int32)
  return np.concatenate([ids, np.zeros(length - len(ids), np.int32)])


def write_tar(path, members, compress=False):
  """A tar file of names and contents, under any name."""
  raw = io.BytesIO()
  with tarfile.open(fileobj=raw, mode="w") as archive:
    for name, content in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      archive.addfile(info, io.BytesIO(content))
  content = raw.getvalue()
  path.write_bytes(gzip.compress(content) if compress else content)
  return path
