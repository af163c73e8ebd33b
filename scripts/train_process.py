#!/usr/bin/env python
"""Train in one of several processes, on one machine or more: LLaMA-Factory's trainer, which ends when it should.

torchrun starts it in the trainer's environment (start_training in scripts/training.sh), once per GPU:
    torchrun --nproc-per-node 2 scripts/train_process.py --seconds 600 RECIPE KEY=VALUE...

Reads:  what `llamafactory-cli train RECIPE KEY=VALUE...` reads
Writes: what it writes

- A process ends if torchrun is killed, which starts it in a session of its own, so that no shell would end it.
- A process ends if another machine has been silent for `--seconds`. A machine that is lost closes no connection, and NCCL and gloo wait
  for `ddp_timeout`, which is years, because the first machine may prepare data for hours.
- A process whose training is finished ends with status 0. DeepSpeed keeps groups of processes, and in one of eight runs with gloo their
  threads abort the interpreter when it frees them ("terminate called without an active exception"). torchrun would then stop the
  others, which may still write the model.
"""

import argparse
import atexit
import ctypes
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from typing import Any

PR_SET_PDEATHSIG = 1
CPU_PRIORITY = 5  # before torch's own rules, which begin at 10


def end_with_parent() -> None:
    """Let the kernel end this process when torchrun dies."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def torchruns_store(seconds: float) -> Any:
    """Return a new connection to torchrun's store, which machine 0 has."""
    from torch.distributed import PrefixStore, TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return PrefixStore("dynamicrag", TCPStore(address, port, is_master=False, timeout=timedelta(seconds=seconds)))


def watch(node: int, nodes: int, seconds: int, ended: threading.Event) -> None:
    """Tell the other machines that this one works, until `ended` is set. End this process if another one has been silent for too long."""
    pause = min(10.0, seconds / 5)
    store = torchruns_store(pause)
    heard = {other: ("", time.monotonic()) for other in range(nodes) if other != node}
    for beat in range(sys.maxsize):
        try:
            store.set(f"beat {node}", "ended" if ended.is_set() else str(beat))
        except RuntimeError:  # the store is gone, and so is machine 0
            pass
        if ended.is_set():
            return
        for other, (before, since) in heard.items():
            try:
                now = store.get(f"beat {other}").decode()
            except RuntimeError:
                now = before
            if now != before or now == "ended":
                heard[other] = now, time.monotonic()
            elif time.monotonic() - since > seconds:
                print(f"error: NODE_RANK={other}: this machine has been silent for NODE_SECONDS={seconds}; see its messages", file=sys.stderr, flush=True)
                os._exit(1)  # the other threads may wait for that machine
        ended.wait(pause)


def main() -> None:
    end_with_parent()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, required=True)
    parser.add_argument("words", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    node, nodes = int(os.environ["GROUP_RANK"]), int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"])
    ended = threading.Event()
    beats = threading.Thread(target=watch, args=(node, nodes, args.seconds, ended), daemon=True)
    if nodes > 1 and int(os.environ["LOCAL_RANK"]) == 0:
        beats.start()
    from llamafactory.train.tuner import run_exp
    from torch.serialization import register_package

    # On a CPU, several processes load the optimizer of a checkpoint to the device cpu:0, which torch.load does not know.
    register_package(CPU_PRIORITY, lambda storage: None, lambda storage, place: storage if place.startswith("cpu:") else None)
    sys.argv = [sys.argv[0], *args.words]
    run_exp()
    ended.set()
    if beats.ident:
        beats.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
