"""Models quantized in Python: what becomes of layers, how exact they are, and undoing it."""

import copy
import statistics

import pytest
import torch
from torch import nn

import lowbit
from lowbit.ops.linear import modules, sharing
from lowbit.ops.linear.modules import LowBitLinear
from lowbit.quant import formats
from lowbit.quant.families import get
from lowbit.quant.fusion import FusedFeedForward
from lowbit.quant.model import quantize
from tests.quant.model.conftest import every_format, only_wan

FORMAT = "int8_convrot"
# Layers of a block of the small models that are quantized.
LAYERS = {"wan": 10, "qwen_image": 12}
# Groups of layers in a block that read one tensor.
GROUPS = {"wan": (3, 2), "qwen_image": (3, 3)}


def error(got, want):
    return ((got - want).norm() / want.norm()).item()


def dense_twin(model):
    """Return a copy of a quantized model whose weights are what the stored ones stand for."""
    twin = copy.deepcopy(model)
    for path, parent in model.named_modules():
        for name, child in parent._modules.items():
            if isinstance(child, LowBitLinear):
                dense = nn.Linear(child.in_features, child.out_features)
                dense.weight = nn.Parameter(child.weight.dequantize(), requires_grad=False)
                dense.bias = child.bias
                twin.get_submodule(path)._modules[name] = dense
    return twin


@every_format
def test_model_computes_with_its_stored_weights(model, run, name):
    fmt = formats.get(name)
    records = lowbit.quantize_model(model, name).records
    errors = [r.error for r in records if r.format == name]
    # That of a format is for normal weights; these have outlier channels.
    assert errors and statistics.fmean(errors) <= fmt.max_error
    # What is left is the rounding of activations, no coarser than that of the weights.
    assert error(run(model), run(dense_twin(model))) <= fmt.max_error


def test_layers_are_those_of_the_family(small, model):
    done = lowbit.quantize_model(model, FORMAT)
    quantized = {r.name for r in done.records if r.format}
    assert quantized == {n for n, m in model.named_modules() if isinstance(m, LowBitLinear)}
    assert len(quantized) == LAYERS[small.name] * small.config["num_layers"]
    kept = [r for r in done.records if not r.format]
    assert kept and all(r.reason for r in kept)
    assert f"{len(quantized)}" in str(done) and FORMAT in str(done)


def test_undone_model_is_the_one_before(model, run):
    before, want = dict(model.named_modules()), run(model)
    with lowbit.quantize_model(model, FORMAT) as done:
        assert not torch.equal(run(model), want)
    assert dict(model.named_modules()) == before
    assert torch.equal(run(model), want)
    assert not hasattr(model, quantize.GUARD)
    done.undo()


def test_undo_refuses_when_a_layer_was_replaced(small, model):
    done = lowbit.quantize_model(model, FORMAT)
    spot = next(iter(done._swap._done))[0]
    spot.parent._modules[spot.attribute] = nn.Identity()
    with pytest.raises(RuntimeError, match="was replaced again since"):
        done.undo()


def test_keep_takes_names_of_the_model_and_of_the_host(small, model):
    names = {"wan": ("blocks.1.attn1", r"blocks\.0\.self_attn")}
    keep = names.get(small.name, ("transformer_blocks.1.attn", r"blocks\.0\.attn"))
    done = lowbit.quantize_model(model, FORMAT, keep=keep)
    kept = {r.name for r in done.records if r.reason.startswith("kept as asked")}
    attn = {"wan": "attn1"}.get(small.name, "attn")
    assert {n.split(f".{attn}.")[0][-1] for n in kept} == {"0", "1"}
    assert all(f".{attn}." in name for name in kept)


def test_layers_that_read_one_tensor_share_it_and_leave_nothing_behind(
    small, model, run, monkeypatch
):
    seen = []

    def share(x, readers):
        sharing.share(x, readers)
        seen.append((x, readers))

    monkeypatch.setattr(modules, "share", share)
    lowbit.quantize_model(model, FORMAT)
    run(model)
    groups = GROUPS[small.name]
    assert [n for _, n in seen].count(groups[0]) >= groups[0] * small.config["num_layers"]
    assert len(seen) == sum(groups) * small.config["num_layers"]
    assert not any(hasattr(x, sharing.ATTRIBUTE) for x, _ in seen)


