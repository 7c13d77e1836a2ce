"""A profile, summed up: by hand, and of a real session."""

from __future__ import annotations

from onnxsqueeze.backends import NodeTime
from onnxsqueeze.measure.proof import proof

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def test_times_are_means_a_run_and_operators_are_counted_once_a_node() -> None:
    nodes = [NodeTime("a", "MatMul", CPU, 3000.0), NodeTime("b", "MatMul", CPU, 1000.0), NodeTime("c", "Softmax", CPU, 500.0)]
    found = proof(nodes, 10, {"MatMul": 2, "Softmax": 1})
    assert found.total_ms == 0.45
    assert [(one.operator, one.nodes, one.ms) for one in found.operators] == [("MatMul", 2, 0.4), ("Softmax", 1, 0.05)]
    assert (found.nodes_per_provider, found.fusions, found.memcpy_nodes) == ({CPU: 3}, {}, 0)


def test_what_the_session_made_and_what_it_copies_between_devices_is_told_apart() -> None:
    nodes = [
        NodeTime("a", "FusedMatMul", CUDA, 30.0),
        NodeTime("b", "FusedMatMul", CUDA, 10.0),
        NodeTime("c", "Gather", CPU, 5.0),
        NodeTime("d", "MemcpyFromHost", CUDA, 5.0),
        NodeTime("e", "MemcpyToHost", CUDA, 5.0),
    ]
    found = proof(nodes, 1, {"MatMul": 2, "FusedMatMul": 1, "Gather": 1})
    assert found.fusions == {"FusedMatMul": 1}
    assert found.memcpy_nodes == 2
    assert found.nodes_per_provider == {CUDA: 4, CPU: 1}
