"""Muon: momentum, orthogonalised by Newton-Schulz, for the hidden matrices of a network.

What      B <- mu B + (1 - mu) G;  U = Nesterov look-ahead of B, or B;  O = newton_schulz(U);
          W <- (1 - lr wd) W - lr adjust(shape) O.
Against   torch.optim.Muon: the same arguments, defaults, order of operations and state ("momentum_buffer"), so one
          loads the other's state dict. Beyond it: matrices of one shape go through Newton-Schulz as a batch, stacks
          of matrices (experts) and filters are accepted, fused weights are split, the learning rate may be a tensor
          on the device (no host sync), and the step can report on itself.
Differs   U is normalised exactly whatever its size, so `eps` is checked and stored but has no effect: in torch a
          matrix with |U|_F below eps gets a smaller step, here as large a step as any other. A zero U gives no step.
          The momentum buffer is never normalised in place (torch 2.13 does that to bf16 buffers without Nesterov).
Cost      Memory: one bucket (BUCKET elements) of look-ahead and of results. Time: Newton-Schulz, 20 m^2 n + 10 m^3
          operations a matrix or fewer, plus four passes over parameters, gradients and buffers.
Sources   Keller Jordan's Muon; adjust "match_rms_adamw": Moonshot, arXiv 2502.16982.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, overload

import torch
from torch import Tensor

from fastmon.ops import Polar, newton_schulz
from fastmon.ops.newton_schulz import METHODS, Method
from fastmon.ops.pair_moments import op as pair_op
from fastmon.optim import sharded

COEFFICIENTS = METHODS["ns5"].coefficients[0]
ADJUST = (None, "original", "match_rms_adamw")
BUCKET = {"cpu": 1 << 23, "cuda": 1 << 28}  # elements stepped together: bounds the temporaries
Group = dict[str, Any]


class Muon(torch.optim.Optimizer):
    """Drop-in for torch.optim.Muon, batched by shape; for parameters of 2 or more dimensions.

    params: matrices (m, n), stacks (E, m, n) and filters (out, in, h, w) seen as (out, in h w); iterable, named, or
    groups. A group may hold "split": k for weights that are k matrices stacked by rows (k = 3 for a fused qkv).
    lr: number, or tensor of one element (on the device for capture). weight_decay: decoupled. momentum, nesterov,
    ns_coefficients, eps, ns_steps, adjust_lr_fn ("original": lr sqrt(max(1, m / n)), "match_rms_adamw":
    0.2 lr sqrt(max(m, n)) per matrix): as in torch. method: a named method of `ops.newton_schulz` in place of
    ns_coefficients. Every option may be set per group, and changed between steps.

    Sharded parameters (DTensor) are gathered, orthogonalised by every rank and sliced again.
    Raises ValueError for options out of range and for vectors, TypeError for complex parameters.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        split: int = 1,
        method: str | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "split": split,
            "method": method,
        }
        _check(defaults)
        self._norms = self._spectrum = False
        self._seen: dict[Tensor, dict[str, Tensor]] = {}
        self._pairs: list[tuple[list[Tensor], Tensor, float | Tensor, float | Tensor]] = []
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not hasattr(self, "_pairs"):  # copied or unpickled, not loaded
            self._norms = self._spectrum = False
            self._seen, self._pairs = {}, []
        for group in self.param_groups:  # a state dict of torch.optim.Muon knows no options of ours
            group.setdefault("split", 1)
            group.setdefault("method", None)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters; ValueError where an option or a shape does not fit."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check(group)
            for p in group["params"]:
                _check_parameter(p, group["split"])
        except (TypeError, ValueError):
            del self.param_groups[-1]
            raise

    def observe(self, *, norms: bool = True, spectrum: bool = False) -> None:
        """Choose what the next steps record for `observations`; nothing by default.

        norms: one more read of parameters and results. spectrum: 16 mat-vecs with the first Gram matrix. The weights
        do not depend on either.
        """
        self._norms, self._spectrum = norms, spectrum
        self._seen, self._pairs = {}, []

    def observations(self) -> dict[Tensor, dict[str, Tensor]]:
        """What the last step did to each parameter that had a gradient: 0-d fp32 tensors on the device.

        "update_norm": |change of W|, weight decay included, before rounding to W's dtype. "param_norm": |W| before
        the step. With spectrum: "update_spectral_norm", the largest singular value of U, the matrix that Newton-Schulz
        was given (its result has all of them near 1), and "update_stable_rank" = |U|_F^2 / sigma^2; of several
        matrices in one parameter the largest and the mean. Sharded parameters have no norms here.
        """
        self._add_norms()
        return self._seen

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step for every parameter with a gradient; returns the closure's loss, if a closure is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._seen, self._pairs = {}, []
        for group in self.param_groups:
            for bucket in _buckets(group["params"]):  # one shape each
                self._step(group, bucket)
        return loss

    def _step(self, group: Group, params: list[Tensor]) -> None:
        grads, buffers = [], []
        for p in params:
            assert p.grad is not None
            if p.grad.is_sparse:
                raise ValueError(f"Muon wants dense gradients, got a sparse one of shape {tuple(p.shape)}")
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p.grad, memory_format=torch.preserve_format)
            grads.append(sharded.local(p.grad))
            buffers.append(sharded.local(state["momentum_buffer"]))
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, buffers, group["momentum"]) if group["nesterov"] else buffers
        if sharded.is_sharded(params[0]):
            updates = [sharded.gathered(u, p) for u, p in zip(updates, params, strict=True)]
        pieces = [piece for u in updates for piece in _pieces(u, group["split"])]
        matrices = [piece.flatten(1) if piece.ndim > 3 else piece for piece in pieces]
        factors = self._orthogonalised(group, params, matrices)
        factors = [f.view(piece.shape) for f, piece in zip(factors, pieces, strict=True)]
        ratio = adjustment(group["adjust_lr_fn"], matrices[0].shape)
        if sharded.is_sharded(params[0]):
            split = group["split"]
            wholes = [torch.cat(factors[low : low + split]) for low in range(0, len(factors), split)]
            factors = [sharded.sliced(whole, p) for whole, p in zip(wholes, params, strict=True)]
            weights = [sharded.local(p) for p in params]
        else:
            weights = [piece for p in params for piece in _pieces(p.detach(), group["split"])]
            if self._norms:
                self._record_norms(group, params, weights, factors, ratio)
        _apply(weights, factors, ratio, group["lr"], group["weight_decay"])

    def _orthogonalised(self, group: Group, params: list[Tensor], matrices: list[Tensor]) -> list[Tensor]:
        method: str | Method | None = group["method"]
        if method is None:
            given = tuple(group["ns_coefficients"])
            method = "ns5" if given == COEFFICIENTS else Method((given,), steps=group["ns_steps"])
        polar = newton_schulz(
            matrices,
            method=method,
            steps=group["ns_steps"],
            out_dtype=params[0].dtype,
            return_moments=self._spectrum,  # type: ignore[call-overload]
        )
        if not isinstance(polar, Polar):
            return list(polar)
        each = len(polar.sigma) // len(params)  # a bucket holds parameters of one shape
        top = polar.sigma.view(-1, each).amax(dim=1)
        rank = polar.stable_rank.view(-1, each).mean(dim=1)
        self._note(params, update_spectral_norm=top, update_stable_rank=rank)
        return list(polar.factor)

    def _record_norms(
        self,
        group: Group,
        params: list[Tensor],
        weights: list[Tensor],
        factors: list[Tensor],
        ratio: float,
    ) -> None:
        """Read weights and results once; `observations` makes norms of it."""
        self._pairs.append(
            (params, pair_op(weights, factors), group["lr"] * group["weight_decay"], group["lr"] * ratio)
        )

    def _add_norms(self) -> None:
        """|lr wd w + lr ratio f| from |w|, |f| and their cosine, for all buckets together."""
        if not self._pairs:
            return
        rows = [row for _, row, _, _ in self._pairs]
        weight, cosine = torch.cat([row[4] for row in rows]), torch.cat([row[7] for row in rows])
        decay = torch.cat([row[4] * factor for _, row, factor, _ in self._pairs])
        turn = torch.cat([row[5] * factor for _, row, _, factor in self._pairs])
        change = (decay.square() + turn.square() + 2 * decay * turn * cosine.nan_to_num()).clamp(min=0)
        both = torch.stack([change, weight.square()])  # (2, pieces)
        parts = both.split([row.shape[1] for row in rows], dim=1)
        whole = [
            part.view(2, len(params), -1).sum(dim=2)
            for part, (params, *_) in zip(parts, self._pairs, strict=True)
        ]
        change, weight = torch.cat(whole, dim=1).sqrt().unbind(0)
        self._note([p for params, *_ in self._pairs for p in params], update_norm=change, param_norm=weight)
        self._pairs.clear()

    def _note(self, params: list[Tensor], **values: Tensor) -> None:
        for name, value in values.items():
            for p, scalar in zip(params, value.unbind(0), strict=True):
                self._seen.setdefault(p, {})[name] = scalar


