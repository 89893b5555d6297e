"""The GPUs that kernels are compiled for, the resources of an SM (a CU on AMD), and how many blocks it holds."""

from typing import NamedTuple


class Architecture(NamedTuple):
    """Limits of a streaming multiprocessor (NVIDIA) or a compute unit (AMD), with four schedulers; a warp is a
    wavefront on AMD.
    """

    backend: str
    arch: int | str
    lanes: int  # per warp
    warps: int  # maximum per SM
    blocks: int  # maximum per SM
    registers: int  # of 32 bits, per lane, of a scheduler
    register_granularity: int  # per lane
    shared: int  # bytes per SM
    shared_per_block: int  # maximum bytes per block
    shared_granularity: int
    shared_reserved: int  # bytes per block
    tensor_memory: int = 0  # columns per SM
    scalars: int = 0  # scalar registers per scheduler, if they are allocated


# NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", and the tuning guides of
# Ampere, Hopper and Blackwell: 65536 registers for four schedulers in units of 256 per warp, 1 KiB of shared memory
# reserved for every block. Tensor memory: PTX ISA, "Tensor Memory". sm_80 also serves 8.6 and 8.9, where a block has 99
# KiB: kernels for sm_80 may use no more. AMD: CDNA3 Instruction Set Architecture guide, and LLVM's AMDGPUBaseInfo.cpp,
# whose occupancy for gfx942 this computes: 512 vector registers per lane including the accumulation registers, 800
# scalar registers in units of 16 and 16 for the trap handler, 8 wavefronts per SIMD, 64 KiB of LDS, 16 workgroups of
# several wavefronts.
ARCHITECTURES = {
    "sm_80": Architecture("cuda", 80, 32, 64, 32, 512, 8, 164 << 10, 99 << 10, 128, 1 << 10),
    "sm_90": Architecture("cuda", 90, 32, 64, 32, 512, 8, 228 << 10, 227 << 10, 128, 1 << 10),
    "sm_100": Architecture("cuda", 100, 32, 64, 32, 512, 8, 228 << 10, 227 << 10, 128, 1 << 10, 512),
    "gfx942": Architecture("hip", "gfx942", 64, 32, 16, 512, 8, 64 << 10, 64 << 10, 512, 0, scalars=800),
}
SCHEDULERS = 4
SCALARS_OF_TRAP_HANDLER = 16


def blocks_per_sm(name: str, warps: int, registers: int, scalars: int, shared: int, tensor_memory: int) -> int:
    """The number of blocks of ``warps`` warps that are resident on an SM at once.

    ``registers`` per lane, ``scalars`` per warp, ``shared`` bytes and columns of ``tensor_memory`` per block.
    """
    has = ARCHITECTURES[name]
    resident = min(has.warps // SCHEDULERS, has.registers // _up(max(registers, 1), has.register_granularity))
    if has.scalars:
        resident = min(resident, has.scalars // (_up(scalars, 16) + SCALARS_OF_TRAP_HANDLER))
    by_warps = resident * SCHEDULERS // warps
    needed = _up(shared, has.shared_granularity) + has.shared_reserved
    by_shared = has.shared // needed if needed else has.blocks
    by_tensor_memory = has.tensor_memory // tensor_memory if tensor_memory else has.blocks
    return min(has.blocks, by_warps, by_shared, by_tensor_memory)


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
