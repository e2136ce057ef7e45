import subprocess
import sys

import pytest

from spectraformer_jax import data

NUMPY_ALONE = """
import sys
import numpy.random
before = set(sys.modules)
import spectraformer_jax.data
from_elsewhere = {name.partition(".")[0] for name in set(sys.modules) - before}
from_elsewhere -= {"numpy", "spectraformer_jax", *sys.stdlib_module_names}
sys.exit(", ".join(sorted(from_elsewhere)) or 0)
"""

NEED_FILES = {"image", "pathfinder", "pathx", "retrieval", "text"}


def test_list_tasks():
  assert {"digits", "listops"} <= set(data.list_tasks())


def test_every_task_takes_a_seed_and_says_what_it_is():
  for name in set(data.list_tasks()) - NEED_FILES:
    source = data.TASKS.build(name, {"seed": 1})
    assert source.name.startswith(name)
    assert [s for group in source.passes for s in group] == list(data.SPLITS)


def test_a_new_task_is_one_function(tmp_path, monkeypatch):
  monkeypatch.setattr(data.TASKS, "_factories", dict(data.TASKS._factories))

  @data.TASKS.register("parity")
  def parity(*, seed=0, length=4):
    def write(writers, progress):
      for split, writer in writers.items():
        for number in range(2**length)[data.SPLITS.index(split) :: 3]:
          bits = [number >> i & 1 for i in range(length)]
          writer.append(bits, [length], [sum(bits) % 2])

    return data.Source(
      name="parity", vocab_size=2, num_classes=2, length=length, write=write
    )

  train = data.load("parity", "train", cache_dir=tmp_path, length=3)
  assert [e["tokens"].tolist() for e in train] == [
    [0, 0, 0],
    [1, 1, 0],
    [0, 1, 1],
  ]
  assert train.baselines == {"majority label": 1.0}


@pytest.mark.parametrize(
  ("arguments", "options", "message"),
  [
    (("listop", "train"), {}, "Unknown task 'listop'. Did you mean 'listops'"),
    (
      ("digits", "val"),
      {},
      "one of 'train', 'dev', 'test', got 'val'",
    ),
    (("digits", "train"), dict(sed=1), "no option 'sed'. Did you mean 'seed'"),
    (("digits", "train"), dict(tokenizer="x"), "has no option 'tokenizer'"),
    (
      ("digits", "train"),
      dict(seed=-1),
      "seed must be an integer >= 0, got -1",
    ),
    (("digits", "train"), dict(seed=0.5), "must be an integer >= 0, got 0.5"),
  ],
)
def test_errors(tmp_path, arguments, options, message):
  with pytest.raises(ValueError, match=message) as caught:
    data.load(*arguments, cache_dir=tmp_path, **options)
  assert "\n" not in str(caught.value)
  assert not list(tmp_path.iterdir())


def test_import_needs_numpy_alone():
  subprocess.run([sys.executable, "-c", NUMPY_ALONE], check=True, timeout=60)
