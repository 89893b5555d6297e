"""Parameters at addresses that are not multiples of 64, as in a loaded file.

Fresh tensors begin at multiples of 64, those of a memory-mapped file at multiples of 4 or 8, and math libraries use a
different path, with a different summation order, for each.
"""

import torch


def seated(tensor: torch.Tensor, past: int) -> torch.Tensor:
    """A copy of ``tensor`` that begins ``past`` bytes after a multiple of 64, or one element after it if that is
    more.
    """
    past = max(past, tensor.element_size())
    room = torch.empty(tensor.nbytes + 64 + past, dtype=torch.uint8)
    first = -room.data_ptr() % 64 + past
    copy = room[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def install(past: int) -> None:
    """From now on ``seated`` places every parameter on a CPU: new, copied, unpickled, or converted to another dtype."""
    new, convert = torch.nn.Parameter.__new__, torch.nn.Module._apply

    def moves(data):
        dense = type(data) in (torch.Tensor, torch.nn.Parameter) and data.layout == torch.strided
        return (
            dense
            and data.device.type == "cpu"
            and data.is_floating_point()
            and data.numel()
            and data.data_ptr() % 64 == 0
        )

    def parameter(cls, data=None, requires_grad=True):
        with torch.no_grad():
            return new(cls, seated(data, past) if data is not None and moves(data) else data, requires_grad)

    def apply(module, *args, **kwargs):
        result = convert(module, *args, **kwargs)
        for p in module.parameters(recurse=False):
            if moves(p):
                p.data = seated(p.data, past)
        return result

    torch.nn.Parameter.__new__, torch.nn.Module._apply = staticmethod(parameter), apply
