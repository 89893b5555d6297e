"""Builds peft_kernels/_native.so from csrc/ where there is a C++ compiler; without one the package is pure Python.

The library is written against libtorch's stable ABI and does not know Python: one file serves every Python version, and every
libtorch from 2.10 on. It runs on any processor of its architecture: the CPU kernels are compiled once per instruction set below
and chosen when the library is loaded.

With the sanitizers:
    CXXFLAGS="-g -fsanitize=address,undefined" LDFLAGS="-fsanitize=address,undefined" python setup.py build_ext --inplace
    ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" pytest tests/ops
"""

import os
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import PlatformError

FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
if "CXXFLAGS" not in os.environ:
    FLAGS.append("-g0")  # Python's own flags ask for debug information, which is nine tenths of the file

# Sources without a torch header, compiled with -DCPU_CAPABILITY=<name> and these flags. Multiplications and additions may
# become one instruction: it rounds once.
KERNELS = ["csrc/cpu/shared_cross_attention_kernel.cpp", "csrc/cpu/shared_cross_attention_backward_kernel.cpp"]
KERNEL_FLAGS = ["-ffp-contract=fast"]
AVX512 = ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"]
X86_CAPABILITIES = {"AVX2": ["-mavx2", "-mfma"], "AVX512": AVX512, "AVX512BF16": [*AVX512, "-mavx512bf16"]}
IS_X86 = platform.machine() in ("x86_64", "AMD64")
CAPABILITIES = {"Default": [], **(X86_CAPABILITIES if IS_X86 else {})}


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
        kernels = [source for source in extension.sources if source in KERNELS]
        operators = [source for source in extension.sources if source not in KERNELS]
        macros = [("HAVE_X86_KERNELS", None)] if IS_X86 else []
        objects = self.compiler.compile(operators, self.build_temp, macros, include_paths(), extra_postargs=FLAGS)
        for name, flags in CAPABILITIES.items():
            directory = os.path.join(self.build_temp, name)
            objects += self.compiler.compile(kernels, directory, [("CPU_CAPABILITY", name)], extra_postargs=[*FLAGS, *KERNEL_FLAGS, *flags])
        library = self.get_ext_fullpath(extension.name)
        self.compiler.link_shared_object(objects, library, libraries=["torch_cpu"], library_dirs=library_paths(), target_lang="c++")


class AnyPythonWheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "peft_kernels._native",
            sources=["csrc/schema.cpp", "csrc/cpu/shared_cross_attention.cpp", *KERNELS],
            depends=[str(header) for header in Path("csrc").rglob("*.h")],
            optional=True,  # a failure is a warning
        )
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel},
)
