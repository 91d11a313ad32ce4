"""A small stand-in for WanVideoWrapper: a model, a patcher and layers with what our nodes use.

The real pack needs ComfyUI; `tests/host/test_wanvideo.py` runs it. Names are that pack's.
"""

import sys
import types

import torch
import torch.nn.functional as F

WIDTH, FFN, HEADS, BLOCKS = 256, 512, 2, 2
PACKAGE = "wanvideo_stand_in"
calls = []


def attention(q, k, v, attention_mode="sdpa", attn_mask=None, causal=False, heads=1):
    """Note the mode, and return plain attention, [B, L, H, D]."""
    calls.append(attention_mode)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=causal)
    return out.transpose(1, 2).contiguous()


class CustomLinear(torch.nn.Linear):
    """The layer that takes LoRAs: buffers and strengths, by index."""

    def __init__(self, in_features, out_features, bias=False, compute_dtype=None, device=None):
        super().__init__(in_features, out_features, bias, device)
        self.compute_dtype = compute_dtype
        self.lora_diffs = []
        self.register_buffer("_step", torch.zeros((), dtype=torch.long))

    def set_lora_diffs(self, lora_diffs, device):
        self.lora_diffs = []
        for i, diff in enumerate(lora_diffs):
            names = tuple(f"lora_diff_{i}_{j}" for j in range(len(diff)))
            for name, value in zip(names, diff, strict=True):
                is_tensor = torch.is_tensor(value)
                setattr(self, name, value)
                if is_tensor:
                    delattr(self, name)
                    self.register_buffer(name, value.to(device, self.compute_dtype))
            self.lora_diffs.append(names if len(names) > 1 else names[0])

    def set_lora_strengths(self, lora_strengths, device):
        self.strengths = [torch.tensor(s, device=device) for s in lora_strengths]

    def _get_lora_strength(self, index):
        strength = self.strengths[index]
        return strength[self._step] if strength.dim() else strength


class SelfAttention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_mode = "sdpa"
        for name in "qkvo":
            setattr(self, name, torch.nn.Linear(WIDTH, WIDTH))

    def forward(self, x, context=None):
        q, k, v = (
            layer(y).unflatten(-1, (HEADS, -1))
            for layer, y in (
                (self.q, x),
                (self.k, self.source(x, context)),
                (self.v, self.source(x, context)),
            )
        )
        return self.o(attention(q, k, v, attention_mode=self.attention_mode).flatten(2))

    def source(self, x, context):
        return x


class CrossAttention(SelfAttention):
    def source(self, x, context):
        return context


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_mode = "sdpa"
        self.self_attn, self.cross_attn = SelfAttention(), CrossAttention()
        self.ffn = torch.nn.Sequential(
            torch.nn.Linear(WIDTH, FFN),
            torch.nn.GELU(approximate="tanh"),
            torch.nn.Linear(FFN, WIDTH),
        )
        self.modulation = torch.nn.Parameter(torch.zeros(1, 6, WIDTH))

    def forward(self, x, context):
        x = x + self.self_attn(x)
        x = x + self.cross_attn(x, context)
        return x + self.ffn(x)


class Transformer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.patched_linear = False
        self.blocks = torch.nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = torch.nn.Module()
        self.head.head = torch.nn.Linear(WIDTH, 64)
        self.head.modulation = torch.nn.Parameter(torch.zeros(1, 2, WIDTH))

    def forward(self, x, context, current_step_percentage=0.0):
        for block in self.blocks:
            x = block(x, context)
        return self.head.head(x)


class WanVideoModel(torch.nn.Module):
    def __init__(self, transformer, **pipeline):
        super().__init__()
        self.diffusion_model = transformer
        self.pipeline = pipeline

    def __getitem__(self, key):
        return self.pipeline[key]

    def __setitem__(self, key, value):
        self.pipeline[key] = value


class Patcher:
    """The part of the host's ModelPatcher that our nodes use."""

    load_device = offload_device = torch.device("cpu")

    def __init__(self, model):
        self.model = model
        self.patches = {}

    def clone(self, model_override):
        made = Patcher(model_override[0])
        made.patches = dict(self.patches)
        return made


def make(**pipeline) -> Patcher:
    """Return a WANVIDEOMODEL as the loader leaves it: no weights yet, but the file's tensors."""
    WanVideoModel.__module__ = f"{PACKAGE}.nodes_model_loading"
    sys.modules[f"{PACKAGE}.custom_linear"] = types.SimpleNamespace(CustomLinear=CustomLinear)
    torch.manual_seed(0)
    state = Transformer().state_dict()
    with torch.device("meta"):
        transformer = Transformer().eval()
    about = {"sd": state, "base_path": "wan.safetensors", "base_dtype": torch.float32}
    about |= {"quantization": "disabled", "fp8_matmul": False, "gguf_reader": None}
    return Patcher(WanVideoModel(transformer, **about | pipeline))


def loaded(patcher: Patcher) -> Transformer:
    """Return the transformer with its weights, as the sampler has it when it begins."""
    transformer = patcher.model.diffusion_model
    if patcher.model["sd"] is not None:
        transformer.load_state_dict(patcher.model["sd"], assign=True)
    return transformer
