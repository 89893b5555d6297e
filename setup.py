"""Builds peft_kernels/_native.so from csrc/ if there is a C++ compiler, and _native_cuda.so if there is nvcc as well.

Without them the package is pure Python, and its wheel is tagged as such. The build needs no GPU: it compiles CUDA for
every architecture below, against any torch. If a library cannot be built, the reason is written to a text file of the
same name, which `peft-kernels info` prints. PEFT_KERNELS_BUILD=require makes that an error, PEFT_KERNELS_BUILD=skip
builds no library.

The library uses libtorch's stable ABI and no Python API: one file serves every Python version, and every libtorch from
2.11 on. It runs on any CPU of its architecture: the CPU kernels are compiled once per instruction set below, and the
variant is selected when the library is loaded.

With the sanitizers:

    CXXFLAGS="-g -fsanitize=address,undefined" LDFLAGS="-fsanitize=address,undefined" \\
        python setup.py build_ext --inplace
    ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" \\
        pytest tests/ops
"""

import atexit
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"peft_kernels is built by setuptools 77 or newer, this is {setuptools.__version__}: pip install"
        " 'setuptools>=77'"
    )

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, ExecError, OptionError, PlatformError
from setuptools.modified import newer_group

STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden", STABLE_ABI]
if "CXXFLAGS" not in os.environ:
    FLAGS.append("-g0")  # Python's own flags request debug information, which takes up 90% of the file

# Sources without a torch header, compiled with -DCPU_CAPABILITY=<name> and these flags. The compiler may contract a
# multiplication and an addition into one FMA, which rounds once.
KERNELS = sorted(map(str, Path("csrc/cpu").glob("*_kernel.cpp")))
OPERATORS = sorted(map(str, {Path("csrc/schema.cpp"), *Path("csrc/cpu").glob("*.cpp")} - set(map(Path, KERNELS))))
KERNEL_FLAGS = ["-ffp-contract=fast"]
AVX512 = ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"]
X86_CAPABILITIES = {"AVX2": ["-mavx2", "-mfma"], "AVX512": AVX512, "AVX512BF16": [*AVX512, "-mavx512bf16"]}
IS_X86 = platform.machine() in ("x86_64", "AMD64")
CAPABILITIES = {"Default": [], **(X86_CAPABILITIES if IS_X86 else {})}

