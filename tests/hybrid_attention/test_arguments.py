"""Arguments that hybrid attention refuses, in one line each."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectraformer_jax as sf
from tests.helpers import smallest_map
from tests.hybrid_attention.helpers import build_map, draw

IDS = jnp.zeros((2, 6), jnp.int32)
WINDOW = (
  "window must be None, an int of 0 or more, or a pair (left, right) of such, "
  "got {}."
)
COUNT = "{} must be an int of 0 or more, got {}."
CALLS = [
  *(
    ({"window": window}, WINDOW.format(repr(window)))
    for window in (-1, 1.0, True, (1, -2), (1, 2, 3), "3", (None, 2))
  ),
  *(
    ({name: number}, COUNT.format(name, repr(number)))
    for name in ("num_sinks", "num_heavy")
    for number in (-1, 2.0, None, False)
  ),
  (
    {"num_heavy": 1, "is_causal": True},
    "num_heavy cannot be combined with is_causal=True: which keys are heavy "
    "depends on later ones; use num_sinks.",
  ),
  (
    {"num_heavy": 1, "segment_ids": IDS},
    "num_heavy cannot be combined with segment_ids: its scores would mix "
    "packed rows; use window and num_sinks.",
  ),
  (
    {"num_heavy": 1, "return_state": True},
    "num_heavy cannot be combined with initial_state or return_state: a state "
    "keeps no keys to choose from.",
  ),
  (
    {"window": 1, "segment_ids": (IDS, IDS + 1)},
    "window needs the same segment_ids for queries and keys, got a pair of "
    "arrays; pass one array [B, T], or use num_sinks.",
  ),
  (
    {"window": 1, "return_state": True},
    "window and num_sinks carry over in a state only with is_causal=True.",
  ),
  (
    {"num_sinks": 1, "return_state": True},
    "window and num_sinks carry over in a state only with is_causal=True.",
  ),
  (
    {"window": 1, "implementation": "pallas_tpu"},
    "implementation 'pallas_tpu' cannot run: it knows neither window, "
    "num_sinks nor num_heavy.",
  ),
]


def refusal(message):
  # JAX may add lines of its own about the traceback.
  return pytest.raises(ValueError, match=f"^{re.escape(message)}($|\n)")


@pytest.mark.parametrize(("kwargs", "message"), CALLS)
def test_a_call_is_refused(kwargs, message):
  with refusal(message):
    sf.spectral_attention(*draw(6), **build_map(), **kwargs)


def test_a_window_needs_one_length():
  with refusal(
    "window needs query and key of one length, got query.shape=(2, 6, 2, 4), "
    "key.shape=(2, 9, 2, 4); num_sinks and num_heavy do not."
  ):
    sf.spectral_attention(*draw(6, 9), **build_map(), window=1)


def test_a_pair_of_one_array_of_segment_ids_is_one_array():
  arrays = draw(6)
  attend = lambda ids: sf.spectral_attention(
    *arrays, **build_map(), window=1, segment_ids=ids
  )
  np.testing.assert_array_equal(attend((IDS, IDS)), attend(IDS))


def test_integers_of_numpy_and_lists_are_taken():
  arrays = draw(6)
  attend = lambda **kwargs: sf.spectral_attention(
    *arrays, **build_map(), **kwargs
  )
  np.testing.assert_array_equal(
    attend(window=[np.int64(1), 2], num_sinks=np.int32(1)),
    attend(window=(1, 2), num_sinks=1),
  )


@pytest.mark.parametrize("name", ["elu1", "taylor2", "cosformer"])
def test_a_kernel_of_its_own_is_refused(name):
  matrix = dict(reversed(sf.list_feature_maps()))[name]
  fm = smallest_map(name, matrix, head_dim=4)
  variables = fm.init(jax.random.key(0), head_dim=4, num_heads=2)
  maps = {"feature_map": fm, "variables": variables}
  message = (
    f"component {name!r} estimates a kernel of its own, so exact keys and "
    "features share no scale: window, num_sinks and num_heavy need a component "
    "of the softmax or Gaussian kernel, such as 'asderf' or 'posrf'."
  )
  with refusal(message):
    sf.spectral_attention(*draw(6), **maps, window=1)
  with refusal(message):
    sf.init_state(**maps, batch_size=2, num_heads=2, head_dim=4, num_sinks=1)


def test_a_state_of_other_exact_keys_is_refused():
  arrays, maps = draw(6), build_map()
  make = lambda **exact: sf.init_state(
    **maps, batch_size=2, num_heads=2, head_dim=4, value_dim=3, **exact
  )
  attend = lambda state, **exact: sf.spectral_attention(
    *arrays, **maps, initial_state=state, is_causal=True, **exact
  )
  made = "initial_state was made with window={}, num_sinks={}; this call has "
  call = "window={}, num_sinks={}."
  with refusal(made.format(3, 2) + call.format(3, 1)):
    attend(make(window=3, num_sinks=2), window=3, num_sinks=1)
  with refusal(made.format(3, 0) + call.format(None, 0)):
    attend(make(window=3))
  with refusal(made.format(None, 0) + call.format(0, 0)):
    attend(make(), window=0)


def test_attend_state_refuses_exact_keys():
  state = sf.init_state(
    **build_map(), batch_size=2, num_heads=2, head_dim=4, window=3
  )
  with pytest.raises(ValueError, match="attend_state takes a State, got a Hyb"):
    sf.attend_state(state, draw(6)[0], **build_map())


@pytest.mark.parametrize("kwargs", [{"window": -1}, {"num_sinks": 1.5}])
def test_a_state_checks_the_same_arguments(kwargs):
  with pytest.raises(ValueError, match="must be .* 0 or more"):
    sf.init_state(
      **build_map(), batch_size=2, num_heads=2, head_dim=4, **kwargs
    )
