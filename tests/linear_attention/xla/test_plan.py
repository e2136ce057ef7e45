"""Sizes of chunks, steps, strides and blocks, without running anything."""

import jax
import jax.numpy as jnp
import pytest

import spectraformer_jax as sf
from spectraformer_jax.linear_attention import for_platform
from spectraformer_jax.linear_attention.platforms import current_platform
from spectraformer_jax.linear_attention.xla.plan import (
  SIZES,
  BlockPlan,
  CausalPlan,
  plan_blocks,
  plan_causal,
)


@pytest.mark.parametrize(
  ("platform", "length", "num_heads", "expected"),
  [
    # 2048 positions of 16 heads are two chunks of 64.
    ("cpu", 4096, 16, CausalPlan(64, 2, 2, 16)),
    ("cpu", 100, 16, CausalPlan(64, 2, 1, 1)),
    ("cpu", 10, 16, CausalPlan(10, 1, 1, 1)),
    ("gpu", 4096, 16, CausalPlan(128, 8, 2, 2)),
    ("tpu", 4096, 16, CausalPlan(256, 8, 1, 2)),
    ("rocm", 4096, 16, CausalPlan(128, 8, 2, 2)),
  ],
)
def test_causal_plans(platform, length, num_heads, expected):
  plan = plan_causal(
    length, num_heads, None, is_packed=False, platform=platform
  )
  assert plan == expected
  assert plan.num_steps * plan.step_size >= length


@pytest.mark.parametrize("platform", SIZES)
def test_causal_steps_of_one_chunk(platform):
  for chunk_size, is_packed in ((24, False), (24, True), (None, True)):
    plan = plan_causal(
      1000, 2, chunk_size, is_packed=is_packed, platform=platform
    )
    assert plan.chunks_per_step == 1
    assert plan.chunk_size == (chunk_size or SIZES[platform].chunk)
    # Strides are of equal length, so the padding is less than one of them.
    assert plan.num_steps * plan.step_size - 1000 < (
      plan.steps_per_stride * plan.step_size
    )


@pytest.mark.parametrize(
  ("platform", "num_devices", "length", "num_heads", "expected"),
  [
    ("cpu", 1, 4096, 16, BlockPlan(2048, 2, True)),
    ("cpu", 1, 5000, 16, BlockPlan(2500, 2, True)),
    ("cpu", 1, 2047, 16, BlockPlan(128, 16, False)),
    ("cpu", 2, 4096, 16, BlockPlan(128, 32, False)),
    ("gpu", 1, 4096, 16, BlockPlan(1024, 4, False)),
    ("tpu", 1, 4096, 16, BlockPlan(2048, 2, False)),
    ("tpu", 1, 100, 16, BlockPlan(100, 1, False)),
  ],
)
def test_block_plans(platform, num_devices, length, num_heads, expected):
  sizes = {"num_devices": num_devices, "platform": platform}
  assert plan_blocks(length, num_heads, None, **sizes) == expected
  of_seven = plan_blocks(length, num_heads, 7, **sizes)
  assert of_seven == BlockPlan(7, -(-length // 7), False)


def test_symbolic_lengths():
  (length,) = jax.export.symbolic_shape("t")
  plan = plan_causal(length, 4, None, is_packed=False, platform="cpu")
  assert plan[:3] == (64, 1, 4)
  assert plan.num_strides == -(-length // 256)
  sizes = {"num_devices": 1, "platform": "cpu"}
  assert plan_blocks(length, 4, None, **sizes).block_size == 64


@pytest.mark.parametrize("is_causal", [False, True])
def test_compiling_for_another_platform_plans_with_its_sizes(is_causal):
  fm = sf.feature_map("posrf", "orf", num_features=8)
  variables = fm.init(jax.random.key(0), head_dim=4)
  x = jax.ShapeDtypeStruct((1, 4096, 2, 4), jnp.float32)
  attend = jax.jit(
    lambda x: sf.spectral_attention(
      *(x, x, x), feature_map=fm, variables=variables, is_causal=is_causal
    )
  )

  def lower():
    return attend.trace(x).lower(lowering_platforms=("tpu",)).as_text()

  own = lower()
  with for_platform("tpu"):
    assert current_platform() == "tpu"
    planned = lower()
  # 2 heads of 4096 positions are one step, or one block, of a TPU.
  assert "1x2x4096x8" in planned.replace("1x2x16x256x8", "1x2x4096x8")
  assert planned != own == lower()
  assert current_platform() == jax.default_backend()
