"""Nothing of the pack speaks to the network, or runs what a file holds."""

import ast
from pathlib import Path

import pytest

from tests.test_layers import ROOT, SOURCES, imports

NETWORK = {
    "aiohttp", "asyncio", "ftplib", "http", "httpx", "huggingface_hub", "requests", "smtplib",
    "socket", "ssl", "urllib", "urllib3", "webbrowser", "websocket", "websockets", "xmlrpc",
}  # fmt: skip
RUN_WHAT_THEY_READ = {"dill", "joblib", "marshal", "pickle", "shelve"}
# Calls that fetch something, or load a pickle, whatever the module.
CALLS = {"from_pretrained", "hf_hub_download", "snapshot_download", "load_state_dict_from_url"}


@pytest.mark.parametrize("name", SOURCES)
def test_source_imports_neither_network_nor_pickle(name):
    for level, module, line in imports(name):
        found = {module.split(".")[0]} & (NETWORK | RUN_WHAT_THEY_READ) if not level else set()
        assert not found, f"{name}:{line} imports {module}"


@pytest.mark.parametrize("name", SOURCES)
def test_source_calls_nothing_that_fetches_or_unpickles(name):
    for node in ast.walk(ast.parse(Path(ROOT, name).read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called.rpartition(".")[2] not in CALLS, f"{name}:{node.lineno} calls {called}"
        assert called not in ("torch.load", "np.load", "numpy.load"), f"{name}:{node.lineno}"
