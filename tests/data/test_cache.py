import json
import pathlib
import pickle
import threading

import numpy as np
import pytest

from spectraformer_jax.data import Source, cache
from spectraformer_jax.data.label_rules.counts import accuracy

FACTS = dict(name="toy", vocab_size=257, num_classes=2, length=6, id_shift=1)


def make_source(before=lambda: None, **options):
  """A task of raw bytes whose splits hold 5, 3 and 2 examples."""

  def write(writers, progress):
    before()
    sizes = {"train": 5, "dev": 3, "test": 2}
    for split, writer in writers.items():
      for i in range(sizes[split]):  # one call each: the writer must stream
        second = ([9, i], [2]) if options.get("pair") else ()
        writer.append([255, 0, i], [3], [i % 2], *second)
    progress(10, 10)

  return Source(**FACTS | {"write": write} | options)


def leftovers(root):
  return [p for p in pathlib.Path(root).rglob(".*")]


def test_a_split_is_built_once_and_then_mapped(tmp_path):
  calls = []
  source = make_source(before=lambda: calls.append(1))
  first = cache.load_split(source, "dev", tmp_path)
  again = cache.load_split(source, "dev", tmp_path)
  assert calls == [1]
  assert first.fingerprint == again.fingerprint
  assert [e["tokens"].tolist() for e in again] == [
    [256, 1, i + 1] for i in range(3)
  ]
  assert again.labels.tolist() == [0, 1, 0]
  assert isinstance(again.tokens.base, np.memmap)
  assert not again.tokens.flags.writeable
  assert not leftovers(tmp_path)


def test_pairs_have_two_files_of_tokens(tmp_path):
  dataset = cache.load_split(make_source(pair=True), "test", tmp_path)
  assert dataset.pair
  assert dataset[1]["tokens"].tolist() == [256, 1, 2]
  assert dataset[1]["tokens_2"].tolist() == [10, 2]


def test_meta_describes_the_split(tmp_path):
  source = make_source(settings={"seed": 3}, tokenizer="bytes")
  dataset = cache.load_split(source, "dev", tmp_path)
  folder = cache.split_folder(source, "dev", tmp_path)
  assert folder.parent.name.startswith("toy-bytes-")
  meta = json.loads((folder / "meta.json").read_text())
  assert meta["facts"] == source.facts()
  assert meta["fingerprint"] == dataset.fingerprint
  assert (meta["num_examples"], meta["num_tokens"]) == (3, 9)
  assert (meta["longest"], meta["split"], meta["format"]) == (3, "dev", 1)


def test_every_fact_has_a_folder_of_its_own(tmp_path):
  folders = {
    cache.split_folder(make_source(**change), "train", tmp_path)
    for change in ({}, {"length": 7}, {"settings": {"a": 1}}, {"pair": True})
  }
  assert len(folders) == 4


def test_splits_of_separate_passes_are_built_when_asked_for(tmp_path):
  calls = []
  source = make_source(
    before=lambda: calls.append(1), passes=(("train",), ("dev",), ("test",))
  )
  cache.load_split(source, "train", tmp_path)
  assert calls == [1]
  cache.load_split(source, "dev", tmp_path)
  assert calls == [1, 1]
  assert not cache.split_folder(source, "test", tmp_path).exists()


def test_a_failed_build_leaves_nothing(tmp_path):
  def fail():
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    cache.load_split(make_source(before=fail), "dev", tmp_path)
  assert not leftovers(tmp_path)
  assert not cache.split_folder(make_source(), "dev", tmp_path).exists()
  assert len(cache.load_split(make_source(), "dev", tmp_path)) == 3


def test_of_two_builders_the_loser_uses_the_winners_folder(tmp_path):
  # Neither can publish before both have started to write.
  barrier = threading.Barrier(2, timeout=30)
  results, threads = [], []
  for _ in range(2):
    source = make_source(before=barrier.wait)
    threads.append(
      threading.Thread(
        target=lambda source=source: results.append(
          cache.load_split(source, "dev", tmp_path)
        )
      )
    )
    threads[-1].start()
  for thread in threads:
    thread.join(30)
  assert len(results) == 2
  assert results[0].fingerprint == results[1].fingerprint
  assert results[0].tokens.base.filename == results[1].tokens.base.filename
  assert not leftovers(tmp_path)


