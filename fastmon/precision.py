"""Number formats of the arithmetic: what `--precision` may name, where each works, and what it does.

Weights and optimizer state stay fp32; bf16 and fp16 are the formats that autocast gives to matrix products and
attention. fp16 has 5 bits of exponent (least normal number 6e-5), so its loss is scaled (arXiv 1710.03740, section
3.2) by a GradScaler, whose state belongs in the checkpoint; bf16 has fp32's exponent and needs none.
"""

import contextlib
from typing import Any

import torch

from fastmon import device

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # what autocast uses


def pick(wish: str | None, here: torch.device) -> str:
    """Return the wished precision, or bf16 on CUDA sm_80 and newer, else fp32. ValueError where it does not work."""
    if wish == "fp16" and here.type != "cuda":
        raise ValueError(f"--precision fp16 needs a CUDA device, this is {here.type}: take bf16 or fp32")
    return wish or ("bf16" if (device.sm(here) or 0) >= 80 else "fp32")


def autocast(precision: str, here: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return the context for a forward pass."""
    dtype = DTYPES[precision]
    return contextlib.nullcontext() if dtype is None else torch.autocast(here.type, dtype)


def scaler(precision: str, here: torch.device) -> torch.amp.GradScaler:
    """Return the loss scaler; one that does nothing, and passes every call on, unless the precision is fp16."""
    return torch.amp.GradScaler(here.type, enabled=precision == "fp16")
