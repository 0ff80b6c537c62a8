"""Builds the C++ kernels once per instruction set, and adds the recipes to the package.

Everything else is in pyproject.toml. The kernels are plain C functions that torch's headers know
nothing of, so this takes seconds and the result does not depend on torch's version. Without a
compiler the package installs all the same and runs on plain torch.
"""

import os
import platform
import sys
from copy import copy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

SOURCES = Path("kernels/csrc")
RECIPES = Path("configs")
COMMON = ["-O3", "-std=c++17", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
# The intrinsics of GCC 12 start from registers that they leave undefined on purpose.
COMMON.append("-Wno-maybe-uninitialized")
X86 = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"],
    "avx2": ["-mavx2", "-mfma"],
}


class BuildNative(build_ext):
    """Compile the instruction sets side by side, each into a folder of its own.

    They share their sources, so they would overwrite each other's object files.
    """

    def build_extensions(self) -> None:
        """Take a thread per instruction set."""
        self.parallel = self.parallel or os.cpu_count()
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        """Build one library."""
        apart = copy(self)
        apart.build_temp = str(Path(self.build_temp, ext.name))
        super(BuildNative, apart).build_extension(ext)


class WithRecipes(build_py):
    """Copy the recipes into the package, where ``--recipe`` finds them."""

    def run(self) -> None:
        """Leave an editable installation without: it reads those of the checkout."""
        super().run()
        if self.editable_mode:
            return
        for path in sorted(RECIPES.rglob("*.yaml")):
            target = Path(self.build_lib, "moezoo", "recipes", path.relative_to(RECIPES))
            self.mkpath(str(target.parent))
            self.copy_file(str(path), str(target))


def libraries() -> list[Extension]:
    """List one library per instruction set that this kind of processor may have."""
    if sys.platform == "win32":
        return []
    flags = {"generic": []}
    if platform.machine().lower() in ("x86_64", "amd64"):
        flags |= X86
    # Apple's compiler has no OpenMP: one thread there.
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    return [
        Extension(
            f"moezoo_kernels._native_{name}",
            sources=sorted(path.as_posix() for path in SOURCES.glob("*.cpp")),
            depends=sorted(path.as_posix() for path in SOURCES.glob("*.h")),
            extra_compile_args=[*COMMON, *openmp, *flags[name]],
            extra_link_args=openmp,
            language="c++",
            optional=True,
        )
        for name in flags
    ]


setup(ext_modules=libraries(), cmdclass={"build_ext": BuildNative, "build_py": WithRecipes})
