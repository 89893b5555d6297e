"""The process of ``revision.py``, run as a script: another revision's package with this revision's ``perf`` in it."""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path


def main(tree: str, device: str, threads: str, pause: str):
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing else may write between the answers
    sys.path[0] = tree

    import torch

    torch.set_num_threads(int(threads))
    take_this_perf()
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
        function = None  # frees the tensors of the case before
        try:
            function, error = prepare(device, **question)
            answer(error=error)
        except Exception as error:  # an answer: why this revision has nothing to compare with
            from peft_kernels.perf.results import first_line

            answer(missing=first_line(error))


def take_this_perf():
    """This revision's ``peft_kernels.perf``, whose relative imports find the other revision's operators."""
    import peft_kernels

    folder = Path(__file__).parents[1]
    spec = importlib.util.spec_from_file_location("peft_kernels.perf", folder / "__init__.py", submodule_search_locations=[str(folder)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = peft_kernels.perf = module
    spec.loader.exec_module(module)


def prepare(device: str, operator: str, shape: dict[str, int], variant: str, dtype: str, backward: bool):
    from peft_kernels import ops
    from peft_kernels.perf.bench import problems as cases
    from peft_kernels.perf.bench.runner import Case, checked, truth

    if operator not in ops.__all__:
        raise ValueError("this revision has no operator of that name")
    case = Case(cases.operator(operator), shape, variant, dtype, backward)
    problem = case.problem(device)
    return checked(problem.ours("auto"), problem, truth(problem, backward), case, device)


if __name__ == "__main__":
    main(*sys.argv[1:])
