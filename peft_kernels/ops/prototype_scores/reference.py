"""The reference in plain PyTorch, which tests compare with. Any device, float32 or float64."""

import torch
from torch.nn.functional import cross_entropy as torch_cross_entropy

SHORTEST = 1e-12  # a projected row shorter than this counts as 0


def unavailable(device: str, dtype: torch.dtype) -> str | None:
    return None


def forward(projected, prototypes, radius, scores, weight):
    normal, _ = _normalise(projected)
    q = radius - torch.stack([(normal - p).norm(dim=1) for p in prototypes], 1)
    return q if scores is None else q + weight * scores


def backward(grad, projected, prototypes):
    normal, inverse_length = _normalise(projected)
    grad_normal, grads = torch.zeros_like(normal), []
    for p, g in zip(prototypes, grad.mT):
        difference = normal - p
        distance = difference.norm(dim=1)
        grad_p = torch.where(distance > 0, g / distance, 0)[:, None] * difference
        grad_normal -= grad_p
        grads.append(grad_p.sum(0))
    radial = (grad_normal * normal).sum(1, keepdim=True)
    return (grad_normal - radial * normal) * inverse_length, torch.stack(grads)


def cross_entropy(projected, prototypes, radius, scores, weight, labels):
    q = forward(projected, prototypes, radius, scores, weight)
    count = max(len(labels), 1)
    grad = q.softmax(1).scatter_add(1, labels[:, None], q.new_full((len(labels), 1), -1.0)) / count
    grad_projected, _ = backward(grad, projected, prototypes)
    return torch_cross_entropy(q, labels, reduction="sum") / count, grad_projected, grad.sum(0)


def _normalise(projected):
    """Returns rows of length 1, and 1 / length; both are 0 for a row of length 0."""
    length = projected.norm(dim=1, keepdim=True)
    return torch.where(length < SHORTEST, 0, projected / length), torch.where(length < SHORTEST, 0, 1 / length)
