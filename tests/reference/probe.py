"""The published linear probe, one feature set at a time, with the ordinary PyTorch parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class SequentialProbe:
    layer: nn.Linear
    accuracy: float
    epoch: int


def train_sequentially(
    features: Tensor,
    labels: Tensor,
    *,
    val_features: Tensor,
    val_labels: Tensor,
    seed: int,
    epochs: int = 20,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
) -> SequentialProbe:
    """Adam, linear warm-up in epoch 1, a tenth of the rate after epoch 10, best epoch kept."""
    torch.manual_seed(seed)
    layer = nn.Linear(features.shape[1], int(labels.max()) + 1)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(layer.parameters(), lr=learning_rate)
    steps = -(-len(features) // batch_size)

    def factor(step: int) -> float:
        if step < steps:
            return (step + 1) / steps
        return 0.1 if step >= 10 * steps else 1.0

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    loss_function = nn.CrossEntropyLoss()
    best = SequentialProbe(layer, -1.0, 0)
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(features), generator=generator)
        for start in range(0, len(features), batch_size):
            index = order[start : start + batch_size]
            loss = loss_function(layer(features[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            hits = int((layer(val_features).argmax(1) == val_labels).sum())
        if hits / len(val_labels) > best.accuracy:
            copy = nn.Linear(features.shape[1], layer.out_features)
            copy.load_state_dict(layer.state_dict())
            best = SequentialProbe(copy, hits / len(val_labels), epoch)
    return best
