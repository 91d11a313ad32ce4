"""SageAttention's packages as doubles with their published manners: what we call survives them."""

import contextlib
import importlib.metadata
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from lowbit.ops.attention import sage
from lowbit.ops.registry import NoBackendError

GPU = torch.device("cuda", 0)


def attend(q, k, v, **options) -> torch.Tensor:
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double(), **options)


def inputs(d: int, kv: int = 4, flat: bool = False):
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 4, 40, d), (1, kv, 50, d), (1, kv, 50, d))
    made = [torch.randn(s, generator=generator).half() for s in shapes]
    return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in made] if flat else made


@pytest.fixture
def first(monkeypatch):
    """`sageattention` 1.0.6: heads of 64, 96, 128, and K's mean taken off in place."""

    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True):
        assert tensor_layout == "HND" and q.shape[-1] in (64, 96, 128)
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        k -= k.mean(dim=2, keepdim=True)
        gqa = q.shape[1] != k.shape[1]
        return attend(q, k, v, is_causal=is_causal, scale=sm_scale, enable_gqa=gqa).to(q.dtype)

    return install(monkeypatch, "sageattention", "1.0.6", sageattn)


def install(monkeypatch, name: str, version: str | None, function):
    def installed(package):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return version

    double = types.ModuleType(name)
    setattr(double, function.__name__, function)
    monkeypatch.setitem(sys.modules, name, double)
    monkeypatch.setattr(importlib.metadata, "version", installed)
    sage._version.cache_clear()
    return double


@pytest.fixture(autouse=True)
def forgetful():
    yield
    sage._version.cache_clear()


@pytest.fixture
def third(monkeypatch):
    """`sageattn3`: heads of 64 and 128, equal numbers of heads, its own scale, K written to."""
    calls = []

    def sageattn3_blackwell(q, k, v, attn_mask=None, is_causal=False, per_block_mean=True):
        assert q.shape[1] == k.shape[1] and q.shape[-1] in (64, 128) and attn_mask is None
        k -= k.mean(dim=-2, keepdim=True)
        calls.append(q.shape[1])
        return attend(q, k, v).to(q.dtype)

    install(monkeypatch, "sageattn3", "1.0.0", sageattn3_blackwell)
    return calls


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    # Two roundings to float16: of the scaled queries or of K without its mean, and of the result.
    assert (got.double() - want).norm() <= 4 * torch.finfo(torch.float16).eps * want.norm()


@pytest.mark.parametrize("way", ["sageattn", "sageattn3"])
@pytest.mark.parametrize("d", [40, 64, 96, 128])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(("scale", "kv"), [(None, 4), (0.3, 2)])
def test_result_is_attention_and_k_survives(first, third, way, d, flat, scale, kv):
    q, k, v = inputs(d, kv, flat)
    before = [x.clone() for x in (q, k, v)]
    got = getattr(sage, way)(q, k, v, None, False, scale)
    same(got, attend(q, k, v, scale=scale, enable_gqa=kv != 4))
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))


@pytest.mark.parametrize(
    ("version", "copies"),
    [
        ("1.0.6", True),
        ("2.0.0", True),
        ("2.0.1", False),
        ("2.2.0+cu130torch2.9", False),
        (None, True),
    ],
)
def test_k_is_copied_only_for_versions_that_write_to_it(monkeypatch, version, copies):
    got = []

    def sageattn(q, k, v, **options):
        got.append(k)
        return q

    install(monkeypatch, "sageattention", version, sageattn)
    q, k, v = inputs(128)
    sage.sageattn(q, k, v, None, False, None)
    assert (got[0] is not k) == copies


def test_channels_apart_are_brought_together(first):
    q, k, v = (x.mT.contiguous().mT for x in inputs(128))
    same(sage.sageattn(q, k, v, None, False, None), attend(q, k, v))


@pytest.mark.parametrize(("megabytes", "groups"), [(1024, [4]), (0, [1, 1, 1, 1])])
def test_heads_come_in_groups_whose_matrix_is_bounded(third, monkeypatch, megabytes, groups):
    monkeypatch.setattr(sage, "MATRIX_BYTES", megabytes * 2**20)
    q, k, v = inputs(64)
    same(sage.sageattn3(q, k, v, None, False, None), attend(q, k, v))
    assert third == groups


@pytest.fixture
def streams(monkeypatch):
    """What happens on a GPU's streams, in order; `current` and `default` are names of streams."""
    done, here = [], ["current"]

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            done.append(f"{self.name} waits for {other.name}")

    class Result:
        def record_stream(self, stream):
            done.append(f"kept for {stream.name}")

    @contextlib.contextmanager
    def stream(of):
        here.append(of.name)
        yield
        here.pop()

    def run():
        done.append(f"run on {here[-1]}")
        return Result()

    known = {name: Stream(name) for name in ("current", "default")}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: known["current"])
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: known["default"])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return known, done, run


def test_what_the_default_stream_does_is_in_order_with_the_current_one(streams):
    known, done, run = streams
    sage._in_order(run, GPU)
    assert done == [
        "default waits for current",
        "run on default",
        "current waits for default",
        "kept for current",
    ]
    known["current"] = known["default"]
    done.clear()
    sage._in_order(run, GPU)
    assert done == ["run on current"]


def test_graph_that_would_not_have_it_is_refused(streams, monkeypatch):
    _, done, run = streams
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(NoBackendError, match="a CUDA graph does not record"):
        sage._in_order(run, GPU)
    assert not done


@pytest.mark.parametrize(
    ("version", "capability", "leaves"),
    [
        ("1.0.6", (9, 0), False),
        ("2.2.0", (9, 0), True),
        ("2.2.0", (8, 6), False),
        (None, (8, 9), True),
    ],
)
def test_kernels_in_cuda_leave_the_stream(monkeypatch, version, capability, leaves):
    install(monkeypatch, "sageattention", version, lambda: None)
    monkeypatch.setattr(sage, "capability", lambda device: capability)
    assert sage._leaves_stream(GPU) == leaves and not sage._leaves_stream(torch.device("cpu"))
