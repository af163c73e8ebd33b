"""The device that a model runs on, and its precision."""

from __future__ import annotations

import os
import re
import subprocess
from argparse import ArgumentTypeError
from functools import cache
from itertools import takewhile
from typing import TYPE_CHECKING

from dynamicrag.stage import UserError, log

if TYPE_CHECKING:
    import torch

DEVICES = "auto, cpu, cuda, cuda:1, ..."
DTYPES = ("auto", "float32", "bfloat16")
_GPU = re.compile(r"\d+|(GPU|MIG)-.+")


def device_flag(value: str) -> str:
    """Check the value of a --device flag and return it. Raises ArgumentTypeError."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise ArgumentTypeError(f"{value}: expected auto, cpu, cuda or cuda:N")
    return value


def pick_device(name: str) -> str:
    """Return the device to run on, and log it once. `auto` is a GPU if there is one.

    Without a GPU, `cuda` falls back to the CPU with a warning.
    """
    import torch

    device = name
    if name == "auto" or name.startswith("cuda"):
        if torch.cuda.is_available():
            device = "cuda" if name == "auto" else name
        else:
            device = "cpu"
            if name != "auto":
                log.warning("--device %s: no GPU is available; running on the CPU", name)
            warn_of_unused_gpus(f"torch {torch.__version__}")
    _say(device)
    return device


def device_name(device: str) -> str:
    """Return the name of a device in logs and manifests: `cpu`, or the product name of the GPU."""
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


@cache
def _say(device: str) -> None:
    log.info("running on %s", device if device == "cpu" else f"{device} ({device_name(device)})")


@cache
def warn_of_unused_gpus(who: str) -> None:
    """Log a warning if the machine lists GPUs that `who` cannot use: work on the CPU takes days instead of minutes.

    Raises UserError if CUDA_VISIBLE_DEVICES names a GPU twice: CUDA then hides all GPUs.
    """
    refuse_gpus_named_twice()
    if unused := listed_gpus():
        log.warning("%s: cannot use any of the %d GPUs that nvidia-smi lists, and runs on the CPU. The driver is too old for its CUDA "
                    "version, or this is a CPU build; run bash scripts/setup.sh gpu, which reports what is missing", who, unused)


def refuse_gpus_named_twice() -> None:
    """Raise UserError if CUDA_VISIBLE_DEVICES names a GPU twice. Entries after the first invalid one are ignored."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    named = list(takewhile(_GPU.fullmatch, (entry.strip() for entry in visible.split(","))))
    if twice := next((entry for entry in named if named.count(entry) > 1), None):
        raise UserError(f"CUDA_VISIBLE_DEVICES={visible}: names GPU {twice} twice, so that CUDA uses no GPU; name each "
                        "GPU once")


def listed_gpus() -> int:
    """Return the number of GPUs that nvidia-smi lists; 0 without a driver or if CUDA_VISIBLE_DEVICES hides all of them."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return 0
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return 0 if listed.returncode else sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def devices_of(device: str) -> tuple[str, ...]:
    """Return all GPUs of the machine for `cuda`, otherwise the device itself."""
    import torch

    return tuple(f"cuda:{number}" for number in range(torch.cuda.device_count())) if device == "cuda" else (device,)


def pick_dtype(name: str, device: str) -> torch.dtype:
    """Return the dtype. `auto` is bfloat16 if the hardware supports it (emulation is slow), otherwise float32."""
    import torch

    if name != "auto":
        return getattr(torch, name)
    return torch.bfloat16 if _multiplies_bfloat16(device) else torch.float32


def _multiplies_bfloat16(device: str) -> bool:
    import torch

    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def place(device: str, dtype: str | None = None) -> dict[str, str]:
    """Return the arguments of Output.record(): the device name and, for a --dtype flag, the resolved dtype."""
    picked = pick_device(device)
    return {"device": device_name(picked), **({"dtype": str(pick_dtype(dtype, picked)).removeprefix("torch.")} if dtype else {})}
