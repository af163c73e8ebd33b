"""LLaMA-Factory's command line. At the end it writes the peak GPU memory in GiB to the file named by GPU_CHECK_PEAK."""

import atexit
import os
import sys

sys.path.pop(0)  # this folder, whose modules are not part of the trainer


def note_peak() -> None:
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized() and os.environ.get("GPU_CHECK_PEAK"):
        with open(os.environ["GPU_CHECK_PEAK"], "w") as file:
            file.write(f"{torch.cuda.max_memory_allocated() / 2**30:.2f}")


if __name__ == "__main__":
    from llamafactory.cli import main

    atexit.register(note_peak)
    main()
