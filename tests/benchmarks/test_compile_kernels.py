import pytest

from benchmarks import compile_kernels


@pytest.mark.parametrize("is_causal", [False, True])
def test_compiles_for_tpu(is_causal):
  pytest.importorskip("libtpu")
  result = compile_kernels.compile_attention(
    "v5e", head_dim=32, num_features=128, is_causal=is_causal, length=512
  )
  assert result.error is None
  assert min(result.forward, result.both, result.temporary) > 0


def test_sizes_that_do_not_fit_are_refused_before_compilation():
  pytest.importorskip("libtpu")
  result = compile_kernels.compile_attention(
    "v5e", head_dim=128, num_features=8192, is_causal=True
  )
  assert "bytes of VMEM" in result.error


def test_failures_are_rows(monkeypatch):
  def no_device(target):
    raise RuntimeError(f"no compiler for {target}")

  monkeypatch.setattr(compile_kernels, "device_of", no_device)
  results = compile_kernels.main(
    ["--targets=h100", "--head_dims=32", "--num_features=128"]
  )
  assert [result.is_causal for result in results] == [False, True]
  assert all("no compiler for h100" in result.error for result in results)
