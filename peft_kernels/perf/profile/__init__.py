"""``peft-kernels profile``: a model of transformers end to end, stock and with a method's kernels swapped in.

Each method has a module (``pid``, ``dept``, ``pasta``, ``dect``, ``ytuning``) that yields its candidates as
``Measurement``s at a point of a sweep; ``run`` measures them, ``operator_times`` profiles one run, ``show`` and
``plot`` present the results.
"""
