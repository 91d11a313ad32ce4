import pytest
import torch

from lowbit.quant import doctor, formats


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
