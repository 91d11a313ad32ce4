"""Room in the device's memory, taken from models that the host can load again."""


def make_room() -> None:
    """Unload every model; the host gives them their memory back when they run."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
