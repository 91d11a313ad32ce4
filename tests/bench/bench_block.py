"""One block of ComfyUI's own Wan 14B and Qwen-Image, whole: the host's ways to run it, and ours.

Run on a GPU beside ComfyUI (`COMFYUI_PATH`, or ~/ComfyUI): `python -m tests.bench.bench_block`.
Models have one layer of full width with random weights and come from files, ours through our own
nodes with their default inputs. SageAttention takes part where it is installed. The error is
relative L2 against the block in bf16. Each way runs by itself, again and again, until the GPU's
clock has settled: as in sampling, power limits it. Prints a table and appends it to
docs/results/block.jsonl.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tests import checkpoints
from tests.bench import runner

HOST = Path(os.environ.get("COMFYUI_PATH", Path.home() / "ComfyUI"))
WAN, QWEN = "wan 14B", "qwen_image 20B"
LAYERS = {WAN: "blocks", QWEN: "transformer_blocks"}
TEXT = {WAN: (512, checkpoints.WAN_TEXT_DIM), QWEN: (256, checkpoints.QWEN_TEXT_DIM)}
# Refuse to time a block that errs more: FP8 with the host's static scale of 1 errs by about .05.
MAX_ERROR = 0.1
PROFILED_CALLS = 3
SIGMA = 0.5
SHORT = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One model at one size. latent: [frames, height, width]; references: latents beside it."""

    name: str
    model: str
    latent: tuple[int, int, int]
    references: int = 0
    text_tokens: int | None = None


CASES = (
    Case("wan 14B 480p", WAN, (21, 60, 104)),
    Case("wan 14B 720p", WAN, (21, 90, 160)),
    Case("qwen_image 1328", QWEN, (1, 166, 166)),
    Case("qwen_image 1024", QWEN, (1, 128, 128)),
    Case("qwen_image edit 1328", QWEN, (1, 166, 166), references=1, text_tokens=512),
)


@dataclass(frozen=True)
class Way:
    """One way to run a block. stored: format of the file that the host's own loader reads, or None
    for our loader with its default inputs. attention: of the host, "sage", or our node's mode.
    """

    name: str
    stored: str | None
    attention: str = "host"


BASE = "bf16"
WAYS = (
    Way("bf16", "bf16"),
    Way("bf16 + sage", "bf16", "sage"),
    Way("host fp8", "fp8_e4m3"),
    Way("host fp8 + sage", "fp8_e4m3", "sage"),
    Way("host int8_convrot", "int8_convrot"),
    Way("host int8_convrot + sage", "int8_convrot", "sage"),
    Way("lowbit", None, "auto"),
    Way("lowbit exact", None, "lowbit_exact"),
    Way("lowbit int8", None, "lowbit_int8"),
    Way("lowbit fp8", None, "lowbit_fp8"),
    Way("lowbit, host attention", None),
)


def shapes() -> Iterator[Case]:
    """Yield the models and sizes that are timed."""
    yield from CASES


def start(base: str, dynamic: bool):
    """Bring ComfyUI up without its server; return our pack's nodes by class name."""
    session = importlib.import_module("tests.gpu.host_session")
    pack = session.start("dynamic" if dynamic else "legacy", base)
    return pack.NODE_CLASS_MAPPINGS


def write(model: str, folder: Path) -> dict[str, Path]:
    """Write a model of one layer as a bf16 file and in the formats of the host; return paths."""
    # Of the pack as ComfyUI has it: twice imported it would register its layouts twice.
    quantize_file = importlib.import_module("lowbit_pack.quant.quantize_file").quantize_file
    folder.mkdir(parents=True, exist_ok=True)
    prefix = LAYERS[model]
    plain = folder / f"{prefix} bf16.safetensors"
    if model == WAN:
        checkpoints.write_wan(plain, dim=5120, ffn=13824, layers=1)
    else:
        checkpoints.write_qwen_image(plain)
    files = {"bf16": plain}
    for name in dict.fromkeys(way.stored for way in WAYS if way.stored not in (None, "bf16")):
        files[name] = folder / f"{prefix} {name}.safetensors"
        quantize_file(str(plain), str(files[name]), name)
    return files


def load(way: Way, files: dict[str, Path], nodes: dict) -> object:
    """Return a ModelPatcher, on the GPU."""
    import comfy.model_management
    import comfy.sd

    if way.stored is None:
        node = nodes["LowBitLoadDiffusionModel"]
        (patcher,) = node().load(files["bf16"].name, **{**defaults(node), "format": "int8_convrot"})
        if way.attention != "host":
            node = nodes["LowBitAttention"]
            inputs = {**defaults(node), "mode": way.attention}
            (patcher,) = node().set_attention(patcher, **inputs)
    else:
        patcher = comfy.sd.load_diffusion_model(str(files[way.stored]))
    if way.attention == "sage":
        patcher.model_options["transformer_options"]["optimized_attention_override"] = sage
    comfy.model_management.load_models_gpu([patcher])
    return patcher


def defaults(node: type) -> dict:
    """Return the default value of each of a node's inputs that has one."""
    inputs = node.INPUT_TYPES()["required"]
    return {name: spec[1]["default"] for name, spec in inputs.items() if "default" in spec[1]}


def sage(func: Callable, *args, **kwargs) -> torch.Tensor:
    """Run the host's own call of SageAttention, as its option --use-sage-attention does."""
    from comfy.ldm.modules.attention import attention_sage

    return attention_sage(*args, **kwargs)


