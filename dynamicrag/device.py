"""Where a model runs and in which precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamicrag.stage import log

if TYPE_CHECKING:
    import torch

DEVICES = "auto, cpu, cuda, cuda:1, ..."
DTYPES = ("auto", "float32", "bfloat16")


def pick_device(name: str) -> str:
    """The device to run on; `auto` is a GPU where there is one. Without one, `cuda` is the CPU, with a warning."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        log.warning("--device %s: no GPU here; running on the CPU", name)
        return "cpu"
    return name


def devices_of(device: str) -> tuple[str, ...]:
    """All GPUs of the machine for `cuda`; otherwise the one named, or the CPU."""
    import torch

    return tuple(f"cuda:{number}" for number in range(torch.cuda.device_count())) if device == "cuda" else (device,)


def pick_dtype(name: str, device: str) -> torch.dtype:
    """float32 or bfloat16; `auto` is bfloat16 where the hardware multiplies in it (elsewhere it is emulated, slowly)."""
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
