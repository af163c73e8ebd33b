"""The device of a model is logged. There is a warning if the CPU is used because the machine's GPUs cannot be used."""

import logging

import pytest
import torch

from dynamicrag.models import device
from dynamicrag.stage import UserError

LISTS_TWO = 'echo "GPU 0: NVIDIA A100 (UUID: GPU-1)"; echo "GPU 1: NVIDIA A100 (UUID: GPU-2)"'
FAILS = 'echo "NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver."; exit 9'


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Put a stand-in for nvidia-smi first in PATH."""

    def install(commands: str) -> None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{commands}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device.warn_of_unused_gpus.cache_clear()
    device._say.cache_clear()
    return install


@pytest.mark.parametrize(("commands", "visible", "listed"), [
    (LISTS_TWO, None, 2), (LISTS_TWO, "0", 2), (LISTS_TWO, "", 0), (LISTS_TWO, "-1", 0), (FAILS, None, 0), ("true", None, 0),
])
def test_gpus_are_those_that_nvidia_smi_lists(nvidia_smi, monkeypatch, commands, visible, listed):
    nvidia_smi(commands)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device.listed_gpus() == listed


@pytest.mark.parametrize(("name", "commands", "warnings"), [
    ("auto", LISTS_TWO, 1), ("cuda:1", LISTS_TWO, 2), ("cuda", FAILS, 1), ("auto", FAILS, 0), ("cpu", LISTS_TWO, 0),
])
def test_a_cpu_beside_gpus_is_a_warning_and_the_device_is_logged_once(nvidia_smi, caplog, name, commands, warnings):
    nvidia_smi(commands)
    with caplog.at_level(logging.INFO):
        assert [device.pick_device(name), device.pick_device("cpu")] == ["cpu", "cpu"]
    assert [record.levelno for record in caplog.records].count(logging.WARNING) == warnings
    assert [record.args for record in caplog.records if record.levelno == logging.INFO] == [("cpu",)]


@pytest.mark.parametrize(("visible", "twice"), [("0,0", "0"), ("1, 0 ,0", "0"), ("GPU-ab,GPU-ab", "GPU-ab"), ("0,1", None), ("0,-1,0", None)])
def test_a_gpu_named_twice_is_refused_by_name_if_cuda_shows_none(nvidia_smi, monkeypatch, visible, twice):
    nvidia_smi(LISTS_TWO)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if twice is None:
        assert device.pick_device("auto") == "cpu"
        return
    with pytest.raises(UserError) as error:
        device.pick_device("auto")
    assert str(error.value).startswith(f"CUDA_VISIBLE_DEVICES={visible}:") and f" {twice} " in str(error.value)
