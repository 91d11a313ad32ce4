"""What goes wrong at a user's: broken files, full disks, paths that lead out, prompts in a row."""

import os
import resource
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.host import graphs
from tests.host.server import PromptError

FULL_BYTES = 1 << 20


def save_to(comfy, wan, prefix):
    """Load, quantize and save under `prefix`; return the path that the node shows."""
    graph = graphs.Graph()
    model = graphs.load_lowbit(graph, wan, "int8_convrot")
    graph.add("LowBitSaveModel", model=model, filename_prefix=prefix)
    (shown,) = comfy.run(graph)["outputs"].values()
    return shown["text"][0]


def everything(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def sampled(comfy, name, format_name="as_stored"):
    graph = graphs.Graph()
    model = graphs.load_lowbit(graph, name, format_name)
    graphs.save(graph, graphs.sample(graph, model, "wan"))
    return comfy.run(graph)


@pytest.mark.parametrize("format_name", ["as_stored", "int8_convrot"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.9])
def test_truncated_file_is_named(comfy, wan, format_name, share):
    data = comfy.model_path(wan).read_bytes()
    comfy.model_path("cut.safetensors").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(PromptError, match=r"cut\.safetensors: .*(truncated|bytes)"):
        sampled(comfy, "cut.safetensors", format_name)


def test_pickle_is_refused_by_name_and_not_run(comfy, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    torch.save(Trap(), comfy.model_path("trap.pt"))
    for format_name in ("as_stored", "int8_convrot"):
        with pytest.raises(PromptError, match="a pickle, which can run any code"):
            sampled(comfy, "trap.pt", format_name)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("prefix", ["../escaped", "a/../../escaped", "{beside}/escaped", "out/x"])
def test_nothing_is_written_outside_of_the_output_folder(comfy, wan, tmp_path, prefix):
    """`out` is a link that somebody put there; {beside} the folder beside ComfyUI's, absolute."""
    prefix = prefix.format(beside=comfy.base.parent)
    link = comfy.base / "output" / "out"
    if not link.exists():
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(tmp_path, target_is_directory=True)
    before = everything(comfy.base)
    with pytest.raises(PromptError, match="outside the output folder"):
        save_to(comfy, wan, prefix)
    link.unlink()
    assert everything(comfy.base) - before <= {"output"} and not list(tmp_path.iterdir())
    assert not list(comfy.base.parent.glob("escaped*"))


def test_link_in_place_of_the_file_is_not_followed(comfy, wan, tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"untouched")
    folder = comfy.base / "output" / "linked"
    folder.mkdir(parents=True)
    (folder / "m_00002_.safetensors").symlink_to(victim)
    (folder / "m_00001_.safetensors").symlink_to(victim)
    path = save_to(comfy, wan, "linked/m")
    assert path.endswith("m_00003_.safetensors")
    assert victim.read_bytes() == b"untouched"


@pytest.mark.skipif(sys.platform != "linux", reason="limits another process's files by prlimit")
def test_full_disk_leaves_nothing_behind_and_the_server_well(comfy, wan):
    pid = comfy._process.pid
    limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    before = everything(comfy.base / "output")
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (FULL_BYTES, limits[1]))
    try:
        with pytest.raises(PromptError, match=r"full/m_00001_.safetensors: File too large"):
            save_to(comfy, wan, "full/m")
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
    assert everything(comfy.base / "output") - before <= {"full"}
    assert load_file(save_to(comfy, wan, "full/m"))


def test_two_prompts_at_once_give_what_each_gives_alone(comfy, wan):
    def prompt(format_name, seed):
        graph = graphs.Graph()
        model = graphs.load_lowbit(graph, wan, format_name)
        return graph, graphs.save(graph, graphs.sample(graph, model, "wan", seed=seed))

    wishes = [("int8_convrot", 1), ("nvfp4", 2), ("fp8_e4m3", 1)]
    alone = []
    for wish in wishes:
        graph, node = prompt(*wish)
        alone.append(comfy.latent(comfy.run(graph), node))
    prompts = [prompt(*wish) for wish in wishes]
    queued = [comfy.submit(graph) for graph, _ in prompts]
    for prompt_id, (_, node), want in zip(queued, prompts, alone, strict=True):
        assert torch.equal(comfy.latent(comfy.wait(prompt_id), node), want)
