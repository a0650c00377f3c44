"""Which implementation of an op runs here, and why not another one.

An `Op` is one contract (schema, reference, fake, traffic, tolerances) and a table of `Impl` rows, best first.
`choose` walks the rows and takes the first that does not refuse; a refusal is a sentence, so `explain` and
`fastmon doctor` can print it. `FASTMON_BACKEND=name` or `with force("name")` asks for one row by name in every op
that has it; where that row refuses, `BackendError` lists every row with its reason instead of running something else.

This is the only file that decides between two implementations.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmon import device as hardware

log = logging.getLogger("fastmon")

HALF = frozenset({torch.bfloat16, torch.float16})
FLOATS = HALF | {torch.float32}

_forced: ContextVar[str | None] = ContextVar("fastmon_backend", default=None)
_library = torch.library.Library("fastmon", "DEF")


class BackendError(RuntimeError):
    """The implementation that was asked for cannot run here; the message lists every row with its reason."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a choice may depend on: facts of the inputs and of the machine, hashable so that choices are cached."""

    device: str  # "cpu", "cuda", "mps"
    dtypes: frozenset[torch.dtype]
    sm: int | None = None  # 90 for sm_90; None where the device is not an NVIDIA GPU
    prepared: bool = False  # the list belongs to a Plan, which may compile up front
    shapes: tuple[tuple[int, ...], ...] = ()  # filled only for ops that look at shapes


@dataclass(frozen=True, slots=True)
class Traffic:
    """The least work an op must do: bytes through memory (each input read once) and floating-point operations."""

    bytes: int
    flops: int


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far an implementation may be from the fp64 truth on the same rounded inputs, and why that far."""

    rtol: float
    atol: float
    why: str


@dataclass(frozen=True)
class Impl:
    """One row: a callable with exactly the schema's positional arguments, and what it needs to run."""

    name: str
    target: Callable[..., Any] | str  # a function, or "package.module:function" imported at first use
    device: str | None = None  # None: any
    dtypes: frozenset[torch.dtype] | None = None  # None: any
    sm: int | None = None  # least compute capability
    needs: str | None = None  # "extension" or "triton"
    compiled: bool = False  # torch.compile(target); only for prepared lists
    fits: Callable[[Facts], str | None] | None = None  # a last word on shapes: a reason to refuse, or None

    def function(self) -> Callable[..., Any]:
        """The callable itself; imports its module at the first call."""
        return resolve(self.target) if isinstance(self.target, str) else self.target

    def refuses(self, facts: Facts) -> str | None:
        """Why this row cannot serve `facts`, or None where it can."""
        interpreted = self.needs == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
        if self.device not in (None, facts.device) and not (interpreted and facts.device == "cpu"):
            return f"for {self.device}, the tensors are on {facts.device}"
        if self.sm is not None and (facts.sm is None or facts.sm < self.sm):
            return (
                f"needs sm_{self.sm}, this device is {f'sm_{facts.sm}' if facts.sm else 'not an NVIDIA GPU'}"
            )
        if self.dtypes is not None and not facts.dtypes <= self.dtypes:
            odd = sorted(str(d).removeprefix("torch.") for d in facts.dtypes - self.dtypes)
            return f"does not take {', '.join(odd)}"
        if self.needs is not None and (missing := _MISSING[self.needs]()) is not None:
            return missing
        if self.compiled and (missing := compiler_missing(facts)) is not None:
            return missing
        return self.fits(facts) if self.fits is not None else None


OPS: dict[str, Op] = {}  # every contract by name; tests, benchmarks and `fastmon doctor` iterate it


@dataclass(eq=False)
class Op:
    """One registered contract `fastmon::<name>` and its implementations, best first.

    Calling the object goes through the dispatcher, so it works under torch.compile(fullgraph=True), fake tensors and
    opcheck. `prepare` binds the row for a list that stays the same, and is where `compile` rows are allowed.
    """

    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    traffic: Callable[..., Traffic]
    tolerance: Mapping[torch.dtype, Tolerance]
    impls: tuple[Impl, ...]
    by_shape: bool = False  # whether a row looks at shapes; they are left out of the facts otherwise
    name: str = field(init=False)

    def __post_init__(self) -> None:
        assert self.impls, f"{self.schema}: an op has at least one implementation"
        self.name = self.schema.split("(", 1)[0]
        OPS[self.name] = self
        _library.define(self.schema)
        _library.impl(self.name, self._dispatch, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastmon::{self.name}", self.fake, lib=_library)
        self.overload = getattr(torch.ops.fastmon, self.name).default
        arguments = self.overload._schema.arguments
        self.mutated = tuple(i for i, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write)

    def __call__(self, *args: Any) -> Any:
        """Run the op on `args`, in the schema's order, by the best row for them."""
        return self.overload(*args)

    def _dispatch(self, *args: Any) -> Any:
        tensors = _tensors(args)
        facts = self.facts(args)
        with hardware.trace(self.name), _setting(tensors[0].device if tensors else _CPU):
            return choose(self, facts).function()(*args)

    def facts(self, args: Sequence[Any], *, prepared: bool = False) -> Facts:
        """The facts that a choice for these arguments depends on."""
        tensors = _tensors(args)
        named = {arg for arg in args if isinstance(arg, torch.dtype)}  # asked for, such as compute_dtype
        kind = tensors[0].device.type if tensors else "cpu"
        shapes = tuple(tuple(t.shape) for t in tensors) if self.by_shape else ()
        sm = hardware.sm(tensors[0].device) if kind == "cuda" else None
        return Facts(kind, frozenset({t.dtype for t in tensors} | named), sm, prepared, shapes)

    def prepare(self, *args: Any) -> Callable[..., Any]:
        """A callable for lists shaped like `args`: the row is chosen, and compiled where it must be, now.

        The arguments are not written: a compile row warms up on copies of those that the schema marks.
        """
        impl = choose(self, self.facts(args, prepared=True))
        function = impl.function()
        if impl.compiled:
            log.warning(
                "compiling fastmon::%s for %d tensors, once: about a second a tensor the first time. The C++ "
                "extension (pip install --no-build-isolation, with a compiler) needs no such wait",
                self.name,
                len(_tensors(args)),
            )
            function = torch.compile(function, fullgraph=True, dynamic=False)
            with torch.no_grad():
                function(*(a.clone() if i in self.mutated else a for i, a in enumerate(args)))
        where = next((t.device for t in _tensors(args)), _CPU)

        def run(*args: Any) -> Any:
            with _setting(where):
                return function(*args)

        return run


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    """The tensors among positional arguments, lists opened."""
    found: list[Tensor] = []
    for arg in args:
        if isinstance(arg, Tensor):
            found.append(arg)
        elif isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], Tensor):
            found.extend(arg)
    return found


