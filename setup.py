"""Builds the optional C++ extension `fastmon/_C` from csrc/ and says what it left out and why.

The package is complete without it, only slower. Nothing here needs a GPU or imports torch: its headers are found beside
its files. FASTMON_BUILD_EXT=0 skips the extension; CXX names the compiler.
"""

import importlib.util
import os
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = ["csrc/registration.cpp", *sorted(f"csrc/cpu/{p.name}" for p in (ROOT / "csrc/cpu").glob("*.cpp"))]
HEADERS = sorted(f"csrc/cpu/{p.name}" for p in (ROOT / "csrc/cpu").glob("*.h"))
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020B000000000000"]
FLAGS += ["-Wall", "-Wno-psabi"]
PROBE = "#include <torch/csrc/stable/library.h>\nint main() { return 0; }\n"


def torch_folder() -> Path | None:
    """Where torch is installed, without importing it."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def reason_not_to_build() -> str | None:
    """Why the extension cannot be built here, or None."""
    if os.environ.get("FASTMON_BUILD_EXT") == "0":
        return "FASTMON_BUILD_EXT=0"
    if sys.platform == "win32":
        return "its sources are written for gcc and clang"
    torch = torch_folder()
    if torch is None:
        return "torch is not importable here (pip install --no-build-isolation -e . uses the installed one)"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(PROBE)
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        command = [*compiler, *FLAGS, f"-I{torch / 'include'}", "-fsyntax-only", str(source)]
        try:
            probe = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            return f"no C++ compiler: {error}"
    return (
        None
        if probe.returncode == 0
        else "the compiler refuses torch's headers: " + probe.stderr.strip()[:500]
    )


class BuildExtension(build_ext):
    """Compiles the sources side by side."""

    def build_extensions(self) -> None:
        """Let the compiler's threads share the sources."""
        compile_some = self.compiler.compile

        def compile_all(sources: list[str], **options) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return [
                    o
                    for objects in pool.map(lambda s: compile_some([s], **options), sources)
                    for o in objects
                ]

        self.compiler.compile = compile_all
        super().build_extensions()


extensions = []
if reason := reason_not_to_build():
    print(f"fastmon: C++ extension left out: {reason}", file=sys.stderr)
else:
    torch = torch_folder()
    extensions.append(
        Extension(
            "fastmon._C",
            SOURCES,
            depends=HEADERS,
            include_dirs=[str(torch / "include"), str(torch / "include/torch/csrc/api/include")],
            library_dirs=[str(torch / "lib")],
            libraries=["torch_cpu"],
            extra_compile_args=FLAGS,
            language="c++",
            py_limited_api=True,
            optional=True,
        )
    )

setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtension})
