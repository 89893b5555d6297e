"""``peft-kernels profile``: a model of transformers end to end, stock and with a method's kernels swapped in.

A module per method says what the two do (``pid``, ``dept``, ``pasta``, ``dect``, ``ytuning``), each as ``Measurement``s at a point of a sweep;
``run`` measures them, ``operators`` looks into one run, ``show`` and ``plot`` tell what came out.
"""
