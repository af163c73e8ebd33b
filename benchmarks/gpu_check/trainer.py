"""LLaMA-Factory's command line; at its end it writes the most GPU memory it took, in GiB, into the file that GPU_CHECK_PEAK names."""

import atexit
import os
import sys

sys.path.pop(0)  # this folder: its modules are no part of the trainer


def note_peak() -> None:
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized() and os.environ.get("GPU_CHECK_PEAK"):
        with open(os.environ["GPU_CHECK_PEAK"], "w") as file:
            file.write(f"{torch.cuda.max_memory_allocated() / 2**30:.2f}")


if __name__ == "__main__":
    from llamafactory.cli import main

    atexit.register(note_peak)
    main()