def test_a_folder_that_cannot_be_moved_is_an_error(tmp_path, monkeypatch):
  def refuse(self, target):
    raise PermissionError("no")

  monkeypatch.setattr(pathlib.Path, "rename", refuse)
  with pytest.raises(PermissionError):
    cache.load_split(make_source(), "dev", tmp_path)
  assert not leftovers(tmp_path)


def truncate(folder):
  path = folder / "tokens.npy"
  path.write_bytes(path.read_bytes()[:-2])


def empty(folder):
  (folder / "offsets.npy").write_bytes(b"")


def flip(folder):
  path = folder / "tokens.npy"
  content = bytearray(path.read_bytes())
  content[-1] ^= 1
  path.write_bytes(content)


def garble(folder):
  (folder / "meta.json").write_text('{"facts"')


def hollow(folder):
  (folder / "meta.json").write_text("[]")


def swap(folder):
  path = folder / "meta.json"
  path.write_text(path.read_text().replace('"split": "dev"', '"split": "x"'))


def plant_pickle(folder):
  (folder / "labels.npy").write_bytes(pickle.dumps([0, 1, 0]))


def plant_objects(folder):
  np.save(folder / "labels.npy", np.array([0, None, 0], object))


@pytest.mark.parametrize(
  ("damage", "reason"),
  [
    (truncate, "mmap length is greater than file size"),
    (empty, "No data left in file"),
    (flip, "arrays do not match the fingerprint"),
    (garble, "Expecting"),
    (hollow, "list indices"),
    (swap, "describes another split"),
    (plant_pickle, "contains pickled"),
    (plant_objects, "Python objects in dtype"),
    (lambda folder: (folder / "meta.json").unlink(), "does not exist"),
    (lambda folder: (folder / "tokens.npy").unlink(), "does not exist"),
  ],
)
def test_damage_is_refused_and_mended_by_deleting(tmp_path, damage, reason):
  source = make_source()
  whole = cache.load_split(source, "dev", tmp_path)
  folder = cache.split_folder(source, "dev", tmp_path)
  damage(folder)
  with pytest.raises(ValueError, match=reason) as caught:
    cache.load_split(source, "dev", tmp_path)
  message = str(caught.value)
  assert str(folder) in message and "delete it" in message
  assert "\n" not in message
  for path in folder.iterdir():
    path.unlink()
  folder.rmdir()
  rebuilt = cache.load_split(source, "dev", tmp_path)
  assert rebuilt.fingerprint == whole.fingerprint


def test_default_folder(monkeypatch):
  monkeypatch.setenv("SPECTRAFORMER_DATA", "/somewhere")
  assert cache.default_cache_dir() == pathlib.Path("/somewhere")
  monkeypatch.delenv("SPECTRAFORMER_DATA")
  assert cache.default_cache_dir() == (
    pathlib.Path.home() / ".cache" / "spectraformer_jax"
  )


def test_writers_refuse_what_does_not_fit(tmp_path):
  def source(*arguments):
    return make_source(
      write=lambda writers, progress: writers["train"].append(*arguments),
      passes=(("train",),),
    )

  for arguments, message in [
    (([1, 2], [1], [0]), "got 1 lengths of sum 1 for 1 labels and 2 tokens"),
    (([1, 2], [2], [0, 1]), "got 1 lengths of sum 2 for 2 labels"),
    (([256], [1], [0]), r"tokens must lie in \[0, 255\], got 256 to 256"),
    (([1], [1], [0.0]), "labels must be integers, got dtype float64"),
    (([], [], []), "task 'toy' has a split of no examples"),
    (([1] * 7, [7], [0]), "1 to length=6 tokens per example, got 7 to 7"),
  ]:
    with pytest.raises(ValueError, match=message):
      cache.load_split(source(*arguments), "train", tmp_path)
  assert not leftovers(tmp_path)


def test_rule_accuracy_guesses_the_training_majority_of_the_group():
  fitted = [[3, 1], [0, 0], [1, 5]]
  # Group 1 was never seen and group 3 is beyond the table: both get label 1,
  # the commonest of all.
  assert accuracy(fitted, [[2, 2], [1, 3], [0, 4], [0, 4]]) == 13 / 16
  assert accuracy(fitted, [[4, 1]]) == 4 / 5
