"""On the second GPU, while the first is the current one: the same bits as on the first."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lowbit.ops import attention as attention_ops
from lowbit.ops import quantize_rows as rows_ops
from lowbit.ops import registry, scaled_mm, tuning
from lowbit.ops.attention import KEYS, Prologue, attention, router
from lowbit.ops.attention.modes import MODES
from lowbit.ops.linear import LowRank, linear
from lowbit.quant import formats

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
FIRST, SECOND = (torch.device("cuda", i) for i in range(2))
INT8, FP8 = torch.int8, torch.float8_e4m3fn
WAYS = [(backend, mode) for backend in ("hopper", "triton") for mode in MODES]
ROWS = sorted({b.name for b in registry.backends(rows_ops.OP)} - {"reference"})
SCALED = sorted(
    (backend.name, scheme)
    for backend in registry.backends(scaled_mm.OP)
    for scheme in backend.needs.schemes & {"int8_row", "fp8_row", "fp8_tensor"}
    if backend.name != "reference"
)
M, N, K, RANK = 1000, 512, 512, 32
# Some 50 ms, for which what runs on another stream does not wait.
CYCLES = 100_000_000


@pytest.fixture(autouse=True)
def first_is_current():
    if tuning.gpu(FIRST) != tuning.gpu(SECOND):
        pytest.skip(f"needs two GPUs of one kind: {tuning.gpu(FIRST)}, {tuning.gpu(SECOND)}")
    torch.cuda.set_device(FIRST)
    yield
    assert torch.cuda.current_device() == FIRST.index


def make(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """On the CPU: after a copy between GPUs each reads the other's memory, and errors go unseen."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


def to(x, device: torch.device):
    """An argument, with its tensors on a device."""
    if dataclasses.is_dataclass(x):
        return dataclasses.replace(x, **{name: to(y, device) for name, y in vars(x).items()})
    return x.to(device) if isinstance(x, torch.Tensor) else x


# As in ComfyUI; and only so `linear` prepares its products once.
@torch.inference_mode()
def results(run, given: list, device: torch.device) -> list[torch.Tensor]:
    """The bits of what comes back, which lies on the device."""
    got = run(*given)
    got = got if isinstance(got, tuple) else (got,)
    assert all(x.device == device for x in got)
    return [x.cpu().contiguous().view(torch.uint8) for x in got]


@torch.inference_mode()
def late(run, given: list) -> list[torch.Tensor]:
    """`results` of a stream of the second GPU on which the first argument comes late."""
    stream, x = torch.cuda.Stream(SECOND), torch.zeros_like(given[0])
    torch.cuda.synchronize(SECOND)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)
        x.copy_(given[0])
        with torch.cuda.device(FIRST):
            got = run(x, *given[1:])
    stream.synchronize()
    return results(lambda: got, [], SECOND)


def agree(run, *given) -> None:
    """Fail unless both GPUs give the same: twice in turns, on a stream, from a new thread."""
    moved = {device: [to(x, device) for x in given] for device in (SECOND, FIRST)}
    found = [results(run, moved[device], device) for _ in range(2) for device in moved]
    found.append(late(run, moved[SECOND]))
    with ThreadPoolExecutor(1) as pool:
        found.append(pool.submit(results, run, moved[SECOND], SECOND).result())
    same = [all(map(torch.equal, other, found[1])) for other in found]
    assert all(same), same


def needed(op: str, backend: str, scheme: str, n: int, k: int) -> None:
    """Skip where a backend cannot run on the first GPU; where it can, it has to on the second."""
    try:
        registry.select(op, registry.Call(scheme, FIRST, n, k), backend)
    except registry.NoBackendError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("given", ["plain", "prologue", "keys", "many"])
