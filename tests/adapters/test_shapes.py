"""Shapes that adapters state in their annotations, checked by beartype."""

import beartype
import jax
import jax.numpy as jnp
import jaxtyping
import pytest

import spectraformer_jax as sf
from tests.adapters.helpers import make_map, random_inputs

ADAPTERS = {
  "attention_fn": sf.as_attention_fn,
  "dot_product_attention": sf.as_dot_product_attention,
}


def check_shapes(adapter):
  """Returns the adapter as a function that checks shapes when it is called."""
  call = type(adapter).__call__
  checked = jaxtyping.jaxtyped(call, typechecker=beartype.beartype)
  return lambda *args, **kwargs: checked(adapter, *args, **kwargs)


@pytest.mark.parametrize("name", ADAPTERS)
def test_calls_have_the_shapes_that_are_stated(name):
  fn = check_shapes(ADAPTERS[name](*make_map()))
  query, key, value = random_inputs()
  grouped = jnp.concatenate([query, query], axis=2)
  narrow = value[..., :3]
  for arrays in (
    (query, key, value),
    (grouped, key[:, :4], narrow[:, :4]),
    (query[0], key[0], value[0]),
    tuple(x[None] for x in (query, key, value)),
    tuple(x.astype(jnp.bfloat16) for x in (query, key, value)),
  ):
    out = jax.eval_shape(fn, *arrays)
    assert out.shape == (*arrays[0].shape[:-1], arrays[2].shape[-1])
    assert out.dtype == arrays[2].dtype


@pytest.mark.parametrize("name", ADAPTERS)
def test_other_shapes_are_no_calls(name):
  fn = check_shapes(ADAPTERS[name](*make_map()))
  query, key, value = random_inputs()
  for wrong in (
    (query[..., :4], key, value),
    (query, key[:, :4], value),
    (query[:2], key, value),
    (query, key, value[:, :, :1]),
    (query.astype(int), key, value),
  ):
    with pytest.raises(jaxtyping.TypeCheckError):
      fn(*wrong)


def test_lengths_are_one_number_for_each_example():
  fn = check_shapes(sf.as_dot_product_attention(*make_map()))
  lengths = jnp.array([7, 4, 1])
  assert fn(*random_inputs(), key_value_seq_lengths=lengths).ndim == 4
  with pytest.raises(jaxtyping.TypeCheckError):
    fn(*random_inputs(), key_value_seq_lengths=lengths[:, None])
