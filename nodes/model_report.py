"""The node that reports what a model's layers are."""

from ..quant import report
from . import host, plot
from .inputs import CATEGORY


class LowBitModelReport:
    """Tell format, size and error of every linear layer of a MODEL."""

    DISPLAY_NAME = "Model Report (LowBit)"
    DESCRIPTION = (
        "Lists every linear layer with its format, size and the error that quantizing it made, "
        "and plots size and error. Errors are known for layers that this pack quantized."
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("STRING", "IMAGE")
    RETURN_NAMES = ("report", "plot")
    OUTPUT_TOOLTIPS = ("A table of the layers.", "Size (bars) and error (dots) of the layers.")
    OUTPUT_NODE = True
    FUNCTION = "report"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL", {"tooltip": "The model to report on."})}}

    def report(self, model):
        records = host.layer_records(model)
        text = report.table(records)
        return {"ui": {"text": [text]}, "result": (text, plot.layers(records))}


NODE = LowBitModelReport
