"""Small results on their way from the device to the host, so that nothing waits for what was queued after them."""

import torch


class HostCopy:
    """A copy of a tensor that has been asked for and is read later.

    On a GPU, reading waits until the tensor has been computed, and not for the work that was queued since: queue what
    comes next, then read.

    Args:
        tensor: on any device.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._copy = tensor.to("cpu", non_blocking=True)
        self._copied = None
        if tensor.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(tensor.device))

    def read(self) -> torch.Tensor:
        """Wait for the copy.

        Returns:
            The tensor, on the CPU.
        """
        if self._copied is not None:
            self._copied.synchronize()
        return self._copy
