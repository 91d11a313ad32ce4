"""The files of models/diffusion_models and models/loras, as ComfyUI lists them, and GGUF models."""

import importlib.util

MODELS = "diffusion_models"
LORAS = "loras"
# ComfyUI lists no such files there. Its table of suffixes belongs to all packs: it stays as it is.
OURS = ".gguf"


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
