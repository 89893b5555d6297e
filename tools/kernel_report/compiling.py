"""Compiling a variant for a GPU that is not present."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from peft_kernels.ops.variant import Variant

from . import binary
from .architectures import ARCHITECTURES

FLOATS = ("scale", "embed_scale", "eps")
DENSE = ("stride_hd", "stride_wd")  # strides of columns


def row_of(variant: Variant) -> dict:
    """The report on the binary, or the error if there is none."""
    function, architecture = variant.function, ARCHITECTURES[variant.architecture]
    constants = {key: value for key, value in variant.options.items() if key in function.arg_names}
    options = {key: value for key, value in variant.options.items() if key not in constants}
    constants |= {arg: None for arg, kind in variant.types.items() if kind is None}
    constants |= {arg: 1 for arg in DENSE if arg in function.arg_names}
    signature, attributes = {}, {}
    for i, arg in enumerate(function.arg_names):
        signature[arg] = "constexpr" if arg in constants else variant.types.get(arg, "fp32" if arg in FLOATS else "i32")
        width = arg == "d" or arg.startswith("stride_")
        if signature[arg].startswith("*") or (width and arg not in constants and arg not in function.do_not_specialize):
            attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    try:
        compiled = triton.compile(
            source, target=GPUTarget(architecture.backend, architecture.arch, architecture.lanes), options=options
        )
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    return binary.of_triton(compiled)
