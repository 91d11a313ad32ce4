"""How the layers of a model in memory are called: by the model itself, and by the host."""

from dataclasses import dataclass

from torch import nn

from .. import families

# What wrappers put between a model and its tensors -> how to get the model itself.
WRAPPERS = {
    "base_layer": "PEFT; a LoRA is no part of the file: take it off first (unload_lora_weights or "
    "unload_lora) and load it beside the model that load_model gives, or merge the LoRA into the "
    "16-bit model, before quantizing (fuse_lora and then unload_lora_weights)",
    "modules_to_save": "PEFT; take the adapter off first (unload_lora)",
    "_orig_mod": "torch.compile; pass the model that was compiled",
}

# Projections that diffusers' `fuse_qkv_projections` joined, beside the layers of which they are
# made: those decide what becomes of them, and those are what files hold.
FUSED = {
    "to_qkv": "to_q",
    "to_kv": "to_k",
    "to_added_kv": "add_k_proj",
    "to_added_qkv": "add_q_proj",
}


@dataclass(frozen=True)
class Names:
    """A model as its family sees it. `host`: name of a tensor in the model -> the host's name."""

    recognised: families.Recognised
    host: dict[str, str]

    def layer(self, name: str) -> str:
        """Return the host's name of the layer `name`; of a fused projection, that of its first."""
        path, _, last = name.rpartition(".")
        name = f"{path}.{FUSED[last]}" if last in FUSED else name
        return self.recognised.family.rename([name])[name]

    def block(self, name: str) -> int | None:
        """Return the number of the main stack's block that holds the module `name`, or None."""
        return self.recognised.family.block_number(self.layer(name))


def is_fused(name: str) -> bool:
    """Return whether a tensor or layer `name` is of a projection that diffusers joined."""
    return any(part in FUSED for part in name.split(".")[-2:])


def check_unwrapped(model: nn.Module) -> None:
    """Raise ValueError that names the first tensor of `model` whose name a wrapper made."""
    for name in model.state_dict():
        wrappers = [part for part in name.split(".") if part in WRAPPERS]
        if wrappers:
            raise ValueError(
                f"{name} is no name of ComfyUI's model: it is wrapped by {WRAPPERS[wrappers[0]]}"
            )


def names_of(model: nn.Module) -> Names:
    """Return the names in `model`. Raises ValueError where no names are the host's."""
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not is_fused(name)
    }
    found = families.recognise(shapes)
    return Names(found, found.renamed)
