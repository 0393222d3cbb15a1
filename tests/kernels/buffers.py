"""Buffers that show a wrong address: NaN before, after, and where nothing was stored."""

import torch

GUARD = 1 << 14  # elements on each side, more than a wrong row or tile reaches in these tests


def guarded(tensor):
    """Return an equal contiguous tensor in the midst of NaN."""
    return _amid_nan(tensor.shape, tensor.dtype, tensor.device)[1].copy_(tensor)


class Outputs:
    """What has been allocated by `Tensor.new_empty`, filled with and surrounded by NaN."""

    def __init__(self, new_empty):
        self._new_empty = new_empty
        self._buffers = []

    @property
    def new_empty(self):
        """A stand-in for `Tensor.new_empty`."""

        def stand_in(tensor, size, *, dtype=None, device=None):
            dtype, device = dtype or tensor.dtype, torch.device(device or tensor.device)
            # the interpreter makes empty tensors of its own, and tracing some without memory
            if size == 0 or device.type == "meta" or type(tensor) is not torch.Tensor:
                return self._new_empty(tensor, size, dtype=dtype, device=device)
            buffer, view = _amid_nan(size, dtype, device)
            self._buffers.append((buffer, view.numel()))
            return view

        return stand_in

    def forget(self):
        """Leave aside what a faulty kernel wrote."""
        self._buffers.clear()

    def assert_nothing_is_written_beside(self):
        for buffer, size in self._buffers:
            assert buffer[:GUARD].isnan().all(), "written before the first element"
            assert buffer[GUARD + size :].isnan().all(), "written after the last element"


def _amid_nan(shape, dtype, device):
    shape = torch.Size(shape)
    buffer = torch.full((shape.numel() + 2 * GUARD,), torch.nan, dtype=dtype, device=device)
    return buffer, buffer[GUARD : GUARD + shape.numel()].view(shape)
