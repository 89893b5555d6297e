"""Compile every default config of every kernel for GPUs that are not present, and report on the binaries.

    python -m tools.kernel_report [--only "^sm_90 .* bf16"]    one line of JSON for every Triton kernel
    python -m tools.kernel_report --cuda                       the same for every kernel in the built CUDA library
    python -m tools.kernel_report --check [--cuda]             and its faults and regressions against the table; exit
                                                               status 1 if there are any
    python -m tools.kernel_report --write [--cuda]             the same, into kernels.json and docs/kernels.md

``--write`` keeps for every row the worst of this compiler version and the versions recorded before; delete kernels.json
first to discard them. A kernel that spills or otherwise violates its operator's expectations keeps its old row, and the
exit status is 1.
"""

import argparse
import json
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import cache

# read when kernels are decorated, Triton's own among them: before the first import
os.environ.pop("TRITON_INTERPRET", None)
import triton

from peft_kernels.ops.registry import declared
from peft_kernels.ops.variant import Expected, Variant

from . import binary, check, compiling, page, table


@cache
def triton_variants() -> dict[str, Variant]:
    """Every Triton kernel of every operator, by name."""
    variants = [variant for module in declared("variants").values() for variant in module.variants()]
    named = {variant.name: variant for variant in variants}
    assert len(named) == len(variants), "two variants have the same name"
    return named


def cuda_kernels() -> dict[str, str]:
    """CUDA C++ kernel -> the package of its operator."""
    return {
        kernel: package
        for package, module in declared("variants").items()
        for kernel in getattr(module, "CUDA_KERNELS", ())
    }


def compile_named(name: str) -> tuple[str, dict, Expected]:
    variant = triton_variants()[name]
    return name, compiling.row_of(variant), variant.expected


def triton_rows(only: str, processes: int):
    names = [name for name in triton_variants() if re.search(only, name)]
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(compile_named, names)


def cuda_rows(only: str):
    for architecture, operator, kernel, dtype, constants, row in binary.of_cuda_library(cuda_kernels()):
        configuration = " ".join(map("{}={}".format, "VP", constants)) or "-"
        name = f"{architecture} {operator} {kernel} {dtype} {configuration}"
        scalar = configuration.startswith(("-", "V=1"))
        if re.search(only, name):
            yield name, row, Expected(load=1, widest=8) if scalar else Expected(store=16)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="kernel_report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-j", type=int, default=2, help="processes")
    parser.add_argument("--only", default="", metavar="REGEX", help="on the name")
    parser.add_argument("--cuda", action="store_true", help="the library of CUDA C++")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true")
    action.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.cuda and not binary.LIBRARY.exists():
        parser.error("the CUDA library is not built: there was no nvcc")

    implementation = "cuda" if options.cuda else "triton"
    version = binary.cuda_version() if options.cuda else ".".join(triton.__version__.split(".")[:2])
    rows, problems = {}, {}
    for name, row, expected in cuda_rows(options.only) if options.cuda else triton_rows(options.only, options.j):
        print(json.dumps({name: row}), flush=True)
        rows[name] = row
        problems[name] = check.problems(name, row, expected)
    if not rows:
        parser.error(f"no kernel has a name that matches {options.only!r}")

    wrong = [problem for of_kernel in problems.values() for problem in of_kernel]
    recorded = table.read()
    before = recorded.get(implementation, {})
    if options.check:
        wrong += check.changes(
            rows, {name: row for name, row in before.items() if re.search(options.only, name)}, version
        )
    elif options.write:
        good = {name: None if problems[name] else row for name, row in rows.items()}
        table.write({**recorded, implementation: table.updated(before, good, version, options.only)})
        page.PATH.write_text(page.text(table.read()))
    print("\n".join(wrong), file=sys.stderr, end="\n" if wrong else "")
    return 1 if wrong and (options.check or options.write) else 0


if __name__ == "__main__":
    sys.exit(main())