_CPU = torch.device("cpu")
_NOTHING = contextlib.nullcontext()


def _setting(where: torch.device) -> contextlib.AbstractContextManager[Any]:
    """What an implementation runs in: the tensors' own GPU as the current one, and autocast off."""
    autocast = torch.is_autocast_enabled(where.type)
    if where.type != "cuda" and not autocast:
        return _NOTHING
    stack = contextlib.ExitStack()
    if where.type == "cuda":
        stack.enter_context(torch.cuda.device(where))
    if autocast:
        stack.enter_context(torch.autocast(where.type, enabled=False))
    return stack


_choices: dict[tuple[str, str | None, Facts], Impl] = {}


def choose(op: Op, facts: Facts) -> Impl:
    """The first row of `op` that accepts `facts`; with a forced name it has, that row or BackendError. Cached."""
    wish = _forced.get() or os.environ.get("FASTMON_BACKEND") or None
    if wish is not None and all(impl.name != wish for impl in op.impls):
        known = {impl.name for other in OPS.values() for impl in other.impls}
        if wish not in known:
            raise BackendError(f"no op has an implementation {wish!r}; there are {', '.join(sorted(known))}")
        wish = None  # other ops have such a row, this one has not
    key = (op.name, wish, facts)
    if key not in _choices:
        rows = explain(op, facts)
        taken = [impl for impl, reason in rows if reason is None and wish in (None, impl.name)]
        if not taken:
            listing = "; ".join(f"{impl.name}: {reason or 'could run'}" for impl, reason in rows)
            raise BackendError(
                f"fastmon::{op.name} has no implementation {wish or ''!r} that can run here. {listing}"
            )
        _choices[key] = taken[0]
        passed = [
            (impl, why) for impl, why in rows[: op.impls.index(taken[0])] if impl.device == facts.device
        ]
        if wish is None and passed:
            why = "; ".join(f"{impl.name}: {reason}" for impl, reason in passed)
            log.info("fastmon::%s uses %s on %s (%s)", op.name, taken[0].name, facts.device, why)
    return _choices[key]


def explain(op: Op, facts: Facts) -> list[tuple[Impl, str | None]]:
    """Every row of `op` with the reason why it refuses `facts`, or None where it would run."""
    return [(impl, impl.refuses(facts)) for impl in op.impls]


@contextlib.contextmanager
def force(name: str) -> Iterator[None]:
    """Within the block every op that has a row `name` uses it, or raises BackendError where that row refuses."""
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


@functools.cache
def extension() -> str | None:
    """Load the compiled extension once. None when it is there, else the reason why it is not."""
    built = sorted(Path(__file__).parent.glob("_C*.so"))
    if not built:
        return "the C++ extension is not built (pip install --no-build-isolation, with a C++ compiler)"
    try:
        torch.ops.load_library(str(built[0]))
    except OSError as error:
        return f"the C++ extension does not load: {error}"
    return None


@functools.cache
def triton_missing() -> str | None:
    """None where triton can be imported, else the reason."""
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def compiler_missing(facts: Facts) -> str | None:
    """Why a compile row cannot serve `facts`, or None."""
    if not facts.prepared:
        return "compiles only prepared lists (Plan.prepare), never inside a step"
    if facts.device == "cuda":
        return triton_missing()
    if (
        facts.device == "cpu"
        and not shutil.which(shlex.split(os.environ.get("CXX", "g++"))[0])
        and not shutil.which("clang++")
    ):
        return "no C++ compiler on this machine"
    return None


_MISSING: dict[str, Callable[[], str | None]] = {
    "extension": lambda: extension(),
    "triton": lambda: triton_missing(),
}


@functools.cache
def resolve(path: str) -> Callable[..., Any]:
    """The function that "package.module:function" names; imports the module at the first call."""
    module, _, name = path.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function
