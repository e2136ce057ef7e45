import csv

import pytest

from benchmarks import kernel_mse


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  path = tmp_path_factory.mktemp("kernel_mse") / "table.csv"
  results = kernel_mse.main(["--seeds=2", f"--csv={path}"])
  with open(path, newline="") as file:
    lines = list(csv.reader(file))
  return {result.row.label: result for result in results}, lines


@pytest.mark.slow
def test_known_ratios(run):
  results, _ = run
  assert results["posrf"].geo == 1.0
  # Var of the hyperbolic map is that of PosRF times (1 - exp(-|x + y|^2)) / 2.
  assert results["posrf_hyp"].geo == pytest.approx(0.5, rel=1e-3)
  assert results["posrf_hyp"].geo_equal_width == pytest.approx(1.0, rel=1e-3)
  assert results["hrf, angular, n=8"].geo_equal_width == pytest.approx(
    36 * results["hrf, angular, n=8"].geo
  )


@pytest.mark.slow
def test_ordering_by_theory(run):
  # Families that contain one another, each at its own optimum.
  results, _ = run
  for chain in (
    ("posrf", "oprf", "saderf", "aderf", "asderf"),
    ("oprf", "sderf"),
    ("saderf", "saderf, per dimension"),
  ):
    geos = [results[name].geo for name in chain]
    assert geos == sorted(geos, reverse=True), chain


def test_all_rows_have_figures_within_the_tolerance(run):
  # Two seeds: a factor of 2 for the maps whose ratio varies most from one set
  # of inputs to the next; five seeds stay within 1.5.
  results, _ = run
  for result in results.values():
    assert 0.5 < result.geo / result.row.geo < 2.0, result


def test_csv(run):
  results, lines = run
  assert [line[0] for line in lines] == ["component", *results]
  assert all(len(line) == len(lines[0]) for line in lines)


def test_a_figure_outside_the_tolerance_is_flagged(run):
  results, _ = run
  far = results["oprf"]._replace(geo=1.6 * results["oprf"].row.geo)
  assert kernel_mse.verdict(far) == "off by a factor 1.60"
  assert kernel_mse.verdict(far._replace(geo=far.row.geo)) == "ok"
