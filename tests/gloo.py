"""Real processes that talk through gloo, each returning a dictionary of what it got."""

import datetime
import multiprocessing
import os
import warnings

import torch
import torch.distributed as dist

# What the processes are forked from has imported these once for all of them, and has run nothing.
multiprocessing.set_forkserver_preload(["torch", "torchvision", "cgc_reg"])


def run(work, world_size, folder, timeout=datetime.timedelta(minutes=1)):
    """Return what `work(rank)` returns in each process; a process whose partner died gives up after the timeout."""
    start(_process, (work, world_size, folder, timeout), world_size)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]


def start(work, args, processes):
    """Run `work(rank, *args)` in each process; an error of one is raised here, and ends the others."""
    torch.multiprocessing.start_processes(work, args, processes, start_method="forkserver")


def _process(rank, work, world_size, folder, timeout):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # a machine's host name need not resolve
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size, timeout=timeout
    )
    torch.save(work(rank), folder / f"{rank}.pt")
    dist.barrier()
    # Destroying the group holds the interpreter's lock, which gloo's threads may need to let go of the last tensors: a
    # deadlock with torch 2.6. This ends the process without.
    os._exit(0)