def adjustment(rule: str | None, shape: torch.Size) -> float:
    """The factor on the learning rate for a matrix (..., m, n), by torch.optim.Muon's rules."""
    m, n = shape[-2:]
    return 0.2 * math.sqrt(max(m, n)) if rule == "match_rms_adamw" else math.sqrt(max(1, m / n))


def _apply(
    weights: list[Tensor],
    factors: list[Tensor],  # like weights; may be overwritten
    ratio: float,
    lr: float | Tensor,
    weight_decay: float,
) -> None:
    """W <- (1 - lr wd) W - lr ratio O, in place."""
    if isinstance(lr, Tensor):
        lr = lr.detach().reshape(()).to(weights[0].device, non_blocking=True)
        torch._foreach_mul_(weights, 1 - lr * weight_decay)
        torch._foreach_mul_(factors, -lr * ratio)
        torch._foreach_add_(weights, factors)
        return
    if weight_decay:
        torch._foreach_mul_(weights, 1 - lr * weight_decay)
    torch._foreach_add_(weights, factors, alpha=-(lr * ratio))


def _buckets(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """The parameters with gradients, those of one shape, dtype and device together, at most BUCKET elements a time."""
    alike: dict[tuple[Any, ...], list[Tensor]] = {}
    for p in params:
        if p.grad is not None and p.numel():
            key = (p.shape, p.dtype, p.grad.dtype, p.device, sharded.is_sharded(p))
            alike.setdefault(key, []).append(p)
    for members in alike.values():
        size = max(1, BUCKET.get(members[0].device.type, BUCKET["cuda"]) // members[0].numel())
        for low in range(0, len(members), size):
            yield members[low : low + size]


def _pieces(t: Tensor, split: int) -> list[Tensor]:
    """The views of t, (m, n), (E, m, n) or (out, in, h, w), that are orthogonalised apart: k blocks of rows."""
    return [t] if split == 1 else list(t.chunk(split, dim=1 if t.ndim == 3 else 0))


def _check(options: Group) -> None:
    lr = options["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr as a tensor has one element, got shape {tuple(lr.shape)}")
    for name in ("lr", "momentum", "weight_decay", "eps"):
        if not options[name] >= 0:
            raise ValueError(f"{name} is at least 0, got {options[name]}")
    if options["adjust_lr_fn"] not in ADJUST:
        raise ValueError(f"adjust_lr_fn is 'original' or 'match_rms_adamw', got {options['adjust_lr_fn']!r}")
    if len(options["ns_coefficients"]) != 3:
        raise ValueError(f"ns_coefficients are three numbers (a, b, c), got {options['ns_coefficients']!r}")
    if not isinstance(options["ns_steps"], int) or not 1 <= options["ns_steps"] < 100:
        raise ValueError(f"ns_steps is an integer from 1 to 99, got {options['ns_steps']!r}")
    if options["method"] is not None and options["method"] not in METHODS:
        raise ValueError(f"method is None or one of {', '.join(METHODS)}, got {options['method']!r}")
    if not isinstance(options["split"], int) or options["split"] < 1:
        raise ValueError(f"split is a number of matrices, at least 1, got {options['split']!r}")


def _check_parameter(p: Tensor, split: int) -> None:
    if torch.is_complex(p):
        raise TypeError(f"Muon does not take complex parameters, got {p.dtype} of shape {tuple(p.shape)}")
    if p.ndim < 2:
        raise ValueError(
            f"Muon is for matrices (2 dimensions or more), got a parameter of shape {tuple(p.shape)}"
        )
    rows = p.shape[1 if p.ndim == 3 else 0]
    if rows % split:
        raise ValueError(
            f"split {split} does not divide the {rows} rows of a parameter of shape {tuple(p.shape)}"
        )
