import pytest

from spectraformer_jax.study.approximation.pair_spec import (
  all_pairs,
  parse_pair,
)


def test_options_reach_the_map():
  pair = parse_pair("posrf(kernel=gaussian)-rom_hybrid(norms=chi)")
  fm = pair.build(32)
  assert fm.component.kernel == "gaussian"
  assert fm.weight_matrix.norms == "chi"
  assert pair.name == "posrf(kernel=gaussian)-rom_hybrid(norms=chi)"


def test_a_map_without_rows():
  pair = parse_pair("elu1-none")
  assert not pair.takes_num_features
  assert parse_pair("relu-orf").takes_num_features
  assert pair.build(None).num_features is None


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("orf", "is not a pair; write component-matrix"),
    ("posrf-orf-iid", "is not a pair"),
    ("posrff-orf", "Did you mean 'posrf'"),
    ("posrf-orff", "Did you mean 'orf'"),
    ("posrf(kernal=gaussian)-orf", "Did you mean 'kernel'"),
    ("posrf(gaussian)-orf", "options are written"),
    ("posrf-none", "needs rows of law"),
  ],
)
def test_what_is_wrong_is_told(text, message):
  with pytest.raises(ValueError, match=message):
    parse_pair(text).build(32)


def test_crossing_leaves_out_what_does_not_fit():
  pairs = all_pairs(["posrf", "poisrf"], ["iid", "orf"])
  assert [p.name for p in pairs] == ["posrf-iid", "posrf-orf", "poisrf-iid"]
  with pytest.raises(ValueError, match="goes with a matrix"):
    all_pairs(["poisrf"], ["orf"])
