#!/usr/bin/env python
"""Train in one of several processes, on one machine or more: LLaMA-Factory's trainer, which ends when it should.

torchrun starts it in the trainer's environment (start_training in scripts/training.sh), once per GPU:
    torchrun --nproc-per-node 2 scripts/train_process.py --processes 2 --seconds 600 RECIPE KEY=VALUE...

Reads:  what `llamafactory-cli train RECIPE KEY=VALUE...` reads
Writes: what it writes

The processes talk through torchrun's store, on the port of machine 0.
- Arguments, versions and the number of processes must be the same on all machines. Otherwise all of them end.
- All processes continue from the checkpoint that process 0 finds. On NFS, another machine may see the list of an earlier minute, and
  processes that load different checkpoints would train a wrong model.
- A process ends if torchrun is killed, and if another machine has been silent for `--seconds`. A lost machine closes no connection, so
  that NCCL and gloo would wait for `ddp_timeout`, which is years, because the first machine may prepare data for hours.
"""

import argparse
import ctypes
import importlib.metadata
import json
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from typing import Any

PACKAGES = ("torch", "transformers", "accelerate", "llamafactory")
PR_SET_PDEATHSIG = 1
SEEN_WITHIN = 120  # seconds in which a new folder is visible on all machines: NFS keeps the list of a folder for one minute


def stop(message: str) -> None:
    """End this process at once, although another thread may wait for a machine that is lost."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(2)


def end_with_parent() -> None:
    """Let the kernel end this process when torchrun dies. Its processes are in sessions of their own, which no shell ends."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def store(seconds: int) -> Any:
    """Return a new connection to torchrun's store."""
    from torch.distributed import PrefixStore, TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return PrefixStore("dynamicrag", TCPStore(address, port, is_master=False, timeout=timedelta(seconds=seconds)))


def agree(shared: Any, node: int, nodes: int, own: dict[str, Any]) -> None:
    """Compare `own` with that of every machine. Ends all of them if one differs."""
    if int(os.environ["LOCAL_RANK"]) == 0:
        shared.set(f"node {node}", json.dumps(own))
    first = json.loads(shared.get("node 0"))
    for other in range(1, nodes):
        told = json.loads(shared.get(f"node {other}"))
        for name in (name for name in first if told[name] != first[name]):
            differing = (sorted({*map(str, values)}) for values in zip(*_differing(first[name], told[name]), strict=True))
            stop(f"NODE_RANK={other}: its {name} are not those of NODE_RANK=0: {'; not '.join(map(' '.join, differing))}; "
                 "use the same settings, GPUs and environment on all machines")


def _differing(first: Any, other: Any) -> list[tuple[Any, Any]]:
    """Return the pairs (first's, other's) of unequal items."""
    if not isinstance(first, list):
        return [(first, other)]
    only_first, only_other = [item for item in first if item not in other], [item for item in other if item not in first]
    return [(" ".join(only_first) or "nothing", " ".join(only_other) or "nothing")]


def same_checkpoint(shared: Any, folder: str) -> str | None:
    """Return the last checkpoint of the folder as process 0 sees it. Waits until this process sees it too."""
    from transformers.trainer_utils import get_last_checkpoint

    if int(os.environ["RANK"]) == 0:
        shared.set("checkpoint", (get_last_checkpoint(folder) if os.path.isdir(folder) else None) or "")
    checkpoint = shared.get("checkpoint").decode()
    until = time.monotonic() + SEEN_WITHIN
    while checkpoint and not os.path.isfile(os.path.join(checkpoint, "trainer_state.json")):
        if time.monotonic() > until:
            stop(f"{checkpoint}: does not exist on this machine, but on the machine with NODE_RANK=0; all machines need the same file system")
        time.sleep(1)
    return checkpoint or None


def watch(node: int, nodes: int, seconds: int, ended: threading.Event) -> None:
    """Tell the other machines that this one works, until `ended` is set. End this process if another one has been silent for too long."""
    pause = min(10.0, seconds / 5)
    shared = store(seconds=max(1, int(pause)))
    heard = {other: ("", time.monotonic()) for other in range(nodes) if other != node}
    for beat in range(sys.maxsize):
        try:
            shared.set(f"beat {node}", "ended" if ended.is_set() else str(beat))
        except RuntimeError:  # the store is gone: machine 0 is silent
            pass
        if ended.is_set():
            return
        for other, (before, since) in heard.items():
            try:
                now = shared.get(f"beat {other}").decode()
            except RuntimeError:
                now = before
            if now != before or now == "ended":
                heard[other] = now, time.monotonic()
            elif time.monotonic() - since > seconds:
                stop(f"NODE_RANK={other}: nothing was heard of this machine for {seconds} seconds; see its messages, and run the same command "
                     "again on every machine")
        ended.wait(pause)


def main() -> None:
    end_with_parent()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--seconds", type=int, required=True)
    parser.add_argument("words", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    node, local = int(os.environ["GROUP_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    nodes = args.processes // local
    shared = store(args.seconds)
    if int(os.environ["WORLD_SIZE"]) != args.processes:
        stop(f"NODE_RANK={node}: {args.processes} processes were planned, and {os.environ['WORLD_SIZE']} started; "
             "set TRAIN_GPUS to the same number of GPUs on all machines")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    agree(shared, node, nodes, {"arguments": args.words, "versions": versions})
    output = [word.partition("=")[2] for word in args.words if word.startswith("output_dir=")][-1]
    checkpoint = same_checkpoint(shared, output)
    sys.argv = [sys.argv[0], *args.words, *([f"resume_from_checkpoint={checkpoint}"] if checkpoint else [])]
    ended = threading.Event()
    beats = threading.Thread(target=watch, args=(node, nodes, args.seconds, ended), daemon=True)
    if nodes > 1 and int(os.environ["LOCAL_RANK"]) == 0:
        beats.start()
    from llamafactory.train.tuner import run_exp

    run_exp()
    ended.set()
    if beats.ident:
        beats.join()


if __name__ == "__main__":
    main()
