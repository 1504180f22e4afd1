"""The process group of several training workers.

Torch's own rendezvous listens at every address of a machine. Here the first worker listens at the one by which the
cluster knows its node, loopback where that is a single machine. Neither asks for a token: docs/SECURITY.md.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Of this and the other workers of a run of Ray Train, for as long as nothing fails; nothing for one worker alone.

    Where a worker fails Ray Train ends all of them: a group that is torn down while others wait in it may never end.
    """
    from ray.train import get_context

    context = get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    if world == 1:
        yield
        return
    import torch

    places = {
        "RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": context.get_local_rank(),
        "LOCAL_WORLD_SIZE": context.get_local_world_size(), "NODE_RANK": context.get_node_rank(),
    }  # fmt: skip
    os.environ.update({name: str(value) for name, value in places.items()})  # DeepSpeed reads them
    backend = "gloo"
    if device != "cpu":
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
        torch.cuda.set_device(device)
        backend = "nccl"
    torch.distributed.init_process_group(backend, store=_store(rank, world), rank=rank, world_size=world)
    yield
    torch.distributed.destroy_process_group()


def _store(rank: int, world: int) -> Any:
    """Where the workers find each other."""
    import ray
    import torch
    from ray.train.collective import broadcast_from_rank_zero

    listener, own = None, ray.util.get_node_ip_address()
    if rank == 0:
        listener = socket.create_server((own, 0), family=socket.AF_INET6 if ":" in own else socket.AF_INET)
    host, port = broadcast_from_rank_zero((own, listener.getsockname()[1]) if listener else (own, 0))
    handed = listener.detach() if listener else None
    return torch.distributed.TCPStore(host, port, world, rank == 0, master_listen_fd=handed)