def step(case: Case, patcher) -> tuple[tuple, dict]:
    """Run one step of a model as the host's sampler does; return what its first block was given."""
    model = patcher.model
    generator = torch.Generator("cuda").manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    tokens, width = TEXT[case.model]
    latent = (1, checkpoints.LATENT_CHANNELS, *case.latent)
    x, context = noise(*latent), noise(1, case.text_tokens or tokens, width)
    sigma = torch.full((1,), SIGMA, device="cuda")
    references = {"ref_latents": [noise(*latent) for _ in range(case.references)]}
    options = {**patcher.model_options["transformer_options"], "sigmas": sigma}
    # As the host's sampler puts them there before it samples.
    options["wrappers"] = patcher.wrappers
    seen = []
    hook = first_block(case, patcher).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    try:
        model.apply_model(
            *(x, sigma),
            **{"c_crossattn": context, "transformer_options": options},
            **(references if case.references else {}),
        )
    finally:
        hook.remove()
    return seen[0]


def first_block(case: Case, patcher) -> torch.nn.Module:
    """Return the block that is timed."""
    return getattr(patcher.model.diffusion_model, LAYERS[case.model])[0]


def dtype_of(patcher) -> torch.dtype:
    """Return the dtype in which the host computes a model."""
    return patcher.model.manual_cast_dtype or patcher.model.get_dtype()


def runner_of(case: Case, patcher, inputs: tuple[tuple, dict]) -> Callable[[], torch.Tensor]:
    """Return a function that runs the block of a model and returns its video or image tokens.

    inputs: of the block in bf16; the options that the host gives to attention are the model's own.
    """
    block = first_block(case, patcher)
    dtype = dtype_of(patcher)

    def cast(value):
        is_short = isinstance(value, torch.Tensor) and value.dtype in SHORT
        # The first block's input is transposed; what a block gives to the next one is not.
        return value.to(dtype).contiguous() if is_short else value

    args = tuple(cast(a) for a in inputs[0])
    kwargs = {name: cast(value) for name, value in inputs[1].items()}
    kwargs["transformer_options"] = step(case, patcher)[1]["transformer_options"]

    def run() -> torch.Tensor:
        out = block(*args, **kwargs)
        return out[1] if isinstance(out, tuple) else out

    return run


def ways(only: str) -> Iterator[Way]:
    """Yield the ways that can be run here and whose name holds `only`, and bf16."""
    for way in WAYS:
        if only not in way.name and way.name != BASE:
            continue
        if way.attention != "sage" or importlib.util.find_spec("sageattention"):
            yield way


def bench(
    case: Case, files: dict[str, Path], nodes: dict, only: str, profile: Path | None
) -> dict[str, dict]:
    """Return, by name of the way, times and error."""
    plain = load(WAYS[0], files, nodes)
    inputs = step(case, plain)
    patchers = {way.name: load(way, files, nodes) for way in ways(only)}
    runs = {name: runner_of(case, patcher, inputs) for name, patcher in patchers.items()}
    want = runs[BASE]().clone()
    errors = {}
    for name, run in runs.items():
        errors[name] = runner.relative_error(run(), want)
        # Not `>`, which NaN would pass.
        if not errors[name] <= MAX_ERROR:
            raise RuntimeError(f"{case.name}: {name} errs by {errors[name]:.3f}, not timed")
    if profile:
        for name in ("lowbit", BASE):
            write_profile(runs[name], profile / f"{case.name} {name}.txt".replace(" ", "_"))
    timings = runner.measure_sustained(runs)
    return {
        name: {**vars(timing), "error": errors[name], "dtype": str(runs[name]().dtype)}
        for name, timing in timings.items()
    }


def write_profile(run: Callable, path: Path) -> None:
    """Write the GPU kernels of a few calls by their time."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as seen:
        for _ in range(PROFILED_CALLS):
            run()
        torch.cuda.synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    table = seen.key_averages().table(
        sort_by="cuda_time_total", row_limit=60, max_name_column_width=110
    )
    path.write_text(table, encoding="utf-8")


def line(case: Case, results: dict[str, dict]) -> str:
    """Return the table's line: each way's time, error and our ratio to it."""
    ours = results["lowbit"]["median_ms"]
    cells = [case.name]
    for name, result in results.items():
        ratio = result["median_ms"] / ours
        cells.append(
            f"{name} {result['median_ms']:.2f} ms, err {result['error']:.4f}, {ratio:.2f}x, "
            f"host {result['host_us'] / 1000:.1f} ms"
        )
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Time every case, print the table, append the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="only cases whose name holds this")
    parser.add_argument("--ways", default="", help="only ways whose name holds this, and bf16")
    parser.add_argument("--dynamic", action="store_true", help="under the host's dynamic VRAM")
    parser.add_argument("--profile", type=Path, help="folder for tables of the kernels that ran")
    chosen = parser.parse_args()
    sys.argv = sys.argv[:1]
    sage_version = None
    if importlib.util.find_spec("sageattention"):
        sage_version = importlib.metadata.version("sageattention")
    with tempfile.TemporaryDirectory() as base:
        nodes = start(base, chosen.dynamic)
        for model in LAYERS:
            cases = [c for c in shapes() if c.model == model and chosen.only in c.name]
            if not cases:
                continue
            files = write(model, Path(base) / "models" / "diffusion_models")
            with torch.inference_mode():
                for case in cases:
                    results = bench(case, files, nodes, chosen.ways, chosen.profile)
                    print(line(case, results), flush=True)
                    memory = "dynamic" if chosen.dynamic else "legacy"
                    record = {"case": case.name, "memory": memory, "sageattention": sage_version}
                    runner.append("block", {**record, "results": results})


if __name__ == "__main__":
    main()
