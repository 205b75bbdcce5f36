"""Run a compiled kernel on PyTorch's own OpenMP threads.

PyTorch's OpenMP threads stay awake for a while after every operator and wait for the next one. A second set
of threads would have to be woken for each scan and would compete with them for the same cores. The kernels
therefore call the function that compilers emit for `#pragma omp parallel`.

GNU's runtime offers that function under a stable name, and so do the other runtimes on Linux. `parallel`
falls back to a thread pool where there is none, and in a forked child, where the threads of the parent do
not exist.
"""

# numba gives an intrinsic its typing context and reads the names of its arguments.
# ruff: noqa: ARG001

import ctypes
import functools
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_BYTES, _I32, _I64 = ir.IntType(8).as_pointer(), ir.IntType(32), ir.IntType(64)
_BODY = ir.FunctionType(ir.VoidType(), [_BYTES])
_ENTER = ir.FunctionType(ir.VoidType(), [_BODY.as_pointer(), _BYTES, _I32, _I32])


@functools.cache
def find_openmp() -> int | None:
    """Return the address of the OpenMP function that starts a parallel region, or `None`."""
    if not torch.backends.openmp.is_available():
        return None
    # Searches the libraries that PyTorch is linked with, not whatever else is loaded.
    entry = getattr(ctypes.CDLL(torch._C.__file__), "GOMP_parallel", None)
    return None if entry is None else ctypes.cast(entry, ctypes.c_void_p).value


@intrinsic
def run_on_openmp(
    typingctx: Any,
    enter: types.Integer,
    threads: types.Integer,
    tasks: types.Integer,
    kernel: types.Dispatcher,
    arguments: types.BaseTuple,
) -> Any:
    """Call `kernel(task, task + 1, *arguments)` for every task, on whichever thread is free.

    Args:
        typingctx: typing context of numba.
        enter: address from `find_openmp`.
        threads: number of threads, including the calling one.
        tasks: number of tasks.
        kernel: compiled function that returns nothing.
        arguments: its arguments after the first two.

    Returns:
        The number of tasks in which the kernel raised.
    """
    kernel_signature = kernel.get_call_type(typingctx, (types.intp, types.intp, *arguments.types), {})

    def codegen(context: Any, builder: Any, sig: Any, args: tuple) -> Any:
        compiled = kernel.dispatcher.get_compile_result(kernel_signature)
        context.add_linking_libs([compiled.library])
        values = args[4]
        # Next task, number of tasks, failures, arguments of the kernel.
        shared_type = ir.LiteralStructType([_I64, _I64, _I64, values.type])
        shared = cgutils.alloca_once(builder, shared_type)
        for i, value in enumerate((ir.Constant(_I64, 0), args[2], ir.Constant(_I64, 0), values)):
            builder.store(value, cgutils.gep_inbounds(builder, shared, 0, i))
        body = ir.Function(builder.module, _BODY, f"{builder.function.name}.body")
        body.linkage = "internal"
        _fill_body(context, body, shared_type, compiled.fndesc, len(arguments.types))
        entry = builder.inttoptr(args[0], _ENTER.as_pointer())
        size = builder.trunc(args[1], _I32)
        builder.call(entry, [body, builder.bitcast(shared, _BYTES), size, ir.Constant(_I32, 0)])
        return builder.load(cgutils.gep_inbounds(builder, shared, 0, 2))

    return types.intp(types.intp, types.intp, types.intp, kernel, arguments), codegen


def _fill_body(context: Any, body: Any, shared_type: Any, kernel: Any, count: int) -> None:
    """Emit the code of every thread: take tasks until none is left."""
    builder = ir.IRBuilder(body.append_basic_block("entry"))
    shared = builder.bitcast(body.args[0], shared_type.as_pointer())
    tasks = builder.load(cgutils.gep_inbounds(builder, shared, 0, 1))
    values = builder.load(cgutils.gep_inbounds(builder, shared, 0, 3))
    arguments = [builder.extract_value(values, i) for i in range(count)]
    function = context.declare_function(builder.module, kernel)
    one = ir.Constant(_I64, 1)
    loop, work, done = (body.append_basic_block(name) for name in ("loop", "work", "done"))
    builder.branch(loop)

    builder.position_at_end(loop)
    task = builder.atomic_rmw("add", cgutils.gep_inbounds(builder, shared, 0, 0), one, "monotonic")
    builder.cbranch(builder.icmp_signed("<", task, tasks), work, done)

    builder.position_at_end(work)
    status, _ = context.call_conv.call_function(
        builder, function, kernel.restype, kernel.argtypes, [task, builder.add(task, one), *arguments]
    )
    failed = builder.zext(status.is_error, _I64)
    builder.atomic_rmw("add", cgutils.gep_inbounds(builder, shared, 0, 2), failed, "monotonic")
    builder.branch(loop)

    builder.position_at_end(done)
    builder.ret_void()
