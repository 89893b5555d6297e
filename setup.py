"""Builds peft_kernels/_native.so from csrc/ where there is a C++ compiler, and _native_cuda.so where there is nvcc as well.

Without them the package is pure Python. A GPU is not asked for: CUDA is built for every architecture below, against any torch.

The library is written against libtorch's stable ABI and does not know Python: one file serves every Python version, and every
libtorch from 2.10 on. It runs on any processor of its architecture: the CPU kernels are compiled once per instruction set below
and chosen when the library is loaded.

With the sanitizers:
    CXXFLAGS="-g -fsanitize=address,undefined" LDFLAGS="-fsanitize=address,undefined" python setup.py build_ext --inplace
    ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" pytest tests/ops
"""

import os
import platform
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import PlatformError
from setuptools.modified import newer_group

STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden", STABLE_ABI]
if "CXXFLAGS" not in os.environ:
    FLAGS.append("-g0")  # Python's own flags ask for debug information, which is nine tenths of the file

# Sources without a torch header, compiled with -DCPU_CAPABILITY=<name> and these flags. Multiplications and additions may
# become one instruction: it rounds once.
KERNELS = sorted(map(str, Path("csrc/cpu").glob("*_kernel.cpp")))
OPERATORS = sorted(map(str, {Path("csrc/schema.cpp"), *Path("csrc/cpu").glob("*.cpp")} - set(map(Path, KERNELS))))
KERNEL_FLAGS = ["-ffp-contract=fast"]
AVX512 = ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"]
X86_CAPABILITIES = {"AVX2": ["-mavx2", "-mfma"], "AVX512": AVX512, "AVX512BF16": [*AVX512, "-mavx512bf16"]}
IS_X86 = platform.machine() in ("x86_64", "AMD64")
CAPABILITIES = {"Default": [], **(X86_CAPABILITIES if IS_X86 else {})}

# The CUDA runtime is linked statically and libtorch_cuda looked up at run time, so the library also loads where neither is.
CUDA_SOURCES = sorted(map(str, Path("csrc/cuda").glob("*.cu")))
CUDA_ARCHITECTURES = ("80", "90", "100")  # 80 serves 86 and 89 too; what is newer than the last compiles from its PTX
NVCC_FLAGS = ["-O3", "-std=c++20", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden,-g0", "-DUSE_CUDA", STABLE_ABI]


def find_nvcc():
    homes = [home for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")) if home]
    return shutil.which("nvcc", path=os.pathsep.join([*(f"{home}/bin" for home in homes), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))


class BuildNative(build_ext):
    def get_ext_filename(self, name):
        return os.path.join(*name.split(".")) + ".so"

    def build_extension(self, extension):
        if self.compiler.compiler_type != "unix":
            raise PlatformError("the native kernels need gcc or clang; the package works without them")
        try:
            from torch.utils.cpp_extension import include_paths, library_paths
        except ImportError:
            raise PlatformError("the native kernels need torch at build time (pip install --no-build-isolation)") from None
        if extension.name == "peft_kernels._native_cuda":
            return self.build_cuda(extension, include_paths(), library_paths())
        kernels = [source for source in extension.sources if source in KERNELS]
        operators = [source for source in extension.sources if source not in KERNELS]
        macros = [("HAVE_X86_KERNELS", None)] if IS_X86 else []
        objects = self.compiler.compile(operators, self.build_temp, macros, include_paths(), extra_postargs=FLAGS)
        for name, flags in CAPABILITIES.items():
            directory = os.path.join(self.build_temp, name)
            objects += self.compiler.compile(kernels, directory, [("CPU_CAPABILITY", name)], extra_postargs=[*FLAGS, *KERNEL_FLAGS, *flags])
        library = self.get_ext_fullpath(extension.name)
        self.compiler.link_shared_object(objects, library, libraries=["torch_cpu"], library_dirs=library_paths(), target_lang="c++")

    def build_cuda(self, extension, include_paths, library_paths):
        nvcc = find_nvcc()
        if nvcc is None:
            raise PlatformError("the CUDA kernels need nvcc, in PATH or in CUDA_HOME; the package works without them")
        library = self.get_ext_fullpath(extension.name)
        if not self.force and not newer_group([*extension.sources, *extension.depends, __file__], library, "newer"):
            return
        os.makedirs(os.path.dirname(library), exist_ok=True)
        known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
        architectures = [number for number in CUDA_ARCHITECTURES if f"sm_{number}" in known]
        codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in architectures]
        codes.append("-gencode=arch=compute_{0},code=compute_{0}".format(architectures[-1]))
        includes, libraries = [f"-I{path}" for path in include_paths], [f"-L{path}" for path in library_paths]
        link = ["-shared", "-cudart=static", *libraries, "-ltorch_cpu", "-ldl", "-o", library]
        self.spawn([nvcc, *NVCC_FLAGS, *codes, *includes, *extension.sources, *link])


class AnyPythonWheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "peft_kernels._native",
            sources=[*OPERATORS, *KERNELS],
            depends=[str(header) for header in Path("csrc").rglob("*.h")],
            optional=True,  # a failure is a warning
        ),
        Extension(
            "peft_kernels._native_cuda",
            sources=CUDA_SOURCES,
            depends=[str(header) for header in Path("csrc/cuda").glob("*.cuh")],
            optional=True,
        ),
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel},
)
