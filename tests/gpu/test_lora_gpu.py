"""LoRAs on the GPU: the kernel's low-rank term, linear layers with one, and ComfyUI's memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowbit.ops import registry
from lowbit.ops.linear import LowRank, linear, release, share
from lowbit.ops.scaled_mm import OP, scaled_mm
from lowbit.ops.scaled_mm.check import Down
from lowbit.quant import formats

SESSION = Path(__file__).with_name("lora_session.py")
HOST = Path(os.environ.get("COMFYUI_PATH", Path.home() / "ComfyUI"))
OPERANDS = (torch.int8, torch.float8_e4m3fn)
# Relative error of the sums: see test_scaled_mm_gpu.py.
OF_SUMS = {torch.int8: 2**-20, torch.float8_e4m3fn: 2**-8}
BESIDE = {"fp8_e4m3": "fp8_e4m3_rowwise"}


def needed(backend: str, n: int) -> None:
    """Skip where a backend does not take N outputs, or this GPU is not its own."""
    call = registry.Call("int8_row", torch.device("cuda", 0), n, 512)
    found = next(b for b in registry.backends(OP) if b.name == backend)
    reason = registry.unmet(found.needs, call) if backend == "hopper" else None
    if reason or (backend == "torch" and n % 16):
        pytest.skip(reason or "torch's FP8 product wants multiples of 16")


def make(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda") * scale


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("backend", ["hopper", "triton", "torch"])
@pytest.mark.parametrize("dtype", OPERANDS)
@pytest.mark.parametrize("rank", [16, 40, 64, 96, 160])
@pytest.mark.parametrize("shape", [(1, 32, 256), (63, 1000, 512), (4000, 3072, 1024)], ids=str)
def test_term_is_added_before_bias_and_activation(backend, dtype, rank, shape):
    m, n, k = shape
    needed(backend, n)
    a, b = ((make(rows, k, seed=rows) * 3).to(dtype) for rows in (m, n))
    scales = make(m, 1, seed=1).abs() * 1e-2, make(n, 1, seed=2).abs() * 1e-2
    h, u = (
        make(m, rank + 64, seed=3).bfloat16()[:, 32 : rank + 32],
        make(n, rank, seed=4).bfloat16(),
    )
    bias = make(n, seed=5).bfloat16()
    got = scaled_mm(a, b, *scales, bias, low_rank=(h, u), activation="gelu_tanh", backend=backend)
    value = a.double() @ b.double().t() * scales[0].double() * scales[1].double().t()
    value = value + h.double() @ u.double().t() + bias.double()
    want = torch.nn.functional.gelu(value, approximate="tanh")
    assert error(got, want) <= OF_SUMS[dtype] + torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("backend", ["hopper", "triton"])
@pytest.mark.parametrize("dtype", OPERANDS)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [1, 16, 48, 64, 128])
@pytest.mark.parametrize("shape", [(1, 32, 256), (63, 992, 528), (4000, 3072, 1024)], ids=str)
def test_first_product_is_made_within(backend, dtype, half, rank, shape):
    """With tiles that wait for others: a race would move the result from call to call."""
    m, n, k = shape
    needed(backend, n)
    a, b, stored = (
        (make(rows, k, seed=rows + i) * 3).to(dtype) for i, rows in enumerate((m, n, rank))
    )
    scales = [make(rows, 1, seed=rows).abs() * 1e-2 for rows in (m, n, rank)]
    shift, u = make(rank, seed=3), make(n, rank, seed=4).to(half)
    h = a.double() @ stored.double().t() * scales[0].double() * scales[2].double().t() + shift
    want = a.double() @ b.double().t() * scales[0].double() * scales[1].double().t()
    want = want + h @ u.double().t()
    given = {"low_rank": (Down(stored, scales[2], shift), u), "out_dtype": half}
    got = [scaled_mm(a, b, *scales[:2], **given, backend=backend) for _ in range(5)]
    # h is rounded to 16 bits, and the result.
    assert error(got[0], want) <= OF_SUMS[dtype] + 2 * torch.finfo(half).eps
    assert all(torch.equal(other, got[0]) for other in got)


def beside_fp8(strength: float, backend: str, tokens: int = 4224, rank: int = 64):
    """(result, wanted, error without the term) of a layer in FP8 and a term."""
    n, k = 3072, 2048
    weight, row = formats.get("fp8_e4m3"), formats.get("fp8_e4m3_rowwise")
    x, w = make(tokens, k, seed=0).bfloat16(), make(n, k, seed=1, scale=k**-0.5).bfloat16()
    x[5], x[6, 7] = 0, 500
    down, up = make(rank, k, seed=2, scale=k**-0.5).bfloat16(), make(n, rank, seed=3).bfloat16()
    factor = torch.full((rank,), strength * rank**-0.5, device="cuda")
    term = LowRank(row.quantize(down), up, factor)
    packed, base = weight.quantize(w), x.double() @ w.double().t()
    want = base + strength * rank**-0.5 * (x.double() @ down.double().t()) @ up.double().t()
    got = linear(x, packed, backend=backend, low_rank=term)
    return got, want, error(linear(x, packed, backend=backend), base)


# As parts of the layer's own result.
@pytest.mark.parametrize("strength", [0.0, 1e-3, 0.1, 1.0, 30.0, 1e5])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_layer_in_fp8_errs_as_its_format_however_large_the_term_is(strength, backend):
    got, want, error_without = beside_fp8(strength, backend)
    assert torch.isfinite(got).all()
    # x is rounded in both, and the matrix that it is multiplied with.
    assert error(got, want) <= 1.5 * error_without
    assert error(got[6:7], want[6:7]) <= 2 * error_without and (got[5] == 0).all()


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_what_is_not_finite_shows_in_its_row(backend):
    n, k, rank = 1024, 1024, 32
    weight, row = formats.get("fp8_e4m3"), formats.get("fp8_e4m3_rowwise")
    x = make(2000, k, seed=0).bfloat16()
    x[3, 4], x[9, 1] = torch.nan, torch.inf
    packed = weight.quantize(make(n, k, seed=1).bfloat16())
    down, up = make(rank, k, seed=2).bfloat16(), make(n, rank, seed=3).bfloat16()
    term = LowRank(row.quantize(down), up, torch.ones(rank, device="cuda"))
    finite = torch.isfinite(linear(x, packed, backend=backend, low_rank=term))
    assert not finite[[3, 9]].any()
    finite[[3, 9]] = True
    assert finite.all()


@pytest.mark.parametrize("name", formats.names())
@pytest.mark.parametrize("tokens", [1, 1000, 4224])
def test_layer_errs_as_its_format(name, tokens):
    n, k, rank = 3072, 3072, 64
    fmt = formats.get(name)
    x, weight = make(tokens, k, seed=0).bfloat16(), make(n, k, seed=1, scale=k**-0.5).bfloat16()
    down, up = (
        make(rank, k, seed=2, scale=k**-0.5).bfloat16(),
        make(n, rank, seed=3, scale=0.1).bfloat16(),
    )
    factor = torch.full((rank,), 0.7, device="cuda")
    want = x.double() @ (weight.double() + 0.7 * up.double() @ down.double()).t()
    packed = fmt.quantize(weight)
    error_without = error(linear(x, packed), x.double() @ weight.double().t())
    matrices = [down]
    if name.startswith(("int8", "fp8")):
        matrices.append(formats.get("fp8_e4m3_rowwise" if name[0] == "f" else name).quantize(down))
    for matrix in matrices:
        got = linear(x, packed, low_rank=LowRank(matrix, up, factor))
        # The two matrices that x is multiplied with are rounded alike.
        assert error(got, want) <= 1.5 * error_without + 0.01


@pytest.mark.parametrize("name", ["int8_convrot", "fp8_e4m3"])
def test_layers_that_share_give_what_each_gives_alone(name):
    x = make(2000, 1024, seed=0).bfloat16()
    fmt, key = formats.get(name), object()
    packed = fmt.quantize(make(1024, 1024, seed=1, scale=0.03).bfloat16())
    beside = formats.get(BESIDE.get(name, name))
    down = beside.quantize(make(96, 1024, seed=2, scale=0.03).bfloat16())
    up, factor = make(1024, 32, seed=3, scale=0.1).bfloat16(), torch.ones(96, device="cuda")
    terms = [LowRank(down, up, factor, None, (i, i + 32), key) for i in (0, 32, 64)]
    alone = [linear(x, packed, low_rank=term) for term in terms]
    for term, want in zip(terms, alone, strict=True):
        share(x, 3)
        assert torch.equal(linear(x, packed, low_rank=term), want)
        release(x)


@pytest.fixture(scope="module", params=["dynamic", "legacy", "novram"])
def seen(request):
    # Before needs_gpu, which is asked for every test.
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if not HOST.is_dir():
        pytest.skip(f"no ComfyUI at {HOST}")
    run = subprocess.run(
        [sys.executable, str(SESSION), request.param], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
    report = json.loads(run.stdout.splitlines()[-1])
    print(json.dumps(report, indent=1))
    return report


@pytest.mark.parametrize("name", ["bf16", "int8_convrot", "fp8_e4m3", "nvfp4"])
def test_lora_acts_and_ends_in_comfyui(seen, name):
    row = seen["formats"][name]
    tolerance = 0.03 if name == "bf16" else 2**0.5 * 4 * formats.get(name).max_error
    assert row["error"] < min(tolerance, seen["moves"])
    assert row["removed"] and row["strength_0"] and row["halves"] and row["again"]
    # A last bit that is rounded otherwise moves codes of the layers after it, FP8's by more.
    stacked = 2**0.5 * formats.get(name).max_error if name == "fp8_e4m3" else 0.03
    assert row["stacked"] < stacked


@pytest.mark.parametrize("name", ["bf16", "int8_convrot", "fp8_e4m3", "nvfp4"])
def test_matrices_are_in_comfyuis_memory_management(seen, name):
    row = seen["formats"][name]
    assert row["managed"] and row["unloaded"] == 0
    # With no room for anything, they are copied as they are needed.
    if seen["mode"] == "legacy":
        assert row["loaded"] == row["size"]


@pytest.mark.parametrize("name", ["bf16", "int8_convrot", "fp8_e4m3", "nvfp4"])
def test_norms_and_lone_biases_follow_a_part_of_the_sampling(seen, name):
    row = seen["formats"][name]["differences"]
    assert row["removed"]
    # For all steps they are the host's patches, in halves they are added as the model runs: other
    # sums, rounded to 16 bits, that move codes of the layers after them.
    assert row["halves"] < 0.03
    assert min(row["moves"], row["half"], row["rest"]) > 0.05


def test_mode_is_the_one_asked_for(seen):
    assert seen["dynamic"] == (seen["mode"] == "dynamic")
