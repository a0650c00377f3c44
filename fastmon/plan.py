"""Model -> what is measured: parameters, their pieces, roles and groups. Pure, built once, no arithmetic on tensors.

A *piece* is what carries a name in the log: a whole parameter, or the q, k and v of a fused projection, or one expert
of a stack (E, m, n). Roles: "matrix" (hidden weights, at least two dimensions beyond 1), "embedding" (tables, positions
and learned tokens, always whole), "head", "vector".
Only trainable floating parameters are in the plan; a tied weight is there once, under its first name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastmon.ops import OPS

_QKV = re.compile(r"qkv|c_attn|in_proj")
_EMBEDDING = re.compile(
    r"(^|[._])(emb|embed\w*|wte|wpe|tok_emb|pos_emb\w*|position_embeddings?|(cls|mask|register)_tokens?)([._]|$)"
)
_HEAD = re.compile(r"(^|\.)(lm_head|head|classifier|output_projection|unembed\w*)\.")


def _cut(name: str, shape: Sequence[int], module: nn.Module | None) -> tuple[tuple[str, ...], int]:
    """How a parameter falls into pieces: their suffixes and the dimension; () where it stays whole."""
    if isinstance(module, nn.modules.conv._ConvNd) or _is_vector(shape) or _is_embedding(name, module):
        return (), 0
    path = name.split(".")
    fused = any(_QKV.search(part) for part in path[-2:])
    if fused and len(shape) == 2 and shape[0] == 3 * shape[1]:
        return ("q", "k", "v"), 0
    if fused and len(shape) == 2 and shape[1] == 3 * shape[0]:  # a transposed layout, as GPT-2's Conv1D
        return ("q", "k", "v"), 1
    if len(shape) == 3:
        if fused and shape[0] == 3:
            return ("q", "k", "v"), 0
        return tuple(str(i) for i in range(shape[0])), 0
    return (), 0


def split_param(name: str, p: Tensor, module: nn.Module | None = None) -> list[tuple[str, Tensor]]:
    """The pieces of a parameter as (name, view): q, k, v of a fused projection, the experts of a stack, or itself.

    (3d, d) named *qkv*, *c_attn* or *in_proj* -> name.q, name.k, name.v, each (d, d); (E, m, n) -> name.0 ... name.E-1.
    Views, no copies. `module`, its owner, tells the filter of a convolution, which is one matrix, from a stack.
    """
    suffixes, dim = _cut(name, p.shape, module)
    if not suffixes:
        return [(name, p)]
    views = p.unbind(0) if p.ndim == 3 else p.chunk(3, dim=dim)
    return [(f"{name}.{suffix}", view) for suffix, view in zip(suffixes, views, strict=True)]


def role(name: str, p: Tensor, module: nn.Module | None = None) -> str:
    """What a parameter is for: "matrix", "embedding", "head" or "vector"; by its module where given, else by name."""
    if p.ndim >= 2 and _is_embedding(name, module):
        return "embedding"
    if _is_vector(p.shape):
        return "vector"
    return "head" if _HEAD.search(name) else "matrix"


def _is_vector(shape: Sequence[int]) -> bool:
    """At most one dimension is not 1: (d,), (1, d), (1, 1, d), a layer scale (d, 1, 1)."""
    return sum(size != 1 for size in shape) < 2


def _is_embedding(name: str, module: nn.Module | None) -> bool:
    """By its module, or by its name, in which a parameter of a module without others is just `weight`."""
    whole = name.removesuffix(".weight")
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) or bool(_EMBEDDING.search(whole))


@dataclass(frozen=True, slots=True)
class Piece:
    """One named thing in the log: which parameter it belongs to, and what kind of thing it is."""

    name: str
    parameter: int  # index into Plan.parameters
    role: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    logged: bool  # chosen by the regex `params`


class Plan:
    """The trainable parameters of a model and their pieces, in the order of `named_parameters`.

    params: a regex (`re.search`) on piece names; what it does not match is clipped, but not logged.
    ValueError where parameters are on several devices, sharded, or where the regex matches nothing.
    """

    def __init__(self, model: nn.Module, *, params: str | None = None) -> None:
        wanted = re.compile(params or "")
        owners = owners_of(model)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and p.is_floating_point()]
        self.parameters: tuple[nn.Parameter, ...] = tuple(p for _, p in named)
        self.names: tuple[str, ...] = tuple(_plain(n) for n, _ in named)
        devices = {p.device for p in self.parameters}
        if len(devices) > 1:
            raise ValueError(
                f"the parameters are on {len(devices)} devices ({sorted(map(str, devices))}): one is wanted"
            )
        if any(hasattr(p, "device_mesh") for p in self.parameters):
            raise ValueError(
                "the parameters are sharded (DTensor): this version reads replicated parameters only"
            )
        self.device = devices.pop() if devices else torch.device("cpu")
        cuts = [_cut(n, p.shape, owners[p]) for n, p in zip(self.names, self.parameters, strict=True)]
        self._cuts = [(len(suffixes), dim) for suffixes, dim in cuts]
        self._whole = not any(count for count, _ in self._cuts)
        pieces = []
        for index, (name, p) in enumerate(zip(self.names, self.parameters, strict=True)):
            kind = role(name, p, owners[p])
            for part, view in split_param(name, p, owners[p]):
                pieces.append(Piece(part, index, kind, tuple(view.shape), p.dtype, bool(wanted.search(part))))
        self.pieces: tuple[Piece, ...] = tuple(pieces)
        if params is not None and not any(piece.logged for piece in pieces):
            raise ValueError(
                f"params={params!r} matches none of the {len(pieces)} parameters, such as {_some(pieces)}"
            )
        self.groups: dict[tuple[str, tuple[int, ...], torch.dtype], list[int]] = {}
        for slot, piece in enumerate(pieces):
            self.groups.setdefault((piece.role, piece.shape, piece.dtype), []).append(slot)
        self._weights: list[Tensor] = []
        self._pointers: list[int] = []
        self._prepared: dict[tuple[str, str], Prepared] = {}

    def views(self, tensors: Sequence[Tensor], parameters: Sequence[int] | None = None) -> list[Tensor]:
        """The pieces of `tensors`, which have the shapes of all the plan's parameters, or of those at `parameters`."""
        if self._whole:
            return list(tensors)
        cuts = self._cuts if parameters is None else [self._cuts[i] for i in parameters]
        views: list[Tensor] = []
        for tensor, (count, dim) in zip(tensors, cuts, strict=True):
            if not count:
                views.append(tensor)
            elif tensor.ndim == 3:
                views.extend(tensor.unbind(0))
            else:
                views.extend(tensor.chunk(count, dim))
        return views

    def weights(self) -> list[Tensor]:
        """Detached views of all pieces. Built again only when a parameter's memory has moved."""
        pointers = [p.data_ptr() for p in self.parameters]
        if pointers != self._pointers:
            self._weights = self.views([p.detach() for p in self.parameters])
            self._pointers = pointers
        return self._weights

    def logged(self, *roles: str) -> list[int]:
        """Slots of the logged pieces with one of these roles (all roles where none is given)."""
        return [i for i, p in enumerate(self.pieces) if p.logged and (not roles or p.role in roles)]

    def prepare(self, op: str, *args: object) -> Prepared:
        """Bind `op` for lists like `args[0]`: its row is chosen now, and compiled now where it is a compile row.

        Observers that ask for the same op over lists of the same shapes share one.
        """
        key = (op, str([[(t.shape, t.dtype) for t in a] if isinstance(a, list) else a for a in args[:1]]))
        if key not in self._prepared:
            self._prepared[key] = Prepared(op, args)
        return self._prepared[key]


class Prepared:
    """An op bound to one list length: the chosen row for that length, the dispatcher for any other."""

    def __init__(self, op: str, args: Sequence[object]) -> None:
        self._op = OPS[op]
        first = args[0]
        assert isinstance(first, list)
        self._length = len(first)
        self._bound = self._op.prepare(*args) if first else self._op

    def __call__(self, xs: list[Tensor], *rest: object) -> tuple[Tensor, ...]:
        """Run the op; the list length decides between the bound row and an ordinary call."""
        call = self._bound if len(xs) == self._length else self._op
        result = call(xs, *rest)
        return result if isinstance(result, tuple) else (result,)


def owners_of(model: nn.Module) -> dict[nn.Parameter, nn.Module]:
    """Every parameter's module; of a tied one the first, whose name it has."""
    owners: dict[nn.Parameter, nn.Module] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(p, module)
    return owners


def _plain(name: str) -> str:
    """A parameter's name without what wrappers put before it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def _some(pieces: Sequence[Piece]) -> str:
    return ", ".join(piece.name for piece in pieces[:3])
