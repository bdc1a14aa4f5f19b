"""What a training step gives to a device: operations (about one kernel each), copies, and whatever waits for it.

Counted by dispatch, on any device, the meta device included. There nothing is computed: what asks for a value fails,
and a tensor of the CPU among those of the device is a copy that waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "item", "unique", "_unique2", "equal")
"""Operations whose result the host needs, or whose result's shape depends on values."""
NO_KERNEL = (
    *("view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "t", "unsqueeze", "squeeze", "slice"),
    *("select", "split", "split_with_sizes", "detach", "alias", "unbind", "unfold", "as_strided", "diagonal", "narrow"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "view_as", "unflatten"),
)
"""Operations that look at memory in another way, or set some aside."""
NOT_DETERMINISTIC: dict[str, tuple[str, ...]] = {}
"""Aggregators whose training step has operations for which torch has no deterministic form on a GPU, and which: none.

Of our own; torchmil's models are not looked at. `torch.use_deterministic_algorithms` says which operations those are.
"""


class Counted(TorchDispatchMode):
    """Counts inside: `ops` by name, `launches`, `waits` by name, `sent` copies to the device.

    Args:
        device: what is on it counts; the rest is the host's business.
    """

    def __init__(self, device: torch.device | str):
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self.device = torch.device(device)
        self.ops: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.sent = 0

    @property
    def launches(self) -> int:
        return sum(n for name, n in self.ops.items() if name not in NO_KERNEL)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self._count(func._schema.name.removeprefix("aten::").removesuffix("_"), given, made)
        return result

    def _count(self, name: str, given: list[Tensor], made: list[Tensor]) -> None:
        to, of = self._there(made), self._there(given)
        if to and given and not of:
            self.sent += 1
        elif of and made and not to:
            self.waits[f"{name} to the host"] += 1
        elif to or of:
            self.ops[name] += 1
            if name in WAITS or name in {f"_{wait}" for wait in WAITS}:
                self.waits[name] += 1
            if any(x.device != self.device and x.ndim for x in given):
                self.waits[f"{name} with a tensor of the host"] += 1

    def _there(self, tensors: list[Tensor]) -> bool:
        return any(x.device.type == self.device.type for x in tensors)


def step_counted(step: Callable[[], object], device: torch.device) -> Counted:
    """What one step gives to the device; it runs once before, for what is made but once."""
    step()
    counted = Counted(device)
    with counted:
        step()
    return counted
