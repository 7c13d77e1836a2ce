"""What training minimises. Every loss is the mean over rows (and tokens, heads, units), computed in float32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from onnxsqueeze.tasks.rows import UNLABELLED


def task(logits: Tensor, labels: Tensor, *, regression: bool) -> Tensor:
    """Cross entropy of ``logits[batch, classes]`` with class indices, or the squared error of ``logits[batch, 1]`` against scores.

    Rows without a label (`UNLABELLED`) have no part in it; it is 0 where none has one.
    """
    there = labels != UNLABELLED
    if not there.any():
        return logits.float().sum() * 0.0
    if regression:
        return functional.mse_loss(logits.float()[there, 0], labels.float()[there])
    return functional.cross_entropy(logits.float(), labels.long(), ignore_index=UNLABELLED)


def logits(student: Tensor, teacher: Tensor, *, temperature: float, regression: bool) -> Tensor:
    """T² · KL(teacher ‖ student) of the softened classes; for regression the squared difference.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2 (also for T², which keeps the
    gradient's size as T changes).
    """
    if regression:
        return functional.mse_loss(student.float(), teacher.float())
    soft = functional.log_softmax(teacher.float() / temperature, dim=-1)
    own = functional.log_softmax(student.float() / temperature, dim=-1)
    return functional.kl_div(own, soft, reduction="batchmean", log_target=True) * temperature**2


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - the cosine of student's and teacher's vector of a text, ``[batch, width]`` each.

    Source: Reimers and Gurevych 2020, "Making Monolingual Sentence Embeddings Multilingual", section 2, where it is the squared
    difference: of vectors of length 1 twice this.
    """
    return (1 - functional.cosine_similarity(student.float(), teacher.float(), dim=1)).mean()


def similarities(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of the cosines between the texts of a batch, each with each other; the widths ``[batch, width]`` may differ. 0 for one text.

    Source: Tung and Mori 2019, "Similarity-Preserving Knowledge Distillation", equation 4, over cosines.
    """
    if len(student) < 2:
        return student.float().sum() * 0.0
    own, known = (functional.normalize(vectors.float(), dim=1) for vectors in (student, teacher))
    others = ~torch.eye(len(own), dtype=torch.bool, device=own.device)
    return ((own @ own.T - known @ known.T).square())[others].mean()


def hidden(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference of two layers' outputs ``[batch, tokens, width]`` over the tokens where ``mask[batch, tokens]`` is 1.

    Source: Jiao et al. 2020, "TinyBERT", equation 8.
    """
    difference = (student.float() - teacher.float()).square().mean(-1)
    weight = mask.to(difference.dtype)
    return (difference * weight).sum() / weight.sum()


def attention(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """KL(teacher ‖ student) of attention probabilities ``[batch, heads, queries, keys]``, mean over heads and real queries.

    Source: Wang et al. 2020, "MiniLM", equation 6, here for every mapped layer as in Jiao et al. 2020, "TinyBERT", equation 7
    (which compares scores before the softmax, which the models do not return).
    """
    target = teacher.float()
    # 1e-9 is below what float32 softmax gives to a key that matters; masked keys have probability 0 on both sides
    divergence = (target * (target.clamp_min(1e-9).log() - student.float().clamp_min(1e-9).log())).sum(-1)  # [batch, heads, queries]
    weight = mask[:, None, :].to(divergence.dtype).expand_as(divergence)
    return (divergence * weight).sum() / weight.sum()


def relations(student: Tensor, teacher: Tensor, mask: Tensor, heads: int) -> Tensor:
    """KL(teacher ‖ student) of how the tokens relate, ``softmax(x xᵀ / √width)`` per head, mean over heads and real queries.

    ``student`` and ``teacher`` are one layer's queries, keys or values ``[batch, tokens, width]``, each width split into ``heads``; the widths may differ.
    Source: Wang et al. 2021, "MiniLMv2", equations 4 to 6 (scaled products of like with like, relation heads).
    """
    keys = mask[:, None, None, :] == 0

    def logs(states: Tensor) -> Tensor:
        batch, tokens, width = states.shape
        parts = states.float().view(batch, tokens, heads, width // heads).transpose(1, 2)
        scores = parts @ parts.transpose(2, 3) / (width // heads) ** 0.5
        return functional.log_softmax(scores.masked_fill(keys, torch.finfo(scores.dtype).min), dim=-1)

    target = logs(teacher)
    divergence = (target.exp() * (target - logs(student))).sum(-1)  # [batch, heads, queries]
    weight = mask[:, None, :].to(divergence.dtype).expand_as(divergence)
    return (divergence * weight).sum() / weight.sum()


class Projections(torch.nn.Module):
    """One learned linear map per pair of hidden states, from the student's width to the teacher's; dropped after training.

    Source: Jiao et al. 2020, "TinyBERT", equation 8 (W_h; they share one map, we give each layer its own).
    """

    def __init__(self, pairs: int, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.maps = torch.nn.ModuleList(torch.nn.Linear(student_width, teacher_width, bias=False) for _ in range(pairs))

    def forward(self, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Each state in the teacher's width."""
        return tuple(project(state) for project, state in zip(self.maps, states, strict=True))
