"""What the monitor accepts as model, optimizers and regexes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import nn


def checked_input(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None,
    **patterns: str | None,  # argument -> regex
) -> list[torch.optim.Optimizer]:
    """The optimizers as a list. TypeError for a model or optimizer of another kind, ValueError for no regex."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a torch.nn.Module, got {type(model).__name__}")
    many = list(optimizer) if isinstance(optimizer, Iterable) else [] if optimizer is None else [optimizer]
    for each in many:
        if not isinstance(each, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer is a torch.optim.Optimizer, several or None, got {type(optimizer).__name__} with "
                f"{type(each).__name__}"
            )
    for name, pattern in patterns.items():
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"{name}={pattern!r} is no regular expression: {error}") from None
    return many
