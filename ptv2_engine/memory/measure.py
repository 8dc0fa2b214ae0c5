"""The measured peak: the planner's workload on a real device, with random weights."""

from __future__ import annotations

import gc
from typing import Any

import torch

from ptv2_engine.memory.planner import Workload
from ptv2_engine.memory.setup import Setup


def measure(setup: Setup, device: str | torch.device) -> int:
    """Run two steps with random weights and return the second one's peak, from before the model was made: CUDA's
    max_memory_allocated, or on the CPU the high-water mark of torch's allocator as its profiler records it."""
    setup.check()
    device = torch.device(device)
    gc.collect()
    if device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()                 # the plan counts them; an earlier product left them there
        before = torch.cuda.memory_allocated(device)
        workload = Workload(setup, device)
        workload.step(workload.batch())
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        workload.step(workload.batch())
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        workload = Workload(setup, device)
        for _ in range(2):
            workload.step(workload.batch())
    return _high_water(profiler)


def _high_water(profiler: Any) -> int:
    from torch._C._profiler import _EventType

    pending, changes = list(profiler.profiler.kineto_results.experimental_event_tree()), []
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.tag == _EventType.Allocation and event.extra_fields.device.type == "cpu":
            changes.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    alive: dict[int, int] = {}                      # what was allocated before and is freed now is nobody's business
    now = most = 0
    for _, pointer, nbytes in sorted(changes):
        now += nbytes if nbytes > 0 else -alive.pop(pointer, 0)
        if nbytes > 0:
            alive[pointer] = nbytes
        most = max(most, now)
    return most
