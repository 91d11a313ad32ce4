"""The README: its generated tables are current, and its commands run."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lowbit import NODE_CLASS_MAPPINGS, layer_records
from lowbit.quant import support
from lowbit.quant.demo.models import MODELS
from lowbit.quant.quantize_file import quantize_file
from tests.bench import table
from tests.checkpoints import write_wan
from tests.ops import triton_versions

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def block(name: str, text: str = README) -> str:
    """Return what stands between the marks of a generated part."""
    found = re.search(rf"<!-- {name}:.*?-->\n(.*?)\n?<!-- end of {name} -->", text, re.S)
    assert found, f"there is no part {name}"
    return found[1]


def test_table_of_formats_is_the_registrys():
    assert block("formats") == support.table()


def test_table_of_linear_layers_is_the_results():
    assert block("linear") == table.table()


def test_versions_of_triton_are_those_that_are_compiled_with():
    assert block("triton") == triton_versions.sentence()
    results = (ROOT / "docs" / "results" / "triton.md").read_text()
    assert block("triton", results) == triton_versions.table()


def test_every_node_is_named():
    for node in NODE_CLASS_MAPPINGS.values():
        assert node.DISPLAY_NAME in README


def test_make_targets_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^make (\w+)$", README, re.M)) <= targets


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.S)


def test_example_of_diffusers_runs(tmp_path, monkeypatch):
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    monkeypatch.chdir(tmp_path)
    before = MODELS[0].build()
    pipe = SimpleNamespace(transformer=before)
    exec(examples()[0], {"pipe": pipe})
    assert type(pipe.transformer) is type(before) and pipe.transformer is not before
    records = {r.name: r.format for r in layer_records(pipe.transformer)}
    assert records == {r.name: r.format for r in layer_records(before)}
    assert "int8_convrot" in records.values()


def test_python_example_runs_and_leaves_the_model_as_it_was():
    code = examples()[1]
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 5)).bfloat16()
    weight = model.requires_grad_(False)[0].weight.to(torch.float8_e4m3fn)
    model[0].weight = torch.nn.Parameter(weight, requires_grad=False)
    before, x = list(model), torch.ones(3, 32, dtype=torch.bfloat16)
    given = {"model": model, "x": x, "scales": {"0.scale_weight": torch.tensor(2.0)}}
    exec(code, given)
    want = model[1](2 * x @ weight.bfloat16().t() + model[0].bias)
    # Both layers round to bf16, here and there.
    assert (given["output"] - want).norm() <= 4 * torch.finfo(torch.bfloat16).eps * want.norm()
    assert list(model) == before


def commands() -> list[str]:
    part = README[README.index("## Command line") :]
    return re.findall(r"^lowbit .*$", part, re.M)


# `demo` takes a minute and `tune` needs a GPU; both have tests of their own.
APART = ("lowbit demo", "lowbit tune")


LINES = [c for c in commands() if not c.startswith(APART)]
# Each command in a process of its own, forked before anything of ours is imported: what takes long
# is to import torch. Writes a file of what each printed, and prints their exit codes.
EACH_APART = """
import json, os, runpy, sys
import comfy_kitchen, torch
codes = []
for number, words in enumerate(json.loads(sys.argv[1])):
    child = os.fork()
    if not child:
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{number}.{name}", os.O_WRONLY | os.O_CREAT), stream)
        sys.argv = ["lowbit", *words]
        runpy.run_module("lowbit", run_name="__main__")
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What became of each line: (exit code, stdout, stderr)."""
    folder = tmp_path_factory.mktemp("readme")
    files = {name: folder / f"{name}.safetensors" for name in ("SRC", "FILE", "A", "B")}
    for path in files.values():
        write_wan(path)
    files["QUANTIZED"] = folder / "QUANTIZED.safetensors"
    quantize_file(files["SRC"], files["QUANTIZED"], "fp8_e4m3")
    found = []
    for number, line in enumerate(LINES):
        files["DST"] = folder / f"DST{number}.safetensors"
        found.append([str(files.get(word, word)) for word in shlex.split(line)[1:]])
    command = [sys.executable, "-c", EACH_APART, json.dumps(found)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    return {
        line: (code, *((folder / f"{number}.{end}").read_text() for end in ("out", "err")))
        for number, (line, code) in enumerate(zip(LINES, json.loads(run.stdout), strict=True))
    }


@pytest.mark.parametrize("line", LINES)
def test_command_runs(ran, line):
    code, out, err = ran[line]
    assert code == 0, err
    assert out.strip()
