"""Long work in the host: where it runs, how far it is, and the user's wish to stop it."""

import torch


def device() -> torch.device:
    """Return where the host computes."""
    import comfy.model_management

    return comfy.model_management.get_torch_device()


def progress(total: int):
    """Return the host's progress bar and a function that stops when the user interrupts."""
    import comfy.model_management
    import comfy.utils

    stop = comfy.model_management.throw_exception_if_processing_interrupted
    return comfy.utils.ProgressBar(max(total, 1)), stop