def test_gelu_joins_the_layer_after_it(small, model, run):
    family = get(small.name)
    lowbit.quantize_model(model, FORMAT)
    fused = [m for m in model.modules() if isinstance(m, FusedFeedForward)]
    assert len(fused) == len(family.feed_forwards) * small.config["num_layers"]
    want = run(model)
    for path, parent in list(model.named_modules()):
        for name, child in parent._modules.items():
            if isinstance(child, FusedFeedForward):
                plain = object.__new__(type(child).__bases__[1])
                plain.__dict__ = child.__dict__
                model.get_submodule(path)._modules[name] = plain
    assert error(run(model), want) <= 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantized_model_runs_in_16_bits(model, run, dtype):
    lowbit.quantize_model(model, FORMAT)
    want = run(model)
    # diffusers says that some of it should have stayed in float32.
    model.to(dtype)
    got = run(model, dtype)
    assert got.dtype == dtype
    assert error(got.float(), want) < 4 * torch.finfo(dtype).eps + formats.get(FORMAT).max_error


def test_copy_of_a_quantized_model_is_independent(model, run):
    done = lowbit.quantize_model(model, FORMAT)
    want, twin = run(model), copy.deepcopy(model)
    done.undo()
    assert torch.equal(run(twin), want)


def test_any_model_takes_the_default_family():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.norm_gate = nn.Linear(256, 768), nn.Linear(256, 256)

        def forward(self, x):
            return x + self.qkv(x)[..., :256]

    torch.manual_seed(0)
    model = nn.Module()
    model.blocks = nn.Sequential(*(Block() for _ in range(3)))
    x = torch.randn(5, 256)
    want = model.blocks(x)
    seen = []
    done = lowbit.quantize_model(model, "fp8_e4m3", progress=lambda *at: seen.append(at))
    assert {r.name for r in done.records if r.format} == {f"blocks.{i}.qkv" for i in range(3)}
    assert seen == [(i + 1, 6) for i in range(6)]
    assert 0 < error(model.blocks(x), want) < formats.get("fp8_e4m3").max_error


# diffusers fuses no projections of Qwen-Image.
@only_wan
def test_fused_projections_are_quantized_as_their_parts(run, model, small):
    want = run(model)
    model.fuse_qkv_projections()
    done = lowbit.quantize_model(model, FORMAT)
    fused = {r.name for r in done.records if r.format and r.name.endswith(("to_qkv", "to_kv"))}
    assert len(fused) == 2 * small.config["num_layers"]
    got = run(model)
    assert error(got, want) < 3 * formats.get(FORMAT).max_error
    model.unfuse_qkv_projections()
    assert error(run(model), got) < formats.get(FORMAT).max_error


def refused(model, match, error=ValueError, **options):
    before = dict(model.named_modules())
    with pytest.raises(error, match=match):
        lowbit.quantize_model(model, **{"format": FORMAT, **options})
    assert dict(model.named_modules()) == before


def test_what_cannot_be_quantized_is_refused_before_anything_changes(small, model):
    refused(model, "unknown format 'int7'", format="int7")
    refused(model, "unknown recipe", recipe="flux")
    refused(model, "is no regular expression", keep=["("])
    refused(model, "a collection", TypeError, keep="norm")
    refused(model, "nothing to quantize to .* layers stay, kept as asked", keep=["."])
    layer = next(m for n, m in model.named_modules() if n.endswith("to_k"))
    layer.forward = layer.forward
    refused(model, "forward of its own")
    del layer.forward
    layer.weight.data[0, 0] = torch.nan
    refused(model, "to_k: the weight holds NaN")
    layer.to("meta")
    refused(model, "on the meta device")


def test_quantizing_twice_is_refused(model):
    done = lowbit.quantize_model(model, FORMAT)
    refused(model, "quantized already")
    done.undo()
    lowbit.quantize_model(model, FORMAT)


def test_save_pretrained_which_would_lose_scales_is_refused(model, tmp_path):
    done = lowbit.quantize_model(model, FORMAT)
    with pytest.raises(ValueError, match=r"lowbit\.save_model"):
        model.save_pretrained(tmp_path / "there")
    done.undo()
    model.save_pretrained(tmp_path / "there")