@pytest.mark.parametrize(("backend", "mode"), WAYS)
def test_attention(backend, mode, given):
    scheme = attention_ops.scheme(mode, KEYS if given == "keys" else None)
    needed(attention_ops.OP, backend, scheme, 0, 128)
    b, h, length = (1, 24, 4096) if given == "many" else (2, 4, 1000)
    q, k, v = (make(b, h, length, 128, seed=i) for i in range(3))
    mask = make(b, 1, 1, length, seed=3) > -0.5 if given == "keys" else None
    prologue = Prologue()
    if given == "prologue":
        angle, weights = make(length, 64, seed=4).float(), [make(h * 128, seed=i) for i in (5, 6)]
        prologue = Prologue("token", 1e-6, *weights, cos=angle.cos(), sin=angle.sin())

    def run(q, k, v, mask, prologue):
        more = {"mask": mask, "prologue": prologue, "backend": backend}
        return attention(q, k, v, mode, return_lse=True, **more)

    agree(run, q, k, v, mask, prologue)


@pytest.mark.parametrize("steps", [False, True])
@pytest.mark.parametrize(("dtype", "rotate"), [(INT8, True), (INT8, False), (FP8, False)])
@pytest.mark.parametrize("backend", ROWS)
def test_rows(backend, dtype, rotate, steps):
    needed(rows_ops.OP, backend, rows_ops.scheme(dtype, rotate, not steps), 0, K)
    scale, shift = (make(1, K, seed=i) for i in (1, 2))
    prologue = rows_ops.Prologue("layer", scale=scale, shift=shift) if steps else rows_ops.NOTHING

    def run(x, prologue):
        return rows_ops.quantize_rows(x, dtype, rotate, backend, prologue=prologue)

    agree(run, make(M, K), prologue)


@pytest.mark.parametrize(("backend", "scheme"), SCALED)
def test_scaled_product(backend, scheme):
    needed(scaled_mm.OP, backend, scheme, N, K)
    dtype = INT8 if scheme.startswith("int8") else FP8
    a, b = (make(rows, K, seed=rows, scale=20).to(dtype) for rows in (M, N))
    of_rows = (M, N) if scheme.endswith("row") else (1, 1)
    scales = (make(rows, 1, seed=3).abs().float() for rows in of_rows)

    def run(a, b, scale_a, scale_b, bias, residual):
        more = {"residual": residual, "backend": backend}
        return scaled_mm.scaled_mm(a, b, scale_a, scale_b, bias, **more)

    agree(run, a, b, *scales, make(N, seed=4), make(M, N, seed=5))


# Four bits have a way each for few, for more and for many.
@pytest.mark.parametrize("rows", [17, 300, 2100])
@pytest.mark.parametrize("name", formats.names())
def test_linear(name, rows):
    weight = formats.get(name).quantize(make(N, K, seed=1, scale=0.05))
    agree(linear, make(rows, K), weight, make(N, seed=2))


@pytest.mark.parametrize("rows", [17, 2100])
@pytest.mark.parametrize("name", ["int8_convrot", "fp8_e4m3", "nvfp4"])
def test_lora(name, rows):
    weight, down = (make(n, K, seed=n, scale=0.05) for n in (N, RANK))
    if name != "nvfp4":
        down = formats.get(name.replace("e4m3", "e4m3_rowwise")).quantize(down)
    term = LowRank(down, make(N, RANK, seed=2, scale=0.1), torch.ones(RANK))
    weight = formats.get(name).quantize(weight)
    agree(lambda x, w, term: linear(x, w, low_rank=term), make(rows, K), weight, term)


# Last: what others compiled may leave neither GPU usable.
@pytest.mark.parametrize("name", formats.names())
def test_weight_is_quantized_and_dequantized(name):
    agree(lambda weight: formats.get(name).quantize(weight).dequantize(), make(N, K, scale=0.05))


@pytest.mark.parametrize("way", router.NAMES)
def test_router(way):
    if reason := router.missing(way, FIRST):
        pytest.skip(reason)
    q, k, v = (make(1, 4, M, 128, seed=i) for i in range(3))
    agree(lambda q, k, v: router.route(q, k, v, way, guard="first_call"), q, k, v)
