"""FP4 attention: its numerics on the CPU, and the kernel compiled for the GPUs that have them."""

import importlib.util
import re

import pytest
import torch

from lowbit.ops import attention_fp4 as module
from lowbit.ops import registry
from lowbit.ops.attention_fp4 import OP, attention_fp4
from lowbit.ops.attention_fp4.prepare import TILE, prepare, quantize
from lowbit.ops.attention_fp4.reference import KEYS
from lowbit.ops.attention_fp4.triton import STAGES, WARPS
from lowbit.ops.block_scales import E4M3

# Relative L1 of NVFP4 with two-level P on normal data, as measured for this project.
GAUSSIAN_L1 = 0.192


def make(b=1, h=1, kv=1, length=300, keys=500, d=64, dtype=torch.float16):
    generator = torch.Generator().manual_seed(0)
    shapes = ((b, h, length, d), (b, kv, keys, d), (b, kv, keys, d))
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


def exact(q, k, v, scale=None):
    q, k, v = (t.double() for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)


def error(got, want) -> float:
    """Return the relative L1 error."""
    return ((got.double() - want).abs().sum() / want.abs().sum()).item()


@pytest.mark.parametrize(
    "shape",
    [
        {"d": 128},
        {"h": 4, "kv": 2},
        {"b": 2, "length": 1, "keys": 63},
        {"length": 129, "keys": 128},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_of_normal_data_is_that_of_the_format(shape, dtype):
    q, k, v = make(**shape, dtype=dtype)
    got = attention_fp4(q, k, v)
    assert (got.dtype, got.shape) == (dtype, q.shape)
    # A tenth more for data of another seed; a result twice as exact would not be FP4.
    assert 0.5 * GAUSSIAN_L1 < error(got, exact(q, k, v)) < 1.1 * GAUSSIAN_L1


def test_a_bias_of_keys_and_of_queries_does_no_harm():
    """Both means are taken off; one in Q without its correction, or one left in K, would show."""
    q, k, v = make(dtype=torch.float32)
    plain = error(attention_fp4(q, k, v), exact(q, k, v))
    bias = 8 * torch.randn(64, generator=torch.Generator().manual_seed(1))
    for q_bias, k_bias in ((0, bias), (bias / 16, bias)):
        biased = q + q_bias, k + k_bias, v
        assert error(attention_fp4(*biased), exact(*biased)) < 1.2 * plain


def test_one_key_gives_its_value_in_fp4():
    q, k, v = make(keys=1)
    want = v.float() + torch.zeros(300, 64)
    got = attention_fp4(q, k, v).float()
    # Alone in its block of 16 keys, a value keeps the 3 bits of its E4M3 scale, and has code 6.
    assert ((got - want).abs() <= want.abs() / 14).all()


@pytest.mark.parametrize("factors", [(1e-3, 1e3, 1e-4), (30.0, 1 / 30, 500.0), (1e-6, 1e6, 1e6)])
def test_error_does_not_depend_on_the_size_of_the_inputs(factors):
    given = make(dtype=torch.float32)
    scaled = [t * f for t, f in zip(given, factors, strict=True)]
    plain = error(attention_fp4(*given), exact(*given))
    assert error(attention_fp4(*scaled), exact(*scaled)) == pytest.approx(plain, rel=0.02)


def test_scale_is_used_and_inputs_stay():
    q, k, v = make(dtype=torch.float32)
    before = [t.clone() for t in (q, k, v)]
    got = attention_fp4(q, k, v, scale=0.01)
    assert error(got, exact(q, k, v, scale=0.01)) < 1.3 * GAUSSIAN_L1
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))


@pytest.mark.parametrize("factor", [1, 1000])
def test_heads_at_a_time_and_together_give_the_same(monkeypatch, factor):
    """Whatever is in the other heads: each has scales of its own."""
    q, k, v = make(b=2, h=6, kv=3, length=140, keys=70)
    v[:, 0] *= factor / 1000
    q[0, 1] *= 30
    whole = attention_fp4(q, k, v)
    assert error(whole[:, 2:], exact(q, k, v)[:, 2:]) < 1.1 * GAUSSIAN_L1
    monkeypatch.setattr(module, "CORRECTION_BYTES", 1)
    # Sums in another order may round a few of P otherwise; a scale of all heads gave 11 to 17%.
    assert error(attention_fp4(q, k, v), whole.double()) < 1e-3
    for batch in range(2):
        for head in range(3):
            of_q = slice(2 * head, 2 * head + 2)
            few = q[batch, of_q][None], k[batch, head][None, None], v[batch, head][None, None]
            assert error(whole[batch, of_q][None], attention_fp4(*few).double()) < 1e-3


