#!/usr/bin/env python
"""Let the machines of one training meet before it begins: all are there, all do the same, all continue from the same checkpoint.

scripts/training.sh starts it on every machine before torchrun, with the arguments of the trainer:
    python scripts/meet.py --node 1 --nodes 2 --address node0 --port 29500 --seconds 600 --folder DynamicRAG_llama3_8b/sft RECIPE KEY=VALUE...

Reads:  the names of the checkpoints of --folder
Writes: the checkpoint to continue from to stdout, or an empty line

Machine 0 listens at its port, on which torchrun listens later, until it has a connection to each of the others. A machine that comes
back early finds torchrun there, which is still at the training before. It tries again until machine 0 listens again. torchrun alone
would let it join the training that is about to end. Machine 0 names the checkpoint, because on NFS another machine may see the list
of files of a minute ago, and processes that load different checkpoints would train a wrong model. The exit status is 2 if a machine is
missing after --seconds, or differs.
"""

import argparse
import importlib.metadata
import json
import re
import selectors
import socket
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "llamafactory")
LONGEST = 1 << 20  # bytes of a message
# A new file is visible on all machines within this many seconds: NFS keeps the attributes of a folder for up to one minute.
SEEN_WITHIN = 120


def refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def last_checkpoint(folder: Path) -> str:
    """Return the checkpoint of the highest step, or ""."""
    numbers = [int(name[1]) for path in folder.glob("checkpoint-*") if (name := re.fullmatch(r"checkpoint-(\d+)", path.name))]
    return str(folder / f"checkpoint-{max(numbers)}") if numbers else ""


def differing(told: dict[int, dict[str, Any]]) -> str:
    """Return an error about the first machine that differs from machine 0, or ""."""
    for node in sorted(told):
        for key in ("arguments", "versions"):
            here, there = ([word for word in one if word not in other] for one, other in ((told[0][key], told[node][key]), (told[node][key], told[0][key])))
            if here or there:
                return (f"NODE_RANK={node}: its {key} have {' '.join(there) or 'nothing'}, and those of NODE_RANK=0 {' '.join(here) or 'nothing'}, instead; "
                        "use the same settings, GPUs and environment on all machines")
    return ""


def message(connection: socket.socket) -> dict[str, Any] | None:
    """Return the line that the other side sends, or None if it closes the connection or sends something else."""
    received = b""
    while not received.endswith(b"\n"):
        try:
            more = connection.recv(LONGEST)
        except OSError:
            return None
        received += more
        if not more or len(received) > LONGEST or not received.startswith(b"{"):
            return None
    try:
        return json.loads(received)
    except ValueError:
        return None


def send(connection: socket.socket, value: dict[str, Any]) -> None:
    connection.sendall(json.dumps(value).encode() + b"\n")


def listening(port: int, until: float) -> socket.socket:
    """Listen at a port. Waits while another program, such as an earlier training, has it."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    while True:
        try:
            return socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=1024)
        except OSError as error:
            if time.monotonic() > until:
                refuse(f"MASTER_PORT={port}: this machine cannot listen there ({error.strerror}); give another port")
        time.sleep(1)


def gather(args: argparse.Namespace, own: dict[str, Any], until: float) -> str:
    """Return the checkpoint on machine 0, when all other machines have connected."""
    server = listening(args.port, until)
    waiting = selectors.DefaultSelector()
    waiting.register(server, selectors.EVENT_READ)
    there: dict[int, tuple[socket.socket, dict[str, Any]]] = {}
    while len(there) < args.nodes - 1:
        ready = waiting.select(max(0, until - time.monotonic()))
        if not ready:
            missing = " and ".join(f"NODE_RANK={node}" for node in range(1, args.nodes) if node not in there)
            refuse(f"{missing}: did not come to {args.address}:{args.port} within NODE_SECONDS={args.seconds}; start the same script there")
        for key, _ in ready:
            if key.fileobj is server:
                connection, _ = server.accept()
                connection.settimeout(10)
                its = message(connection)
                node = its.get("node") if its else None
                if its and isinstance(node, int) and 0 < node < args.nodes:
                    if node in there:  # it has come back
                        waiting.unregister(there[node][0])
                        there[node][0].close()
                    there[node] = connection, its
                    waiting.register(connection, selectors.EVENT_READ, node)
                else:
                    connection.close()
            else:  # a machine that waits sends nothing: it has ended
                waiting.unregister(key.fileobj)
                there.pop(key.data)[0].close()
    waiting.close()
    server.close()  # before the answers, after which the others look for torchrun at this port
    answer = {"error": differing({0: own, **{node: its for node, (_, its) in there.items()}}), "checkpoint": last_checkpoint(args.folder)}
    for connection, _ in there.values():
        send(connection, answer)
        connection.close()
    if answer["error"]:
        refuse(answer["error"])
    return answer["checkpoint"]


def come(args: argparse.Namespace, own: dict[str, Any], until: float) -> str:
    """Return the checkpoint on another machine, as machine 0 names it, when it is visible here."""
    answer = None
    while answer is None:
        try:
            with socket.create_connection((args.address, args.port), timeout=10) as connection:
                send(connection, own)
                connection.settimeout(max(1, until - time.monotonic()))
                answer = message(connection)
            reason = "another program answers there"
        except OSError as error:
            reason = error.strerror or str(error)
        if answer is None and time.monotonic() > until:
            refuse(f"{args.address}:{args.port}: the machines did not meet there within NODE_SECONDS={args.seconds} ({reason}); start the same script "
                   "on all machines, and check MASTER_ADDR, MASTER_PORT and the firewall")
        if answer is None:
            time.sleep(1)
    if answer["error"]:
        refuse(answer["error"])
    visible_until = time.monotonic() + SEEN_WITHIN
    while answer["checkpoint"] and not Path(answer["checkpoint"], "trainer_state.json").exists():
        if time.monotonic() > visible_until:
            refuse(f"{answer['checkpoint']}: is not on this machine, but on the one with NODE_RANK=0; use a file system that all machines share")
        time.sleep(1)
    return answer["checkpoint"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--node", "--nodes", "--port", "--seconds"):
        parser.add_argument(flag, type=int, required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            pass
    own = {"node": args.node, "arguments": args.arguments, "versions": versions}
    print((come if args.node else gather)(args, own, time.monotonic() + args.seconds))


if __name__ == "__main__":
    main()
