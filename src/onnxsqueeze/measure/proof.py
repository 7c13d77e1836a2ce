"""What really ran: the runtime's own profile of some calls, summed up."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from onnxsqueeze.backends import NodeTime
from onnxsqueeze.environment import governor
from onnxsqueeze.results import OperatorTime, Proof

_COPIES = ("MemcpyFromHost", "MemcpyToHost")


def proof(nodes: Iterable[NodeTime], runs: int, in_file: Mapping[str, int]) -> Proof:
    """Sum up a profile of ``runs`` calls; ``in_file`` counts the operators of the written file."""
    nodes = list(nodes)
    per_operator: dict[tuple[str, str], list[float]] = defaultdict(list)
    for node in nodes:
        per_operator[node.operator, node.provider].append(node.us)
    operators = [
        OperatorTime(operator=operator, provider=provider, nodes=len(times), ms=sum(times) / 1000 / runs)
        for (operator, provider), times in per_operator.items()
    ]
    ran = Counter(node.operator for node in nodes)
    made = {name: n - in_file.get(name, 0) for name, n in ran.most_common() if n > in_file.get(name, 0) and name not in _COPIES}
    return Proof(
        runs=runs,
        total_ms=sum(node.us for node in nodes) / 1000 / runs,
        nodes_per_provider=dict(Counter(node.provider for node in nodes).most_common()),
        operators=tuple(sorted(operators, key=lambda one: -one.ms)),
        fusions=made,
        memcpy_nodes=sum(ran[name] for name in _COPIES),
        governor=governor(),
    )
