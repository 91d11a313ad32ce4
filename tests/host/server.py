"""A real ComfyUI on the CPU, started for the tests and spoken to over HTTP."""

import functools
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

REPO = Path(__file__).resolve().parents[2]
TEST_PACK = Path(__file__).resolve().parent / "pack"
# a dash cannot stand in a Python identifier: the pack must load from such a folder
PACK_FOLDER = "lowbit-for-comfyui"
NEEDED_PACKAGES = ("torch", "torchvision", "torchaudio", "comfy_kitchen", "aiohttp", "av")
START_TIMEOUT_S = 120
# the largest model in the slowest format, on two busy cores
PROMPT_TIMEOUT_S = 600
POLL_S = 0.02
LOG_TAIL_LINES = 60


class HostMissingError(Exception):
    """ComfyUI, its interpreter or one of its packages is not on this machine."""


class PromptError(Exception):
    """The server refused a prompt, or a node in it raised; the text names the node and why."""


class PromptInterrupted(Exception):  # noqa: N818  an order, not an error
    """The prompt ended because it was interrupted."""


@functools.cache
def find_host() -> tuple[Path, Path]:
    """Return (ComfyUI's folder, its Python interpreter).

    Looks at COMFYUI_PATH, else ~/ComfyUI; and at COMFYUI_PYTHON, else .venv or venv in that folder,
    else the interpreter that runs the tests. Raises HostMissingError saying what is missing.
    """
    root = Path(os.environ.get("COMFYUI_PATH", "~/ComfyUI")).expanduser()
    if not (root / "main.py").is_file():
        raise HostMissingError(f"no ComfyUI in {root}: set COMFYUI_PATH to its folder")
    python = _find_python(root)
    # imported for real: a package built for another torch is found, yet cannot be imported
    found = subprocess.run(
        [python, "-c", "import " + ", ".join(NEEDED_PACKAGES)],
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
    )
    if found.returncode:
        reason = (found.stderr.strip() or "no output").splitlines()[-1]
        raise HostMissingError(
            f"{python} cannot import {', '.join(NEEDED_PACKAGES)} ({reason}): "
            "install ComfyUI's requirements or set COMFYUI_PYTHON"
        )
    return root, python


def session(script: Path) -> dict:
    """Return what `script`, run by ComfyUI's Python as PACK HOST, printed as JSON on its last line.

    Skips where ComfyUI is missing; fails with the end of its log where the script does.
    """
    try:
        root, python = find_host()
    except HostMissingError as error:
        pytest.skip(str(error))
    run = subprocess.run([python, script, REPO, root], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


def find_wrapper() -> Path:
    """Return the folder of WanVideoWrapper.

    Looks at WANVIDEOWRAPPER_PATH, else in ComfyUI's custom_nodes. Raises
    HostMissingError saying what is missing.
    """
    root, python = find_host()
    named = os.environ.get("WANVIDEOWRAPPER_PATH")
    installed = root / "custom_nodes" / "ComfyUI-WanVideoWrapper"
    places = [Path(named).expanduser()] if named else [installed]
    found = [place for place in places if (place / "nodes_model_loading.py").is_file()]
    if not found:
        raise HostMissingError(f"no WanVideoWrapper in {places[0]}: set WANVIDEOWRAPPER_PATH")
    code = "import accelerate, diffusers, ftfy, peft, gguf, pyloudnorm, cv2"
    tried = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, timeout=START_TIMEOUT_S
    )
    if tried.returncode:
        reason = (tried.stderr.strip() or "no output").splitlines()[-1]
        raise HostMissingError(f"{python} lacks what WanVideoWrapper needs ({reason})")
    return found[0]


def _find_python(root: Path) -> Path:
    if named := os.environ.get("COMFYUI_PYTHON"):
        return Path(named).expanduser()
    for folder in (".venv", "venv"):
        for name in ("bin/python", "Scripts/python.exe"):
            if (root / folder / name).is_file():
                return root / folder / name
    return Path(sys.executable)