# The CUDA runtime is linked statically and libtorch_cuda is looked up at run time, so the library also loads where
# neither is installed.
CUDA_SOURCES = sorted(map(str, Path("csrc/cuda").glob("*.cu")))
CUDA_ARCHITECTURES = ("80", "90", "100")  # 80 also serves 86 and 89; newer architectures than the last compile its PTX
NVCC_FLAGS = ["-O3", "-std=c++20", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden,-g0", "-DUSE_CUDA", STABLE_ABI]


def find_nvcc():
    homes = [home for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")) if home]
    folders = [*(f"{home}/bin" for home in homes), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def build_mode() -> str:
    """Returns PEFT_KERNELS_BUILD: "require", "skip", or "", which builds the libraries that this machine can build."""
    value = os.environ.get("PEFT_KERNELS_BUILD", "")
    if value not in ("require", "skip", ""):
        raise OptionError(f"PEFT_KERNELS_BUILD must be require, skip or unset, got {value!r}")
    return value


def last_error(output: str) -> str:
    """Returns the last error line in the output of a compiler or linker."""
    lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith("collect2:")]
    return next((line for line in reversed(lines) if "error:" in line), lines[-1] if lines else "no message")


def run_compiler(command, **options):
    """Runs a compiler and shows its messages; if it fails, the exception quotes the last error message."""
    print(shlex.join(command), flush=True)
    try:
        result = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace", **options)
    except OSError as error:
        raise ExecError(f"{command[0]} does not run: {error.strerror}") from error
    sys.stderr.write(result.stderr)
    if result.returncode:
        raise ExecError(f"{command[0]} failed (exit status {result.returncode}): {last_error(result.stderr)}")
    return result


class BuildNative(build_ext):
    """Builds the libraries; if one cannot be built, no older library of its name stays in the wheel or in place."""

    def get_ext_filename(self, name):
        return os.path.join(*name.split(".")) + ".so"

    def run(self):
        build_mode()
        super().run()
        libraries = [Path(self.build_lib, self.get_ext_filename(extension.name)) for extension in self.extensions]
        if not any(library.exists() for library in libraries):
            self.distribution.ext_modules = None
            self.get_finalized_command("bdist_wheel").root_is_pure = True

    def copy_extensions_to_source(self):
        for extension in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(extension.name))
            in_place = Path(self.get_ext_fullpath(extension.name))
            for suffix in (".so", ".txt"):
                # not overwritten: a running process may have it loaded
                in_place.with_suffix(suffix).unlink(missing_ok=True)
                if built.with_suffix(suffix).exists():
                    shutil.copy2(built.with_suffix(suffix), in_place.with_suffix(suffix))

    def build_extension(self, extension):
        library = Path(self.get_ext_fullpath(extension.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        reason = library.with_suffix(".txt")
        reason.unlink(missing_ok=True)
        try:
            if build_mode() == "skip":
                raise PlatformError("PEFT_KERNELS_BUILD=skip left it out")
            self.build_library(extension, str(library))
        except (BaseError, CCompilerError) as error:
            lacks_nvcc = extension.sources == CUDA_SOURCES and find_nvcc() is None
            if build_mode() == "require" and not lacks_nvcc:
                raise
            library.unlink(missing_ok=True)
            reason.write_text(str(error), encoding="utf-8")
            atexit.register(print, f"\nWARNING: {extension.name} is not built: {error}", file=sys.stderr)

    def build_library(self, extension, library):
        if self.compiler.compiler_type != "unix":
            raise PlatformError("the compiler is neither gcc nor clang")
        try:
            from torch.utils.cpp_extension import include_paths, library_paths
        except ImportError:
            raise PlatformError("there was no torch to build against, as in an isolated build") from None
        if extension.sources == CUDA_SOURCES:
            return self.build_cuda(extension, library, include_paths(), library_paths())
        self.compiler.spawn = self.compiler.call = run_compiler  # setuptools up to 81, and later ones
        kernels = [source for source in extension.sources if source in KERNELS]
        operators = [source for source in extension.sources if source not in KERNELS]
        macros = [("HAVE_X86_KERNELS", None)] if IS_X86 else []
        objects = self.compiler.compile(operators, self.build_temp, macros, include_paths(), extra_postargs=FLAGS)
        for name, flags in CAPABILITIES.items():
            directory = os.path.join(self.build_temp, name)
            objects += self.compiler.compile(
                kernels, directory, [("CPU_CAPABILITY", name)], extra_postargs=[*FLAGS, *KERNEL_FLAGS, *flags]
            )
        self.compiler.link_shared_object(
            objects, library, libraries=["torch_cpu"], library_dirs=library_paths(), target_lang="c++"
        )

    def build_cuda(self, extension, library, include_paths, library_paths):
        nvcc = find_nvcc()
        if nvcc is None:
            raise PlatformError("there was no nvcc in PATH, CUDA_HOME or CUDA_PATH")
        if not self.force and not newer_group([*extension.sources, *extension.depends, __file__], library, "newer"):
            return
        supported = run_compiler([nvcc, "--list-gpu-code"], stdout=subprocess.PIPE).stdout.split()
        architectures = [number for number in CUDA_ARCHITECTURES if f"sm_{number}" in supported]
        codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in architectures]
        codes.append("-gencode=arch=compute_{0},code=compute_{0}".format(architectures[-1]))
        includes, libraries = [f"-I{path}" for path in include_paths], [f"-L{path}" for path in library_paths]
        link = ["-shared", "-cudart=static", *libraries, "-ltorch_cpu", "-ldl", "-o", library]
        run_compiler([nvcc, *NVCC_FLAGS, *codes, *includes, *extension.sources, *link])


class AnyPythonWheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension(
                "peft_kernels._native",
                sources=[*OPERATORS, *KERNELS],
                depends=[str(header) for header in Path("csrc").rglob("*.h")],
            ),
            Extension(
                "peft_kernels._native_cuda",
                sources=CUDA_SOURCES,
                depends=[str(header) for header in Path("csrc/cuda").glob("*.cuh")],
            ),
        ],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel},
    )
