"""What vLLM needs of its environment: variables, cores and progress bars."""

import io
import os

from dynamicrag.models.device import warn_of_unused_gpus
from dynamicrag.stage import UserError

# vLLM starts its engine as a child process, by default with fork. CUDA cannot start in a forked child if the parent has
# queried a GPU (torch.cuda.is_available() is enough). The query therefore uses NVML, and the child is spawned.
VLLM_ENVIRONMENT = {
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_LOGGING_LEVEL": "ERROR",  # on a CPU, vLLM warns about every weight that it converts
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
}


def bars_are_off() -> bool:
    """Return whether tqdm shows no bars (TQDM_DISABLE=1). vLLM's bar would then divide by a time that is not measured."""
    from tqdm import tqdm

    return tqdm(total=1, file=io.StringIO()).disable


def bind_cores(cores: set[int], ranks: int) -> str:
    """Return the cores of each rank in the form that vLLM's CPU build reads (`0|1`), so that no core is idle.

    By default vLLM leaves one core per rank idle. If there are more ranks than cores, the ranks share all cores.
    """
    ordered = sorted(cores)
    parts = [ordered[rank * len(ordered) // ranks : (rank + 1) * len(ordered) // ranks] for rank in range(ranks)]
    return "|".join(",".join(map(str, part if all(parts) else ordered)) for part in parts)


def prepare_vllm(ranks: int = 1) -> bool:
    """Set the environment variables for `ranks` vLLM processes and import vLLM. Returns True if it runs on the CPU.

    vLLM reports its own platform, because the CPU build may be installed on a machine with a GPU. Raises UserError if
    it has no platform.
    """
    for name, value in VLLM_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm.platforms import current_platform

    if not current_platform.device_type:
        raise UserError("vLLM: this build needs a GPU, and none is available; check nvidia-smi and "
                        "CUDA_VISIBLE_DEVICES, install the CPU build with bash scripts/setup.sh cpu, or give the "
                        "address of a server as --api-base")
    if not current_platform.is_cpu():
        return False
    warn_of_unused_gpus("vLLM's CPU build")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", bind_cores(os.sched_getaffinity(0), ranks))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    # oneDNN compiles a kernel of about 0.5 MB for every number of tokens in a batch and every shape of weights, and keeps 1024 of them.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    return True
