"""Run every kernel of every implementation that runs here once, forward and backward, checked against float64: input
for a sanitizer.

compute-sanitizer --tool memcheck python3 scripts/every_kernel.py --device cuda
"""

import argparse
import sys

from peft_kernels.ops import __all__ as NAMES
from peft_kernels.ops.registry import operator
from peft_kernels.perf.bench.runner import TOLERANCE, candidates, cases_of, prepared, truth, worst_error
from peft_kernels.perf.results import OURS, first_line


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operators", nargs="*", choices=[[], *NAMES], metavar="OP", help="without one: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    options = parser.parse_args()
    failures = 0
    for op in (operator(name) for name in options.operators or NAMES):
        for case in cases_of(op, list(op.quick_shapes), list(op.dtypes), [False, True]):
            problem = case.problem(options.device)
            expected = truth(problem, case.backward)
            for name, candidate in candidates(case, problem, options.device).items():
                if not name.startswith(OURS):
                    continue
                try:
                    results = prepared(candidate().compute, problem.leaves, problem.grads, case.backward)()
                    says = f"error {worst_error(results, expected, TOLERANCE.get(case.dtype, 0.0)):.0e}"
                except Exception as error:
                    failures += 1
                    says = f"FAIL {first_line(error)}"
                print(f"{case}, {name}: {says}", flush=True)
    if failures:
        sys.exit(f"{failures} failed")


if __name__ == "__main__":
    main()
