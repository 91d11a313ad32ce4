import re

import pytest
import torch

from lowbit.ops import registry
from lowbit.ops.linear.arithmetic import ARITHMETICS
from lowbit.ops.linear.four_bit import GROUPS
from lowbit.quant import arithmetic, doctor, formats


def test_every_format_tells_its_backend_and_why_others_do_not_fit():
    found = doctor.diagnose()
    assert [f.format for f in found.formats] == list(formats.names())
    for support in found.formats:
        assert support.backend not in support.unfit
        assert all(support.unfit.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_nothing_runs_on_tensor_cores_without_a_gpu():
    found = doctor.diagnose()
    assert found.device == "cpu" and not found.gpus
    assert all(f.emulated and "tensor cores" not in f.runs for f in found.formats)


def test_formats_of_4_bits_tell_of_every_arithmetic_whether_it_runs():
    for support in doctor.diagnose().formats:
        scheme = formats.get(support.format).layout.scheme
        assert list(support.arithmetics) == list(ARITHMETICS[1:] if scheme in GROUPS else ())


def test_arithmetic_is_refused_where_quantizing_refuses_it(monkeypatch):
    monkeypatch.setattr(registry, "capability", lambda device: (8, 6))
    monkeypatch.setattr(registry, "_has_package", lambda name: True)
    monkeypatch.setattr(registry, "_wrong_version", lambda needs: None)
    # A device that no other test asks for: choices are remembered.
    device = torch.device("cuda", 8)
    told = doctor._support(formats.get("nvfp4"), device).arithmetics
    assert told["w4a8"] == told["w4a8_exact"] == "W4A8 on INT8 tensor cores"
    for wish, text in told.items():
        reason = text.removeprefix("refused: ")
        if reason == text:
            arithmetic.check("nvfp4", wish, device)
        else:
            with pytest.raises(registry.NoBackendError, match=re.escape(reason)):
                arithmetic.check("nvfp4", wish, device)
    refused = {wish for wish, text in told.items() if text.startswith("refused: ")}
    assert refused == {"native", "w4a8_fp8"}


def test_missing_package_has_no_version():
    assert doctor._version("no_such_package", ("no-such-package",)) is None
    assert doctor._version("torch", ("torch",)) is not None


def test_host_is_found_by_its_environment_variable(monkeypatch, tmp_path):
    (tmp_path / "comfyui_version.py").write_text('__version__ = "9.8.7"\n')
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    assert doctor.find_host() == doctor.Host(str(tmp_path), "9.8.7")


def test_absent_host_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert doctor.find_host() is None
