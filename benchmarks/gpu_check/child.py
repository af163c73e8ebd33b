"""Script of the part `fork`: query CUDA here, then use it in a child process started with fork or spawn."""

import multiprocessing
import os
import sys
from pathlib import Path


def use_cuda() -> None:
    import torch

    torch.cuda.set_device(0)
    assert torch.ones(8, device="cuda").sum().item() == 8
    print("child has CUDA", flush=True)


def main() -> None:
    way = sys.argv[1]
    if way.startswith("prepared"):
        sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
        from dynamicrag.llm.vllm_environment import VLLM_ENVIRONMENT

        os.environ.update(VLLM_ENVIRONMENT)
        way = "fork" if way.endswith("fork") else os.environ["VLLM_WORKER_MULTIPROC_METHOD"]
    import torch

    print("is_available", torch.cuda.is_available(), flush=True)
    child = multiprocessing.get_context(way).Process(target=use_cuda)
    child.start()
    child.join(60)
    if child.is_alive():
        child.kill()
        sys.exit("the child did not end")
    sys.exit(child.exitcode)


if __name__ == "__main__":
    main()
