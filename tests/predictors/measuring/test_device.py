"""Names of devices and the provenance of measurements."""

import json
import os
import re
import subprocess
import sys

import pytest

from mixnas.predictors.measuring import device
from mixnas.search_space.errors import ConfigError


def test_names():
    name = device.device_name("cpu", threads=3)
    assert re.fullmatch(r"cpu-[a-z0-9-]+-3t", name)
    assert device.device_name("nvidia-h200") == "nvidia-h200"
    if not device.gpu_models():
        assert device.device_name() == device.device_name("cpu")
        with pytest.raises(ConfigError, match="no NVIDIA GPU"):
            device.device_name("cuda")


@pytest.mark.parametrize(
    ("text", "slug"),
    [
        ("Intel(R) Xeon(R) Silver 4114 CPU @ 2.20GHz", "intel-xeon-silver-4114"),
        ("AMD EPYC 7763 64-Core Processor", "amd-epyc-7763"),
        ("NVIDIA H200", "nvidia-h200"),
        ("Apple M2 Pro", "apple-m2-pro"),
    ],
)
def test_slugs(text, slug):
    assert device._slug(text) == slug


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("cpu-amd-epic-26-2-1t", "cpu-amd-epyc-26-2-1t"),  # a slip of the fingers
        ("cpu-amd-epyc-26-2-2t", ""),  # more threads, another CPU, another GPU: other devices
        ("cpu-amd-epyc-25-1-1t", ""),
        ("nvidia-h200", ""),
        ("nvidea-h100", "nvidia-h100"),
    ],
)
def test_another_device_is_not_what_was_meant(given, meant):
    known = ["cpu-amd-epyc-26-2-1t", "cpu-intel-xeon-6-167-1t", "nvidia-h100"]
    assert device.nearest_device(given, known) == (f" Did you mean {meant!r}?" if meant else "")


@pytest.mark.skipif(os.name != "posix" or bool(device.gpu_models()), reason="needs a machine without a GPU")
def test_a_gpu_without_proc_is_named_by_its_driver(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device.device_name("cuda") == "nvidia-h200"
    tool.write_text("#!/bin/sh\necho 'no devices were found'\nexit 6\n")
    assert device.gpu_models() == []


def test_provenance_is_plain_and_names_no_host():
    record = device.provenance("cpu", 1)
    text = json.dumps(record)
    assert record["device"] == device.device_name("cpu", 1) and record["threads"] == 1
    assert os.uname().nodename not in text and os.path.expanduser("~") not in text


def test_the_launch_tables_have_a_digest(monkeypatch, tmp_path):
    first = device.launch_tables_digest()
    assert re.fullmatch("[0-9a-f]{12}", first) and first == device.launch_tables_digest()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "glu.json").write_text("{}")
    monkeypatch.setattr(device, "__file__", str(tmp_path / "predictors" / "device.py"))
    assert device.launch_tables_digest() != first


def test_naming_needs_no_torch():
    code = "import sys, mixnas.predictors.measuring.device as d; d.device_name(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
