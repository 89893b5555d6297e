"""The process of ``revision.py``, run as a script: another revision's package with this revision's ``perf`` and
problems in it.
"""

import importlib.util
import json
import os
import sys
import time
from importlib.abc import MetaPathFinder
from pathlib import Path


def main(tree: str, device: str, threads: str, pause: str):
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps other output out of the answers
    sys.path[0] = tree

    import torch

    torch.set_num_threads(int(threads))
    sys.meta_path.insert(0, OfThisRevision())
    from peft_kernels.perf.measure import clock_of

    clock, function = clock_of(device), None

    def answer(**content):
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    answer(ready=True)
    for line in sys.stdin:
        question = json.loads(line)
        if "run" in question:
            time.sleep(float(pause))
            function()
            answer(seconds=clock(function))
            continue
        function = None  # frees the tensors of the previous case
        try:
            function, error = prepare(device, **question)
            answer(error=error)
        except Exception as error:  # the answer says why this revision cannot be compared
            from peft_kernels.perf.results import first_line

            answer(missing=first_line(error))


class OfThisRevision(MetaPathFinder):
    """Finds ``peft_kernels.perf`` and the operators' problems in this revision.

    Their relative imports find the other revision's operators.
    """

    def __init__(self):
        package = Path(__file__).parents[2]
        self.files = {f"peft_kernels.ops.{name}": package / f"ops/{name}.py" for name in ("problem", "registry")}
        self.files |= {
            f"peft_kernels.ops.{path.parent.name}.problems": path for path in package.glob("ops/*/problems.py")
        }
        self.files["peft_kernels.perf"] = package / "perf/__init__.py"

    def find_spec(self, name, path, target=None):
        return importlib.util.spec_from_file_location(name, self.files[name]) if name in self.files else None


def prepare(device: str, operator: str, shape: dict[str, int], variant: str, dtype: str, backward: bool):
    from peft_kernels import ops
    from peft_kernels.ops import registry
    from peft_kernels.perf.bench.runner import Case, checked, graph_of, truth

    if operator not in ops.__all__:
        raise ValueError("this revision has no operator of that name")
    case = Case(registry.operator(operator), shape, variant, dtype, backward)
    problem = case.problem(device)
    ours = problem.ours("auto")
    function, error = checked(ours, problem, truth(problem, backward), case)
    return graph_of(function, ours, device), error


if __name__ == "__main__":
    main(*sys.argv[1:])
