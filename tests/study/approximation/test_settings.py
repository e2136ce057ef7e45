import pytest

from spectraformer_jax.study.approximation import advice
from spectraformer_jax.study.approximation.report import table_rows
from spectraformer_jax.study.approximation.settings import (
  differ_significantly,
  settings_of,
)
from tests.study.approximation.helpers import row


def setting(*rows):
  (found,) = settings_of(rows)
  return found


def test_settings_are_told_by_inputs_length_and_scale():
  rows = [
    row(**changes)
    for changes in (
      {},
      {"scale": 0.5},
      {"length": 512},
      {"inputs": "layer_0"},
      {"num_features": 128},
    )
  ]
  assert [len(found.rows) for found in settings_of(rows)] == [2, 1, 1, 1]


def test_slope_of_a_power_law():
  errors = {32: 0.4, 128: 0.2, 512: 0.1}
  found = setting(*(row(num_features=m, error=e) for m, e in errors.items()))
  fit = found.slope("posrf-iid")
  assert fit.slope == pytest.approx(-0.5)
  assert fit.standard_error == pytest.approx(0.0, abs=1e-6)
  assert setting(row()).slope("posrf-iid") is None


def test_ranking_is_by_the_most_features():
  found = setting(
    row("a-x", 32, 0.1),
    row("a-x", 64, 0.4),
    row("b-x", 32, 0.9),
    row("b-x", 64, 0.3),
    row("c-x", None, 0.35),
    row("d-x", 64, float("nan")),
  )
  assert [r.pair for r in found.ranking()] == ["b-x", "c-x", "a-x", "d-x"]
  assert found.best().pair == "a-x"


def test_uniform_attention_stands_where_its_error_ranks_it():
  found = setting(row("a-x", error=0.5), row("b-x", error=0.9))
  assert [line["pair"] for line in table_rows(found)] == [
    "exact attention",
    "a-x",
    "uniform attention",
    "b-x",
  ]
  table = table_rows(setting(row("b-x", error=0.5)))
  assert table[-1]["pair"] == "uniform attention"
  assert {tuple(line) for line in table} == {tuple(table[0])}


def test_rounding_is_no_confidence_interval():
  found = setting(row("cosformer-none", error=0.5, error_ci=2e-16), row())
  shown = {line["pair"]: line["±"] for line in table_rows(found)}
  assert shown["cosformer-none"] == "-" and shown["posrf-iid"] == "0.01"
  assert "±" not in advice.with_interval(found.rows[0])


def test_welch():
  assert differ_significantly(row(error=0.5), row(error=0.6))
  assert not differ_significantly(row(error=0.5), row(error=0.505))
  assert not differ_significantly(
    row(error=0.5, error_std=None), row(error=0.9)
  )
  fixed = {"error_std": 0.0, "error_ci": 0.0}
  assert differ_significantly(row(error=0.5, **fixed), row(error=0.6, **fixed))
  assert not differ_significantly(
    row(error=0.5, **fixed), row(error=0.5, **fixed)
  )


def test_advice_to_use_the_best_pair():
  found = setting(
    row("oprf-orf", error=0.2),
    row("oprf-iid", error=0.201),
    row("posrf-iid", error=0.4),
    row("trigrf-iid", error=40.0, error_std=100.0, error_ci=70.0),
  )
  assert advice.advise(found) == (
    "Use oprf-orf with M = 64 (error 0.2 ± 0.01), 0.25 of the error of uniform "
    "attention (0.8); not significantly worse: oprf-iid; but exact "
    "attention is 2 times as fast at this length."
  )
  found = setting(row("relu-iid", error=0.2, exact_ms=2.1))
  assert advice.advise(found) == (
    "Use relu-iid with M = 64 (error 0.2 ± 0.01; its kernel is not softmax), "
    "0.25 of the error of uniform attention (0.8); it takes about as long as "
    "exact attention."
  )


def test_advice_against_all_pairs():
  # 2 M^-1/4 meets 0.8 at M = (2 / 0.8)^4 = 39; 4 M^-1/4 at 625.
  errors = {32: 4 * 32**-0.25, 64: 4 * 64**-0.25}
  found = setting(*(row(num_features=m, error=e) for m, e in errors.items()))
  text = advice.advise(found)
  assert text.startswith("Every pair is worse than uniform attention (0.8)")
  assert "M of about 600" in text


def test_advice_where_the_draws_do_not_tell():
  text = advice.advise(setting(row(error=0.795)))
  assert text.startswith("No pair is clearly better than uniform attention")


def test_advice_where_uniform_attention_is_exact():
  found = setting(row(uniform_error=0.0), row("oprf-orf", uniform_error=0.0))
  assert advice.advise(found).startswith("Every pair is worse")
  assert len(table_rows(found)) == 4
