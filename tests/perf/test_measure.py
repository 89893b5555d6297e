import pytest
import torch

from peft_kernels.perf import measure


def test_interleaved_takes_turns_and_counts_by_name():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = measure.interleaved(functions, {"a": 1, "b": 3}, warmup=1)
    assert "".join(calls) in ("ab" + first + "b" + "b" for first in ("ab", "ba"))
    assert [len(timings[name].seconds) for name in "ab"] == [1, 3]
    calls.clear()
    measure.interleaved(functions, 20, warmup=0)
    turns = {"".join(calls[i : i + 2]) for i in range(0, 40, 2)}
    assert len(calls) == 40 and turns == {"ab", "ba"}


def test_what_runs_in_another_process_times_itself_and_the_others_settle():
    class Elsewhere:
        def __call__(self):
            calls.append("there")

        def seconds(self):
            calls.append("timed there")
            return 5.0

    calls = []
    timings = measure.interleaved({"there": Elsewhere(), "here": lambda: calls.append("here")}, 2, warmup=1)
    assert timings["there"].seconds == (5.0, 5.0)
    assert calls[:2] == ["there", "here"] and calls.count("timed there") == 2
    assert calls.count("here") == 1 + 2 * 2  # warm-up, then an untimed run before each timed one


def test_timing():
    timing = measure.Timing((1.0, 2.0, 3.0, 4.0, 5.0))
    assert timing.median == 3 and timing.spread == pytest.approx(2 / 3)
    assert measure.Timing((1.0,)).spread is None


def test_peak_memory_sees_what_is_freed_again_every_time():
    measure.peak_memory(lambda: torch.ones(1000))
    for size in (60_000_000, 30_000_000):
        result, peak, seconds = measure.peak_memory(lambda size=size: torch.ones(size // 4).sum().item())
        assert result == size // 4 and seconds > 0
        if peak is None:
            pytest.skip("this system keeps no high-water mark")
        assert size * 0.9 < peak < size * 1.3


def test_ceilings_bound_from_both_sides():
    limits = measure.Peaks(bandwidth=10.0, rate=100.0)
    assert limits.roofline(20, 100) == 2 and limits.roofline(10, 400) == 4
    assert measure.peaks(torch.float32, quick=True).bandwidth > 0
