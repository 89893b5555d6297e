"""The time of one run, operator by operator."""

import os
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .measurement import Run

NAMESPACE = "peft_kernels::"
os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's log messages would break the progress bar


def self_times(run: Run, device: str, trace: Path) -> dict[str, float]:
    """Self time in seconds of every operator in one run, without the operators that it calls; on a GPU, time of the
    kernels that it launches.

    The trace at ``trace`` opens in chrome://tracing and in Perfetto.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities, acc_events=True) as profiler:
        run()
        if device == "cuda":
            torch.cuda.synchronize()
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    times = {}
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CPU:  # a kernel is attributed to its operator and would count twice
            seconds = (event.self_device_time_total if device == "cuda" else event.self_cpu_time_total) / 1e6
            times[event.key] = times.get(event.key, 0.0) + seconds
    return {name: seconds for name, seconds in times.items() if seconds > 0}
