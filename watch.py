"""Notices that another process has died, even while this one is blocked: an NCCL kernel goes on waiting.

A thread of each process meets those of all others once a second, over sockets of its own (gloo). When a
process dies, its sockets close, and the meeting fails everywhere at once. A process that is slow, or loads
for an hour, only makes the others' threads wait.
"""
import atexit
import os
import sys
from datetime import timedelta
from threading import Event, Thread

import torch
import torch.distributed as dist

GONE = ("another process has ended or hangs, and this one has stopped waiting; look for its message, then "
        "--resume")
GRACE = 3  # seconds in which this process may end by itself, as after Ctrl-C; rank 0 speaks before the others
leaving = Event()  # this process ends by itself, well or with its own message; set by `stop` and cli.run
_thread = None


def start():
    """Watch the other processes from now on. Every rank must call this. A second call does nothing."""
    global _thread
    if dist.get_world_size() > 1 and not _thread:
        group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        _thread = Thread(target=_watch, args=(group,), daemon=True)
        _thread.start()
        atexit.register(_end)


def stop():
    """Wait until all processes leave, so that none takes another's normal end for its death."""
    leaving.set()
    if _thread:
        _thread.join()


def _end():
    """The end of a script that cli.run does not end. After a traceback it does not wait for the others.

    Python would abort then, because the thread is inside gloo's C++ code.
    """
    if getattr(sys, "last_value", None) is None:
        stop()
    elif _thread.is_alive():
        sys.stdout.flush()
        os._exit(1)


def _watch(group):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    left = torch.zeros(ranks)  # 1 for each rank that leaves; all see the same, so all stop at once
    try:
        while not left.all():
            own = torch.full((ranks,), float(leaving.wait(1)))
            dist.all_to_all_single(left, own, group=group)  # unlike all_gather, waits for each rank itself
    except RuntimeError:
        if not leaving.wait(2 * GRACE if rank else GRACE):
            print(f"error: {GONE}", file=sys.stderr, flush=True)
            os._exit(1)
