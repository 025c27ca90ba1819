"""What would stop the host on a GPU, counted on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

READS = frozenset(
    "_local_scalar_dense nonzero masked_select equal is_nonzero "
    "_unique2 unique_dim unique_consecutive repeat_interleave bincount".split()
)
"""Operators whose result, or its shape, the host has to wait for."""
COPIES = (Tensor.tolist, Tensor.numpy, Tensor.cpu)
"""Of a CPU's tensor these are no operators."""
MAKERS = (torch.tensor, torch.zeros, torch.ones, torch.full, torch.empty, torch.arange)


class HostStops(TorchDispatchMode):
    """Lists, in `stops`, what the operations inside would make the host wait for on a GPU.

    On a CPU all tensors are alike. Here those belong to the host that are made inside without a device, and what is computed
    of such tensors alone: to read them is free.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stops: list[str] = []
        self._on_host = WeakTensorKeyDictionary()
        self._functions = _Functions(self)

    def __enter__(self) -> HostStops:
        self._functions.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._functions.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        indexing = name in ("index", "index_put", "index_put_", "_index_put_impl_")
        if name in READS or (indexing and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])):
            self.stop(str(func), *tensors)
        results = func(*args, **(kwargs or {}))
        if tensors and all(tensor in self._on_host for tensor in tensors):
            for result in tree_leaves(results):
                self.belongs_to_host(result)
        return results

    def stop(self, what: str, *tensors: Tensor) -> None:
        """Count it, unless it reads the host's own tensors only."""
        if not tensors or any(tensor not in self._on_host for tensor in tensors):
            self.stops.append(what)

    def belongs_to_host(self, result: object) -> None:
        if isinstance(result, Tensor):
            self._on_host[result] = True


class _Functions(TorchFunctionMode):
    """What the dispatcher does not see: where a tensor is made, and copies to a list."""

    def __init__(self, owner: HostStops) -> None:
        super().__init__()
        self.owner = owner

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in COPIES:
            self.owner.stop(func.__name__, args[0])
        if func is torch.tensor and kwargs.get("device") is not None:
            self.owner.stop("torch.tensor(device=)")  # copied from memory that is not pinned
        result = func(*args, **kwargs)
        if func in MAKERS and kwargs.get("device") is None:
            self.owner.belongs_to_host(result)
        return result


@contextmanager
def answering_as_gpu(host: HostStops) -> Iterator[list[tuple[str, str]]]:
    """DeepSpeed's CPU accelerator says of itself what a GPU's does; its synchronisations are stops of `host`.

    Gives the list of waits between streams, which do not stop the host: (name of the stream that waits, name of the other).
    """
    waits: list[tuple[str, str]] = []

    class Stream:
        def __init__(self, name: str = "other") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            waits.append((self.name, other.name))

        def wait_event(self, event: object) -> None:
            waits.append((self.name, "event"))

        def synchronize(self) -> None:
            host.stop("stream.synchronize")

    class Event:
        def __init__(self, enable_timing: bool = False) -> None: ...

        def record(self, stream: Stream | None = None) -> None: ...

        def synchronize(self) -> None:
            host.stop("event.synchronize")

    current = [Stream("compute")]

    @contextmanager
    def stream(chosen: Stream) -> Iterator[None]:
        current.append(chosen)
        yield
        current.pop()

    no: Callable[..., bool] = lambda self: False  # noqa: E731
    answers = {
        **dict.fromkeys(("is_synchronized_device", "use_host_timers", "resolves_data_dependency"), no),
        "synchronize": lambda self, device_index=None: host.stop("synchronize"),
        "current_stream": lambda self, device_index=None: current[-1],
        "stream": lambda self, chosen: stream(chosen),
        "Stream": Stream,
        "Event": Event,
    }
    with mock.patch.multiple(type(get_accelerator()), **answers), mock.patch.object(Tensor, "record_stream", lambda *_: None):
        yield waits
