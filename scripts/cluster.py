"""The Ray cluster that scripts/launch.py uses: the connection, and the nodes that can run a part."""

import os
import signal
import socket
import sys
from dataclasses import dataclass

from dynamicrag.stage import UserError


def connect(local_gpus: int):
    """Return the module ray, connected to RAY_ADDRESS or to a Ray that is started here. Raises UserError if it cannot be reached."""
    try:
        import ray
    except ImportError:
        raise UserError(f"LAUNCHER=ray: the package ray is not installed; install it with: {sys.executable} -m pip install 'ray>=2.60'") from None
    address = os.environ.get("RAY_ADDRESS")
    here = "give HOST:PORT of the head of a running cluster, to which this machine belongs (ray start --address=HOST:PORT)"
    if address and address != "auto":
        try:
            reach(address)
        except (OSError, ValueError) as error:
            raise UserError(f"RAY_ADDRESS={address}: cannot be reached ({error}); {here}") from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    handler = signal.getsignal(signal.SIGTERM)
    more = {} if address else {"num_gpus": local_gpus, "include_dashboard": False}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level="error", **more)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"RAY_ADDRESS={address}: {error}; {here}") from None
    signal.signal(signal.SIGTERM, handler)
    return ray


def reach(address: str) -> None:
    """Raise OSError if nothing listens at HOST:PORT, and ValueError if the address has another form."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), timeout=5).close()


@dataclass
class Node:
    id: str
    name: str
    places: int  # parts at a time
    needs: dict[str, float]  # of a part


def usable_nodes(ray, gpus: int, without_gpu: bool = True) -> list[Node]:
    """Return the nodes that can run a part on `gpus` GPUs. If no node has a GPU, a part takes all CPUs of a node.

    Raises UserError if there is no such node.
    """
    alive = [(node, node["Resources"]) for node in ray.nodes() if node["Alive"]]
    most = max((int(resources.get("GPU", 0)) for _, resources in alive), default=0)
    if most or gpus > 1 or not without_gpu:
        found = [(node, int(resources.get("GPU", 0)) // gpus) for node, resources in alive]
        needs = {"num_gpus": gpus, "num_cpus": 0}
    else:
        found = [(node, int(resources.get("CPU", 0) > 0)) for node, resources in alive]
        needs = {"num_cpus": min((resources["CPU"] for _, resources in alive if resources.get("CPU")), default=1)}
    usable = [Node(node["NodeID"], f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})", places, needs) for node, places in found if places]
    if not usable:
        raise UserError(f"GPUS_PER_SHARD={gpus}: no node of the cluster has as many GPUs, and the largest has {most}; set a lower number, or add a node")
    return usable


def outcome(ray, ref) -> tuple[int, str, str]:
    """Return the exit status of a part that has ended, why it ended, and its node, or "" if that has died."""
    try:
        status, _, node = ray.get(ref)
    except ray.exceptions.RayError as error:  # its node or its worker has died
        return 1, type(error).__name__, ""
    return status, f"exit status {status}", node