class Server:
    """One ComfyUI process with its own base directory: models, custom nodes, output, log.

    packs: folders of further node packs.
    """

    def __init__(self, base: Path, packs: tuple[Path, ...] = ()):
        self.base = base
        self.log_path = base / "server.log"
        self._process: subprocess.Popen | None = None
        for folder in ("models/diffusion_models", "models/loras", "custom_nodes", "input"):
            (base / folder).mkdir(parents=True)
        (base / "custom_nodes" / PACK_FOLDER).symlink_to(REPO, target_is_directory=True)
        (base / "custom_nodes" / "lowbit_test_pack").symlink_to(TEST_PACK, target_is_directory=True)
        for pack in packs:
            (base / "custom_nodes" / pack.name).symlink_to(pack, target_is_directory=True)

    def start(self) -> None:
        """Start the process and wait until it answers. Raises HostMissingError or RuntimeError."""
        root, python = find_host()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        # the CPU's default attention splits the work and is slower than torch's own
        options = f"--cpu --listen 127.0.0.1 --port {port} --use-pytorch-cross-attention"
        options += " --disable-auto-launch --disable-api-nodes --database-url sqlite:///:memory:"
        with open(self.log_path, "wb") as log:
            self._process = subprocess.Popen(
                [python, root / "main.py", *options.split(), "--base-directory", self.base],
                cwd=self.base,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        end = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end:
                self.stop()
                raise RuntimeError(f"ComfyUI did not start:\n{self.log_tail()}")
            time.sleep(0.1)

    def stop(self) -> None:
        """End the process; safe to call twice."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def log_tail(self, lines: int = LOG_TAIL_LINES) -> str:
        """The last lines of the server's log."""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    def model_path(self, name: str, folder: str = "diffusion_models") -> Path:
        """Where a model file has to lie for the loaders to list it as `name`."""
        return self.base / "models" / folder / name

    def offer(self, path: str, name: str) -> str:
        """Offer the saved file at `path` to the loaders as `name`, and return `name`.

        path: absolute, or relative to the server's output folder.
        """
        target = self.model_path(name)
        target.unlink(missing_ok=True)
        target.symlink_to(self.base / "output" / path)
        return name

    def run(self, graph: dict, timeout_s: float = PROMPT_TIMEOUT_S) -> dict:
        """Run a prompt in the API format to its end and return its history entry."""
        return self.wait(self.submit(graph), timeout_s)

    def submit(self, graph: dict) -> str:
        """Queue a prompt and return its id. Raises PromptError if the server refuses it."""
        return self._request("/prompt", {"prompt": graph})["prompt_id"]

    def wait(self, prompt_id: str, timeout_s: float = PROMPT_TIMEOUT_S) -> dict:
        """Return the prompt's history entry once it has ended."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            entry = self._request(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                return _checked(entry)
            if self._process is None or self._process.poll() is not None:
                raise RuntimeError(f"ComfyUI died:\n{self.log_tail()}")
            time.sleep(POLL_S)
        raise TimeoutError(f"the prompt did not end in {timeout_s} s:\n{self.log_tail()}")

    def memory_bytes(self) -> int:
        """The memory of the process that no file backs, from Linux's /proc."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        (line,) = [line for line in status.splitlines() if line.startswith("RssAnon:")]
        return int(line.split()[1]) * 1024

    def is_running(self, prompt_id: str) -> bool:
        """Whether the prompt is being executed at this moment."""
        return any(item[1] == prompt_id for item in self._request("/queue")["queue_running"])

    def latent(self, entry: dict, node_id: str) -> torch.Tensor:
        """The float32 latent that the SaveLatent node `node_id` wrote."""
        saved = entry["outputs"][node_id]["latents"][0]
        file = self.base / "output" / saved["subfolder"] / saved["filename"]
        return load_file(file)["latent_tensor"].float()

    def text(self, entry: dict, node_id: str) -> str:
        """The text that an output node shows."""
        return entry["outputs"][node_id]["text"][0]

    def interrupt(self) -> None:
        """Ask the running prompt to stop; `wait` then raises PromptInterrupted."""
        self._request("/interrupt", {})

    def object_info(self, node: str | None = None) -> dict:
        """The schema of one node, or of all by name."""
        if node is None:
            return self._request("/object_info")
        return self._request(f"/object_info/{node}")[node]

    def _answers(self) -> bool:
        try:
            self._request("/system_stats")
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False
        return True

    def _request(self, path: str, body: dict | None = None) -> dict:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data)
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                content = reply.read()
        except urllib.error.HTTPError as error:
            raise PromptError(error.read().decode(errors="replace")) from error
        return json.loads(content) if content else {}


def _checked(entry: dict) -> dict:
    for kind, details in entry["status"]["messages"]:
        if kind == "execution_interrupted":
            raise PromptInterrupted(f"in node {details['node_id']} ({details['node_type']})")
        if kind == "execution_error":
            where = f"node {details['node_id']} ({details['node_type']})"
            trace = "".join(details["traceback"])
            what = f"{details['exception_type']}: {details['exception_message']}"
            raise PromptError(f"{where}: {what}\n{trace}")
    return entry
