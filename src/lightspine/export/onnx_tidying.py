"""Take out of an ONNX graph what changes no value."""

from collections.abc import Iterator
from typing import Any

_NEUTRAL = {"Mul": 1.0, "Add": 0.0}


def drop_neutral(graph: Any) -> None:
    """Take out products with ones and sums with zeros: what is left of a norm whose weights lie elsewhere.

    Args:
        graph: an `onnx.GraphProto` with the shapes of its values (`value_info`).
    """
    from onnx import numpy_helper

    constants = {value.name: value for value in graph.initializer}
    shapes = {value.name: _shape(value) for value in (*graph.value_info, *graph.input)}
    # Values that are read by name from outside of these operators stay what they are.
    fixed = {value.name for value in graph.output}
    fixed.update(name for node in graph.node for name in set(_read_by(node)) - set(node.input))
    instead: dict[str, str] = {}
    measured: dict[str, str] = {}
    kept = []
    for node in graph.node:
        if node.op_type == "Shape" and all(a.name == "start" and a.i == 0 for a in node.attribute):
            measured[node.output[0]] = node.input[0]
        if node.op_type == "Reshape" and measured.get(node.input[1]) in shapes:
            shapes[node.output[0]] = shapes[measured[node.input[1]]]
        for index, name in enumerate(node.input):
            node.input[index] = instead.get(name, name)
        for value, name in (node.input, reversed(node.input)) if node.op_type in _NEUTRAL else ():
            if (
                name in constants
                and node.output[0] not in fixed
                and _spreads_over(tuple(constants[name].dims), shapes.get(value))
                and (numpy_helper.to_array(constants[name]) == _NEUTRAL[node.op_type]).all()
            ):
                instead[node.output[0]] = value
                break
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)
    drop_unused(graph)


def drop_unused(graph: Any) -> None:
    """Take out operators and constants whose values nothing reads. ONNX Runtime warns of each of them."""
    # A conversion may leave the operators out of order.
    makers = {name: index for index, node in enumerate(graph.node) for name in node.output}
    needed: set[str] = set()
    waiting = [value.name for value in graph.output]
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            if name in makers:
                waiting.extend(_read_by(graph.node[makers[name]]))
    kept = [node for node in graph.node if needed.intersection(node.output)]
    del graph.node[:]
    graph.node.extend(kept)
    constants = [value for value in graph.initializer if value.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(constants)


def _read_by(node: Any) -> Iterator[str]:
    yield from node.input
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield from (value.name for value in attribute.g.output)
            for inner in attribute.g.node:
                yield from _read_by(inner)


def _shape(value: Any) -> tuple[int | str, ...]:
    axes = value.type.tensor_type.shape.dim
    return tuple(axis.dim_value if axis.HasField("dim_value") else axis.dim_param for axis in axes)


def _spreads_over(constant: tuple[int, ...], shape: tuple[int | str, ...] | None) -> bool:
    """Return whether a constant is broadcast to a shape, and not the shape to the constant's."""
    if shape is None or len(constant) > len(shape):
        return False
    last = shape[len(shape) - len(constant) :]
    return all(length in (1, axis) for length, axis in zip(constant, last, strict=True))
