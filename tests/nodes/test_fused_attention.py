"""Which attention layers are fused, without ComfyUI: classes of its names stand in."""

import pytest
import torch

from lowbit.nodes import fused
from lowbit.nodes.attention_override import OVERRIDE, Forward, Override, with_prologue
from lowbit.nodes.fused.attention import tables
from lowbit.nodes.fused.base import Host, are_untouched
from lowbit.nodes.fused.wan import WanSelfAttention
from lowbit.quant.fusion import Fused, has_own_forward

DIM, HEADS = 32, 2
HOST_MODULE = "comfy.ldm.wan.model"


def forward(self, x, freqs, transformer_options={}):  # noqa: B006 (as the host has it)
    return self.o(self.q(x))


def forward_with_more(self, x, freqs, transformer_options={}):  # noqa: B006
    return self.o(self.sink(x) + self.q(x))


def forward_with_an_argument(self, x, freqs, transformer_options={}, mask=None):  # noqa: B006
    return self.o(self.q(x))


def forward_with_keywords(self, x, freqs, transformer_options={}, *, sink=0, **more):  # noqa: B006
    return self.o(self.q(x))


def wrapped(plain):
    def forward(self, x, freqs, transformer_options={}):  # noqa: B006
        return plain(self, x, freqs, transformer_options)

    return forward


def host_class(name: str = "WanSelfAttention", forward=forward) -> type:
    def init(self, eps_k: float = 1e-6, weight: bool = True):
        torch.nn.Module.__init__(self)
        for layer in "qkvo":
            setattr(self, layer, torch.nn.Linear(DIM, DIM))
        self.norm_q = torch.nn.RMSNorm(DIM, eps=1e-6, elementwise_affine=weight)
        self.norm_k = torch.nn.RMSNorm(DIM, eps=eps_k, elementwise_affine=weight)
        self.num_heads, self.head_dim = HEADS, DIM // HEADS

    forward.__module__ = HOST_MODULE
    members = {"__init__": init, "forward": forward, "__module__": HOST_MODULE}
    return type(name, (torch.nn.Module,), {**members, "__qualname__": name})


HOST = Host(None, None, None, None)
# The stand-in's own names.
KNOWN = {
    f"{HOST_MODULE}.WanSelfAttention": (WanSelfAttention, "x freqs transformer_options", "o q")
}


def test_known_layer_becomes_a_copy_with_the_same_children():
    plain = host_class()()
    copy = fused.fused(plain, KNOWN, HOST)
    assert isinstance(copy, Fused) and isinstance(copy, type(plain))
    copy.q = torch.nn.Linear(DIM, DIM)
    assert plain.q is copy.q
    assert fused.fused(copy, KNOWN, HOST) is copy


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("WanSelfAttentionOfAnother", {}),
        ("WanSelfAttention", {"eps_k": 1e-5}),
        ("WanSelfAttention", {"weight": False}),
    ],
)
def test_other_layers_stay(name, options):
    plain = host_class(name)(**options)
    assert fused.fused(plain, KNOWN, HOST) is plain


@pytest.mark.parametrize(
    "other", [forward_with_more, forward_with_an_argument, forward_with_keywords, wrapped(forward)]
)
def test_another_version_of_the_hosts_layer_stays_and_is_named_once(other, caplog):
    fused._warn_of.cache_clear()
    kind = host_class(forward=other)
    for plain in (kind(), kind()):
        assert fused.fused(plain, KNOWN, HOST) is plain
    (record,) = caplog.records
    assert "WanSelfAttention is another one than in ComfyUI 0.33" in record.getMessage()


def test_forward_that_was_assigned_is_no_part_of_the_copy():
    plain = host_class()()
    plain.forward = lambda *args: None
    assert not has_own_forward(plain) and not are_untouched(plain)
    copy = fused.fused(plain, KNOWN, HOST)
    assert isinstance(copy, Fused) and has_own_forward(copy)
    # As the host gives it back.
    plain.forward = type(plain).forward.__get__(plain)
    assert has_own_forward(plain)


def test_class_that_lacks_what_ours_reads_stays():
    kind = host_class(forward=forward_with_more)
    plain = kind()
    del plain.norm_q
    assert fused.fused(plain, KNOWN, HOST) is plain


def test_class_that_is_changed_later_is_looked_at_again():
    kind = host_class()
    assert isinstance(fused.fused(kind(), KNOWN, HOST), Fused)
    kind.forward = wrapped(forward)
    plain = kind()
    assert fused.fused(plain, KNOWN, HOST) is plain


@pytest.mark.parametrize("changed", [None, "its own", "its base's"])
def test_class_that_calls_its_base_is_known_with_it(changed):
    base = host_class(forward=forward_with_more if changed == "its base's" else forward)

    class Wider(base):
        def forward(self, c, **kwargs):
            return self.k(super().forward(c, **kwargs))

        __qualname__, __module__ = "Wider", HOST_MODULE

    Wider.forward.__module__ = HOST_MODULE
    names = "forward k super" if changed != "its own" else "forward super"
    known = KNOWN | {f"{HOST_MODULE}.Wider": (WanSelfAttention, "c **kwargs", names)}
    assert isinstance(fused.fused(Wider(), known, HOST), Fused) == (changed is None)


def test_hook_or_another_class_is_a_touch():
    norm = torch.nn.RMSNorm(DIM)
    assert are_untouched(norm)
    norm.register_forward_hook(lambda *args: None)
    assert not are_untouched(norm)
    assert not are_untouched(type("Theirs", (torch.nn.Identity,), {})())


def angles(tokens: int, size: int) -> torch.Tensor:
    a = torch.randn(1, tokens, 1, size // 2, generator=torch.Generator().manual_seed(0))
    return torch.stack((a.cos(), -a.sin(), a.sin(), a.cos()), -1).unflatten(-1, (2, 2))


def test_tables_are_the_cosines_and_sines_of_either_order():
    freqs = angles(7, 16)
    for given in (freqs, freqs.transpose(1, 2)):
        cos, sin = tables(given, 7, 16)
        assert torch.equal(cos, freqs[0, :, 0, :, 0, 0])
        assert torch.equal(sin, freqs[0, :, 0, :, 1, 0])
        assert cos.is_contiguous() and sin.is_contiguous()


@pytest.mark.parametrize(
    "freqs",
    [None, angles(7, 16)[0], angles(6, 16), angles(7, 8), angles(7, 16).expand(2, *[-1] * 5)],
)
def test_other_tables_are_the_hosts(freqs):
    assert tables(freqs, 7, 16) is None


def options_of(override: Override) -> dict:
    return {OVERRIDE: override, override._key: Forward(True, None, None)}


def test_override_that_takes_the_prologue_is_found_behind_one_that_does_not_mean_the_call():
    like = torch.zeros(1, 5, DIM, dtype=torch.bfloat16)
    first, second = Override("lowbit_exact"), Override("lowbit_int8", blocks="3")
    second.previous = first
    options = {**options_of(first), **options_of(second), "block_index": 0}
    assert with_prologue(like, HEADS, options) is first
    assert with_prologue(like, HEADS, {**options, "block_index": 3}) is second
    # A foreign override between them would get the call.
    second.previous = lambda *args, **kwargs: None
    assert with_prologue(like, HEADS, options) is None


@pytest.mark.parametrize("mode", ["sdpa", "auto"])
def test_ways_without_a_prologue_leave_the_layer_to_the_host(mode):
    like = torch.zeros(1, 5, DIM, dtype=torch.bfloat16)
    assert with_prologue(like, HEADS, options_of(Override(mode))) is None
