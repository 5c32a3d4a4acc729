"""Builds csrc/ into neq_kernels._C: C++ wherever there is a compiler, CUDA where there is nvcc.

NEQ_CUDA=0 leaves CUDA out, NEQ_CUDA=1 insists on it; CXX names the compiler, CXXFLAGS adds to its
flags. Nothing here looks at the hardware: a wheel runs on any machine of its kind.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = [
    "csrc/bindings.cpp",
    "csrc/bindings_similarity.cpp",
    "csrc/bindings_step.cpp",
    "csrc/bindings_wgrad.cpp",
    "csrc/cpu/similarity/row_similarity.cpp",
    "csrc/cpu/step/step.cpp",
    "csrc/cpu/wgrad/conv_wgrad.cpp",
    "csrc/cpu/wgrad/conv_wgrad_avx2.cpp",
    "csrc/cpu/wgrad/conv_wgrad_avx512.cpp",
    "csrc/cpu/wgrad/conv_wgrad_plan.cpp",
    "csrc/cpu/wgrad/conv_wgrad_portable.cpp",
    "csrc/cpu/wgrad/pack.cpp",
    "csrc/cpu/wgrad/zero.cpp",
]
CUDA_SOURCES = [
    "csrc/bindings_cuda.cpp",
    "csrc/cuda/wgrad/conv_wgrad.cu",
    "csrc/cuda/wgrad/pack.cu",
    "csrc/cuda/wgrad/place.cu",
    "csrc/cuda/wgrad/zero.cu",
]
USUAL_CUDA = "/usr/local/cuda"
CUDA_TARGETS = [80, 90, 100]

# without errno, loops with a square root become vectors
CXX_FLAGS = "-std=c++20 -O3 -fno-math-errno -fPIC -fvisibility=hidden -Wall -Wextra".split()
NVCC_FLAGS = "-std=c++20 -O3 -Xcompiler=-fPIC,-fvisibility=hidden,-Wall".split()


def cxx() -> str | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++"]
    return next(filter(None, map(shutil.which, names)), None)


def nvcc() -> str | None:
    wanted = os.environ.get("NEQ_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise ValueError(f"NEQ_CUDA must be 0, 1 or unset, got {wanted!r}")
    found = None if wanted == "0" else shutil.which("nvcc")
    # an nvcc that nothing names may be too old, so it serves only where CUDA is insisted on
    home = os.environ.get("CUDA_HOME") or (USUAL_CUDA if wanted == "1" else "")
    if found is None and home and wanted != "0":
        found = shutil.which("nvcc", path=os.path.join(home, "bin"))
    if found is None and wanted == "1":
        raise FileNotFoundError(f"NEQ_CUDA=1, but nvcc is neither on the PATH nor in {home}/bin")
    return found


def cuda_targets(nvcc: str) -> list[str]:
    """A cubin for each target that this nvcc knows, and the newest one's PTX for later GPUs."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True)
    known = set(map(int, re.findall(r"sm_(\d+)\b", listed.stdout)))
    targets = [t for t in CUDA_TARGETS if t in known]
    if not targets:
        raise RuntimeError(f"{nvcc} knows none of sm_{CUDA_TARGETS}; NEQ_CUDA=0 builds without it")
    codes = [(t, f"sm_{t}") for t in targets] + [(targets[-1], f"compute_{targets[-1]}")]
    return [f"-gencode=arch=compute_{t},code={code}" for t, code in codes]


class Ninja(build_ext):
    """Writes a build.ninja and runs it: parallel, and only what changed."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        root = Path(__file__).resolve().parent
        build = Path(self.build_temp).resolve()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        for directory in (build, target.parent):
            directory.mkdir(parents=True, exist_ok=True)

        compiler, cuda = cxx(), nvcc()
        includes = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
        flags = CXX_FLAGS + includes
        link = [compiler, "-shared"]
        if sys.platform == "darwin":
            link += ["-undefined", "dynamic_lookup"]
        else:
            # torch ships libgomp under its usual name: one thread pool serves both
            flags.append("-fopenmp")
            link.append("-fopenmp")
        extra = shlex.split(os.environ.get("CXXFLAGS", ""))
        flags += extra
        link += extra
        objects = [(source, "cxx") for source in SOURCES]
        nvcc_flags: list[str] = []
        if cuda:
            flags.append("-DNEQ_CUDA")
            nvcc_flags = [*NVCC_FLAGS, *cuda_targets(cuda)]
            objects += [(s, "nvcc" if s.endswith(".cu") else "cxx") for s in CUDA_SOURCES]
            # nvcc knows where its static runtime lies; the host compiler does the work
            link = [cuda, f"-ccbin={compiler}"] + [f"-Xcompiler={f}" for f in link[1:]]

        lines = [
            "ninja_required_version = 1.5",
            "rule cxx",
            f"  command = {shlex.join([compiler, *flags])} -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule nvcc",
            f"  command = {shlex.join([cuda or 'nvcc', f'-ccbin={compiler}', *nvcc_flags])}"
            " -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {shlex.join(link)} $in -o $out",
            *(
                f"build {escape(build / source)}.o: {rule} {escape(root / source)}"
                for source, rule in objects
            ),
            f"build {escape(target)}: link "
            + " ".join(f"{escape(build / source)}.o" for source, _ in objects),
        ]
        (build / "build.ninja").write_text("\n".join(lines) + "\n")
        ninja = shutil.which("ninja")
        command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
        subprocess.run([*command, "-C", str(build)], check=True)


def escape(path: Path) -> str:
    return re.sub(r"([ :$])", r"$\1", str(path))


if cxx() is None:
    if os.environ.get("NEQ_CUDA") == "1":
        raise FileNotFoundError("NEQ_CUDA=1, but there is no C++ compiler: put c++ on the PATH")
    print(
        "neq: no C++ compiler found, so the compiled kernels are left out. Everything works without"
        " them, but slower; `python -m neq doctor` says what is missing.",
        file=sys.stderr,
    )

setup(
    ext_modules=[Extension("neq_kernels._C", [*SOURCES, *CUDA_SOURCES])] if cxx() else [],
    cmdclass={"build_ext": Ninja},
)
