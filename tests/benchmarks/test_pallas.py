import pytest

from benchmarks import pallas


@pytest.mark.slow
def test_measures_and_says_what_is_refused():
  results = pallas.measure(
    ("xla", "reference", "pallas_gpu"),
    length=32,
    is_causal=True,
    batch=1,
    heads=1,
    head_dim=8,
    num_features=16,
    dtype="float32",
    repeats=2,
  )
  directions = [result.direction for result in results]
  assert directions == ["forward"] * 3 + ["both"] * 3
  for xla, reference, refused in (results[:3], results[3:]):
    assert xla.difference == 0.0
    # Float32 sums in another order.
    assert reference.difference < 1e-4
    timing = reference.timing
    assert 0 < timing.fastest <= timing.median <= timing.slowest
    assert "needs a GPU" in refused.refusal


def test_without_an_accelerator_there_is_nothing_to_measure(capsys):
  assert pallas.main([]) == []
  assert "JAX runs on 'cpu'" in capsys.readouterr().out
