"""Builds the optional C++ extension `fastmon/_C` from csrc/ and says what it left out and why.

The package is complete without it, only slower. Nothing here needs a GPU or imports torch: its headers are found beside
its files. FASTMON_BUILD_EXT=0 skips the extension; CXX names the compiler.
"""

import importlib.util
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020B000000000000"]
FLAGS += ["-Wall", "-Wno-psabi"]
PROBE = "#include <torch/csrc/stable/library.h>\nint main() { return 0; }\n"

found = importlib.util.find_spec("torch")
TORCH = Path(found.origin).parent if found and found.origin else None


def csrc(pattern: str) -> list[str]:
    """Files under csrc/, as setuptools wants them: relative to this one, in a fixed order."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))


def reason_not_to_build() -> str | None:
    """Why the extension cannot be built here, or None."""
    if os.environ.get("FASTMON_BUILD_EXT") == "0":
        return "FASTMON_BUILD_EXT=0"
    if sys.platform == "win32":
        return "its sources are written for gcc and clang"
    if TORCH is None:
        return "torch is not importable here (pip install --no-build-isolation -e . uses the installed one)"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    command = [*compiler, *FLAGS, f"-I{TORCH / 'include'}", "-fsyntax-only", "-xc++", "-"]
    try:
        probe = subprocess.run(command, input=PROBE, capture_output=True, text=True)
    except OSError as error:
        return f"no C++ compiler: {error}"
    refusal = f"the compiler refuses torch's headers: {probe.stderr.strip()[:500]}"
    return refusal if probe.returncode else None


class BuildExtension(build_ext):
    """Compiles the sources side by side."""

    def build_extensions(self) -> None:
        """Let the compiler's threads share the sources."""
        compile_some = self.compiler.compile

        def compile_all(sources: list[str], **options) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return [o for (o,) in pool.map(lambda source: compile_some([source], **options), sources)]

        self.compiler.compile = compile_all
        super().build_extensions()


extension = {
    "depends": csrc("cpu/*.h"),
    "include_dirs": [f"{TORCH}/include", f"{TORCH}/include/torch/csrc/api/include"],
    "library_dirs": [f"{TORCH}/lib"],
    "libraries": ["torch_cpu"],
    "extra_compile_args": FLAGS,
    "language": "c++",
    "py_limited_api": True,
    "optional": True,
}
reason = reason_not_to_build()
if reason:
    print(f"fastmon: C++ extension left out: {reason}", file=sys.stderr)
extensions = [] if reason else [Extension("fastmon._C", [*csrc("*.cpp"), *csrc("cpu/*.cpp")], **extension)]
setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtension})
