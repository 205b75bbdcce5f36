"""Run a compiled kernel's tasks on as many threads as PyTorch uses.

Numba's own parallel loops abort the process when two Python threads call at once, or do not survive a fork.
The kernels release the GIL instead and run on PyTorch's OpenMP threads or, where those cannot
be used, on a thread pool. The pool belongs to the process: a forked child creates its own.
"""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from lightspine.ops.cpu.openmp import find_openmp

_pools: dict[int, ThreadPoolExecutor] = {}
_forked = False


def _reset_after_fork() -> None:
    # A child inherits the pools of its parent but none of their threads.
    global _forked
    _forked = True
    _pools.clear()


os.register_at_fork(after_in_child=_reset_after_fork)


def thread_source() -> str:
    """Return which threads the kernels run on, for `lightspine doctor`."""
    return "a thread pool" if _forked or find_openmp() is None else "PyTorch's OpenMP threads"


def run_tasks(
    kernel: Callable[..., None], on_openmp: Callable[..., int], tasks: int, threads: int, *arguments: Any
) -> None:
    """Call `kernel(first, last, *arguments)` so that the ranges cover all tasks.

    Args:
        kernel: compiled function that releases the GIL.
        on_openmp: the same kernel wrapped in `openmp.run_on_openmp`.
        tasks: number of tasks.
        threads: number of threads; 1, or PyTorch's.
        *arguments: passed on.

    Raises:
        MemoryError: the kernel could not allocate its scratch memory.
    """
    if threads == 1 or tasks == 1:
        kernel(0, tasks, *arguments)
        return
    openmp = None if _forked else find_openmp()
    if openmp is None:
        _run_on_pool(kernel, tasks, threads, *arguments)
    elif on_openmp(openmp, threads, tasks, *arguments):
        # The kernels raise nothing else.
        raise MemoryError("cannot allocate the scratch memory of the scan")


def _run_on_pool(kernel: Callable[..., None], tasks: int, threads: int, *arguments: Any) -> None:
    threads = min(threads, tasks)
    bounds = [tasks * i // threads for i in range(threads + 1)]
    pool = _pool(torch.get_num_threads() - 1)
    futures: list[Future[None]] = [
        pool.submit(kernel, bounds[i], bounds[i + 1], *arguments) for i in range(1, threads)
    ]
    kernel(bounds[0], bounds[1], *arguments)
    for future in futures:
        future.result()


def _pool(helpers: int) -> ThreadPoolExecutor:
    pool = _pools.get(helpers)
    if pool is None:
        # Two threads may get here at once: setdefault keeps one pool, the other has no thread yet.
        pool = _pools.setdefault(helpers, ThreadPoolExecutor(helpers, thread_name_prefix="lightspine"))
    return pool
