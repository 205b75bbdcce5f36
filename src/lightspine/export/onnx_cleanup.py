"""Cleanup of exported ONNX models: removes no-ops, unused nodes and the exporter's metadata."""

from typing import Any

_NEUTRAL = {"Mul": 1.0, "Add": 0.0}


def remove_no_ops(model: Any) -> None:
    """Remove multiplications by ones and additions of zeros, the remains of folded normalization layers.

    The rules of onnxscript only recognize scalars, but these constants have one element per channel.

    Args:
        model: an `onnx_ir.Model` with the shapes of its values; modified in place.
    """
    import onnx_ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    graph = model.graph
    for node in graph:
        if node.op_type == "Reshape":
            _copy_shape(node)
        operands = node.inputs if node.op_type in _NEUTRAL else ()
        for value, constant in zip(operands, reversed(operands), strict=True):
            if (
                constant.const_value is not None
                and not node.outputs[0].is_graph_output()
                # Nodes in subgraphs keep the values that they read.
                and all(user.graph is graph for user, _ in node.outputs[0].uses())
                and _broadcasts_to(constant.shape, value.shape)
                and (constant.const_value.numpy() == _NEUTRAL[node.op_type]).all()
            ):
                onnx_ir.convenience.replace_all_uses_with(node.outputs[0], value)
                break
    RemoveUnusedNodesPass()(model)


def to_clean_proto(model: Any) -> Any:
    """Convert an `onnx_ir.Model` to an `onnx.ModelProto` without the exporter's metadata.

    Docstrings and metadata hold paths of this machine, inferred types enlarge the file.
    """
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(model)
    proto = onnx_ir.to_proto(model)
    _clear_inferred_types(proto.graph)
    return proto


def remove_unused(model: Any) -> Any:
    """Remove nodes, constants and opsets that are not used; ONNX Runtime warns about each of them.

    Args:
        model: an `onnx.ModelProto`.

    Returns:
        A new `onnx.ModelProto`, sorted topologically.
    """
    import onnx_ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass, RemoveUnusedOpsetsPass, TopologicalSortPass

    found = onnx_ir.from_proto(model)
    # Conversions leave nodes out of order, and unused nodes are found from the last to the first.
    for cleanup in (TopologicalSortPass(), RemoveUnusedNodesPass(), RemoveUnusedOpsetsPass()):
        cleanup(found)
    return to_clean_proto(found)


def _clear_inferred_types(graph: Any) -> None:
    del graph.value_info[:]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _clear_inferred_types(attribute.g)


def _copy_shape(node: Any) -> None:
    """Infer the output shape of a Reshape to the shape of another value."""
    measure = node.inputs[1].producer()
    if measure is not None and measure.op_type == "Shape":
        attributes = measure.attributes.values()
        if measure.inputs[0].shape is not None and all(
            a.name == "start" and a.value == 0 for a in attributes
        ):
            node.outputs[0].shape = measure.inputs[0].shape


def _broadcasts_to(constant: Any, shape: Any) -> bool:
    """Return whether a constant is broadcast to a shape, and not the shape to that of the constant."""
    if shape is None or len(constant) > len(shape):
        return False
    last = list(shape)[len(shape) - len(constant) :]
    return all(length in (1, axis) for length, axis in zip(constant, last, strict=True))
