"""Kernels of a profile are counted once, in the family that their names say."""

import sys

import pytest

from tests.support.paths import ROOT

sys.path.append(str(ROOT))  # the benchmarks are run from there and not installed

from benchmarks.gpu.kernel_profile import Kernel, family_of, summary

NAMES = {  # as CUDA's profiler reports them
    "triton_tem_fused_flex_attention_0": "attention_forward",
    "triton_tem_fused_flex_attention_backward_2": "attention_backward",
    "triton_red_fused_flex_attention_backward_1": "attention_backward",
    "void pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>": "attention_forward",
    "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<cutlass::bfloat16_t>": (
        "attention_backward"
    ),
    "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NTT": "matmul",
    "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16>": "matmul",
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>": "elementwise",
    "void at::native::reduce_kernel<512, 1, at::native::NormOps>": "elementwise",
    "triton_poi_fused_mul_silu_0": "elementwise",
    "Memcpy HtoD (Pageable -> Device)": "other",
}


@pytest.mark.parametrize(("name", "family"), NAMES.items())
def test_a_kernel_belongs_to_the_family_that_its_name_says(name: str, family: str) -> None:
    assert family_of(name) == family


def test_everything_after_the_optimizer_began_is_the_optimizers() -> None:
    kernels = [Kernel("nvjet_a", 0.0, 3.0), Kernel("nvjet_b", 5.0, 1.0), Kernel("Memset", 9.0, 4.0)]
    result = summary(kernels, optimizer_start=5.0)
    assert result["kernels"] == 3
    assert result["device_seconds"] == pytest.approx(8e-6)
    assert {family: share for family, share in result["share"].items() if share} == {
        "matmul": 3 / 8,
        "optimizer": 5 / 8,
    }
