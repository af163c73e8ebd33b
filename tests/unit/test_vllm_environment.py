"""The environment of vLLM: its memory does not grow with the number of batch sizes that it has seen."""

import subprocess
import sys

import pytest

# The engine multiplies weights in oneDNN, which compiles a kernel for every number of tokens in a batch.
GROWTH = """
from pathlib import Path
from dynamicrag.llm.vllm_environment import prepare_vllm
prepare_vllm()
import torch
import vllm._custom_ops as ops
torch.set_num_threads(1)
torch.ops._C.create_onednn_mm_handler  # the operators are loaded
layer = ops.create_onednn_mm(torch.randn(64, 64).t(), 32)

def used():
    return next(int(line.split()[1]) for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line.startswith("Anonymous")) / 1024

seen = []
for tokens in range(1, 901):
    ops.onednn_mm(layer, torch.zeros(tokens, 64), None)
    if tokens % 300 == 0:
        seen.append(used())
print(seen[1] - seen[0], seen[2] - seen[1])
"""


@pytest.mark.slow
def test_kernels_of_new_batch_sizes_replace_old_ones():
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    growth = [float(number) for number in done.stdout.split()[-2:]]
    assert max(growth) < 40, f"{growth} MB for 300 more batch sizes; 300 kernels have about 150 MB"
