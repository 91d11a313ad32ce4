"""Folders of ComfyUI: models, GGUF files too, LoRAs, and the one that the pack has there."""

import importlib.util
import sys
from pathlib import Path

from ...ops.cuda import cache

MODELS = "diffusion_models"
LORAS = "loras"
# ComfyUI lists no such files there. Its table of suffixes belongs to all packs: it stays as it is.
OURS = ".gguf"
# Of folders in ComfyUI's own for users, which no request reaches.
OWN = "lowbit"


def keep_machine_code() -> None:
    """Keep compiled kernels in ComfyUI's folder for users, where ComfyUI runs and has one."""
    # Not imported for this: ComfyUI has it before it loads any pack.
    paths = sys.modules.get("folder_paths")
    if hasattr(paths, "get_system_user_directory"):
        cache.keep_in(Path(paths.get_system_user_directory(OWN)))


def model_names() -> list[str]:
    """Return the files of models/diffusion_models; none where there is no ComfyUI."""
    if importlib.util.find_spec("folder_paths") is None:
        return []
    import folder_paths

    found = set(folder_paths.get_filename_list(MODELS))
    for folder in folder_paths.get_folder_paths(MODELS):
        names, _ = folder_paths.recursive_search(folder, excluded_dir_names=[".git"])
        found.update(name for name in names if name.lower().endswith(OURS))
    return sorted(found)


def model_path(name: str) -> str:
    """Return the path of a file of models/diffusion_models. Raises FileNotFoundError."""
    import folder_paths

    return folder_paths.get_full_path_or_raise(MODELS, name)


def lora_names() -> list[str]:
    """Return the files of models/loras; none where there is no ComfyUI."""
    if importlib.util.find_spec("folder_paths") is None:
        return []
    import folder_paths

    return folder_paths.get_filename_list(LORAS)


def lora_path(name: str) -> str:
    """Return the path of a file of models/loras. Raises FileNotFoundError."""
    import folder_paths

    return folder_paths.get_full_path_or_raise(LORAS, name)
