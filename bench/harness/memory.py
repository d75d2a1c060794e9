"""What the benches share: how memory is counted, tensors by the allocator's log and processes by the kernel's."""

from __future__ import annotations

import contextlib
import gc
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

OWN = re.compile(r"^Pss_(?:Anon|Shmem): +(\d+) kB$", re.MULTILINE)


def held_bytes(*owners: Any) -> int:
    """Bytes of the distinct storages behind modules' parameters and buffers, their gradients, and optimizers' moments.

    bitsandbytes' constants lie beside a 4-bit parameter, in its quant_state.
    """
    import torch

    tensors: list[torch.Tensor] = []
    for owner in owners:
        if isinstance(owner, torch.optim.Optimizer):
            tensors += [
                tensor for state in owner.state.values() for tensor in state.values() if torch.is_tensor(tensor)
            ]
            continue
        tensors += owner.buffers()
        for parameter in owner.parameters():
            tensors += [tensor for tensor in (parameter.data, parameter.grad) if tensor is not None]
            if (state := getattr(parameter, "quant_state", None)) is not None:
                tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def tracked_peak(run: Callable[[], Any]) -> int:
    """The most bytes that `run` had allocated on the CPU at any time, beyond what was there: by the allocator's log."""
    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def peak_beyond(run: Callable[[], Any]) -> int:
    """The most bytes of tensors that `run` had at any time, beyond what was there: on the card if there is one."""
    import torch

    if not torch.cuda.is_available():
        return tracked_peak(run)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def own_bytes(pid: int) -> int:
    """Memory that a process and all that descend from it hold of their own; what they share counts once.

    Without files that are mapped, such as torch's libraries: their part depends on who else has them open.
    """
    children: dict[int, list[int]] = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
        children[parent].append(int(stat.parent.name))
    family = [pid]
    for member in family:
        family += children[member]
    rollups = []
    for member in family:
        with contextlib.suppress(OSError):  # it has just ended
            rollups.append(Path(f"/proc/{member}/smaps_rollup").read_text())
    return sum(1024 * int(kilobytes) for text in rollups for kilobytes in OWN.findall(text))
