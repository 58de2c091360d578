"""The refusal of networks whose layers penalties cannot see.

Networks that are compiled where a penalty differentiates the loss are refused by `flexure.train`.
"""

from __future__ import annotations

import torch
from torch import nn

from flexure.contracts import FlexureError

__all__ = ["refuse_scripted"]


def refuse_scripted(model: nn.Module, penalty: str) -> None:
    """Refuses a network of which a part was made by torch.jit.

    Args:
        model: the network.
        penalty: who asks, for the message.

    Raises:
        FlexureError: it is one; the message names the part.
    """
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise FlexureError(
                f"expected a network whose layers {penalty} can see, got "
                f"{f'{path} in it' if path else 'one'} made by torch.jit; train the network that "
                f"was traced or scripted"
            )
