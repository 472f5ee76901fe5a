"""Seconds and peak memory of one call: on a CPU that nobody disturbs, or on a GPU between events."""

import ctypes
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.loss_cases import Case

MAX_DISTURBED = 50
GPU_WARM_UPS = 3  # a second call of another size makes the compiler write kernels for any size


def measure_on_gpu(case: Case, function: Callable[[], None], repeats: int) -> tuple[float, float]:
    """Median seconds of the repeats between events, and MiB of the allocator's peak over its state before."""
    torch.compiler.reset()  # each method with a compiler's memory of its own, as a run has it
    seconds, peaks = [], []
    for repeat in range(GPU_WARM_UPS + repeats):
        case.hidden.grad = case.weight.grad = case.kept = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        if repeat >= GPU_WARM_UPS:
            seconds.append(start.elapsed_time(end) / 1000)
            peaks.append((torch.cuda.max_memory_allocated() - before) / 2**20)
    return statistics.median(seconds), max(peaks)


def measure(case: Case, function: Callable[[], None]) -> tuple[float, float]:
    """Seconds and MiB of one call that no other process disturbed: on few cores that multiplies the time."""
    for _ in range(MAX_DISTURBED):
        while read_others_cpu(0.5) > 0.05:
            time.sleep(1.0)
        others = read_others_cpu()
        seconds, peak = measure_once(case, function)
        if read_others_cpu() - others <= 0.02 * seconds + 0.1:
            return seconds, peak
        print(f"disturbed ({seconds:.2f} s), once more", file=sys.stderr, flush=True)
    raise RuntimeError(f"Other processes kept computing during {MAX_DISTURBED} tries. Give the benchmark the machine.")


def read_others_cpu(interval: float | None = None) -> float:
    """CPU seconds that other processes have used, in all or (as a share of a core) during an interval."""
    if interval is not None:
        before = read_others_cpu()
        time.sleep(interval)
        return (read_others_cpu() - before) / interval
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split()[1:9])
    own = os.times()
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def measure_once(case: Case, function: Callable[[], None]) -> tuple[float, float]:
    """Seconds, and MiB of the resident set's peak over its state before (Linux: the kernel's own high-water mark)."""
    case.hidden.grad = case.weight.grad = case.kept = None
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = read_status("VmRSS")
    started = time.perf_counter()
    function()
    seconds = time.perf_counter() - started
    return seconds, (read_status("VmHWM") - before) / 1024


def read_status(name: str) -> int:
    """A line of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])