def test_other_dtypes_and_no_heads_are_refused():
    q, k, v = make()
    with pytest.raises(ValueError, match=r"one floating-point dtype, got torch.int32"):
        attention_fp4(q.int(), k.int(), v.int())
    with pytest.raises(ValueError, match=r"one floating-point dtype, got torch.float16, torch.bf"):
        attention_fp4(q, k.bfloat16(), v)
    with pytest.raises(ValueError, match="none empty"):
        attention_fp4(q[:, :0], k[:, :0], v[:, :0])


def test_quantized_values_are_the_nearest():
    values = torch.randn(7, 64, generator=torch.Generator().manual_seed(3)) * 40
    found = quantize(values)
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    scale = (values.view(7, 4, 16).abs().amax(-1) / 6).to(E4M3)
    assert torch.equal(found.scale.float(), scale.float())
    real = scale.float().repeat_interleave(16, dim=1)
    nearest = grid[(values.abs() / real).unsqueeze(-1).sub(grid).abs().argmin(-1)]
    assert torch.equal(found.dequantize(), nearest * real * values.sign())


def test_stored_as_dot_scaled_reads_it():
    """The even column in the low nibble."""
    found = quantize(torch.tensor([[6.0, -0.5] + [0.0] * 14]))
    assert found.stored[0, 0] == 0b1001_0111
    assert found.scale.float().item() == 1


def test_padded_keys_and_values_are_zero():
    q, k, v = make(length=130, keys=70)
    prepared = prepare(q, k, v)
    assert prepared.q.stored.shape == (1, 2 * TILE, 32)
    assert not prepared.k.dequantize()[:, 70:].any()
    assert not prepared.v.dequantize()[..., 70:].any()
    assert not prepared.correction[..., 70:].any()


@pytest.mark.parametrize("shape", [{"d": 96}, {"h": 3, "kv": 2}, {"keys": 0}])
def test_what_does_not_fit_is_refused(shape):
    with pytest.raises(ValueError, match="attention_fp4: head sizes"):
        attention_fp4(*make(**shape))


def test_kernel_is_never_taken_unasked(monkeypatch):
    (kernel,) = (b for b in registry.backends(OP) if b.name == "triton")
    for capability in ((10, 0), (12, 0)):
        monkeypatch.setattr(registry, "capability", lambda device, has=capability: has)
        call = registry.Call("nvfp4", torch.device("cuda", 0), 0, 128)
        assert "not measured" in registry._unmeasured(kernel.needs, call)
    with pytest.raises(registry.NoBackendError, match="needs a device"):
        attention_fp4(*make(), backend="triton")


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is missing")
@pytest.mark.parametrize(
    ("arch", "instruction"),
    [(100, "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale"), (120, "mma.sync.*mxf4nvf4")],
)
def test_kernel_multiplies_on_fp4_tensor_cores(arch, instruction):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lowbit.ops.attention_fp4.kernel import attend_kernel as kernel

    given = {"M": TILE, "N": KEYS, "D": 128}
    types = dict.fromkeys(("q", "k", "v"), "*u8") | {"correction": "*fp32", "out": "*bf16"}
    types |= dict.fromkeys(("q_scale", "k_scale", "v_scale"), "*fp8e4nv")
    types |= {"logit_scale": "*fp32", "v_factor": "*fp32", "zero": "fp32"}
    names = kernel.arg_names
    signature = {n: "constexpr" if n in given else types.get(n, "i32") for n in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if signature[n].startswith("*") or n in ("out_b", "out_l", "PADDED")
    }
    source = ASTSource(kernel, signature, given, attrs=aligned)
    options = {"num_warps": WARPS, "num_stages": STAGES}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    products = re.findall(rf"{instruction}\S*", compiled.asm["ptx"])
    # Both products, each over the whole of its depth.
    assert len(products) >= 2
    assert not re.findall(r"kind::f16|f32\.bf16", compiled.asm["ptx"])
