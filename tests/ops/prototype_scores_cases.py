"""Inputs of the operators on prototypes, and their formulas."""

import torch
from torch.nn.functional import cross_entropy, normalize

# texts, features, projected width, classes
CASES = {
    "plain": (6, 20, 16, 3),
    "one of all": (1, 1, 1, 1),
    "one class": (5, 7, 8, 1),
    "odd width": (7, 33, 101, 5),
    "as in the paper": (32, 64, 128, 2),
    "many classes": (40, 24, 32, 150),
    "many texts": (700, 8, 24, 4),
    "no text": (0, 7, 8, 3),
}


def make(case, dtype=torch.float32, device="cpu", seed=0):
    """features, projection, prototypes, radius, scores, labels."""
    texts, width, to, classes = case
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator).to(device, dtype)

    labels = torch.randint(classes, (texts,), generator=generator).to(device)
    return (
        normal(texts, width),
        normal(to, width),
        normal(classes, to) / to**0.5,
        normal(classes),
        normal(texts, classes),
        labels,
    )


def by_hand(features, projection, prototypes, radius, scores=None, *, weight=1.0):
    """The formula, with an (N, C, D) temporary; autograd computes the gradients."""
    away = normalize(features @ projection.mT, dim=1)[:, None] - prototypes
    q = radius - away.norm(dim=2)
    return q if scores is None else q + weight * scores


def loss_by_hand(features, projection, prototypes, radius, scores, labels, *, weight=1.0):
    q = by_hand(features, projection, prototypes, radius, scores, weight=weight)
    return cross_entropy(q, labels) if len(labels) else q.sum()
