"""Run a compiled kernel's tasks on as many threads as PyTorch uses.

Numba's own parallel loops abort the process when two Python threads call at once, or cannot live through a
fork. The kernels release the interpreter's lock instead and are called from a plain pool of threads. The pool
belongs to the
process: a forked child makes its own.
"""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

_pools: dict[int, ThreadPoolExecutor] = {}


def _pool(helpers: int) -> ThreadPoolExecutor:
    pool = _pools.get(helpers)
    if pool is None:
        # Two threads may both come here: setdefault keeps one pool, the other has no thread yet.
        pool = _pools.setdefault(helpers, ThreadPoolExecutor(helpers, thread_name_prefix="lightspine"))
    return pool


# A child has the table of its parent but none of its threads.
os.register_at_fork(after_in_child=_pools.clear)


def run_tasks(kernel: Callable[..., None], tasks: int, threads: int, *arguments: Any) -> None:
    """Call `kernel(first, last, *arguments)` so that the ranges cover all tasks, each on a thread of its own.

    The split depends on the number of threads only, never on timing.

    Args:
        kernel: compiled function that releases the interpreter's lock.
        tasks: number of tasks.
        threads: number of threads at most.
        *arguments: passed on.
    """
    threads = min(threads, tasks)
    bounds = [tasks * i // threads for i in range(threads + 1)]
    futures: list[Future[None]] = []
    if threads > 1:
        pool = _pool(torch.get_num_threads() - 1)
        futures = [pool.submit(kernel, bounds[i], bounds[i + 1], *arguments) for i in range(1, threads)]
    kernel(bounds[0], bounds[1], *arguments)
    for future in futures:
        future.result()
