"""The cache of tuned configs: how a launch uses it, and that no content of it ends a run."""

import json
import re
import warnings

import pytest
import torch

pytest.importorskip("triton")
from against_reference import expected_of

from peft_kernels.ops import tuned
from peft_kernels.ops.label_logits import reference
from peft_kernels.ops.label_logits import triton as logits

CPU = torch.device("cpu")  # Triton's interpreter launches there
SITE = tuned.Site("label_logits", "forward", (4, 8))
ENTRY = tuned.Entry(SITE, {"BD": 64, "num_warps": 2}, 2e-6, 1e-6, "2026-01-02T03:04:05+00:00")
SHIPPED = {"BW": 8, "BD": 256, "num_warps": 4, "num_stages": 1, "other": "stays"}


@pytest.fixture(autouse=True)
def read_again(tmp_path, monkeypatch):
    """Every test behaves like a new process, with its own folder."""
    monkeypatch.delenv("PEFT_KERNELS_TUNED")
    monkeypatch.setenv("PEFT_KERNELS_CACHE", str(tmp_path))
    tuned.entries.cache_clear()
    yield
    tuned.entries.cache_clear()


def options(*key, operator="label_logits", kernel="forward"):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return tuned.options(operator, kernel, CPU, SHIPPED, *key)


def written(**changes):
    """A cache file with one entry, with some of its fields changed."""
    path = tuned.cache_file(CPU)
    tuned.write(path, CPU, [ENTRY])
    content = json.loads(path.read_text())
    content.update({key: value for key, value in changes.items() if key in content})
    if of_entry := changes.keys() - content.keys():
        content["entries"][0].update({key: changes[key] for key in of_entry})
    path.write_text(json.dumps(content))
    return path


def test_an_entry_takes_the_place_of_what_it_names():
    tuned.write(tuned.cache_file(CPU), CPU, [ENTRY])
    assert options(4, 8) == {**SHIPPED, **ENTRY.options}
    for other in (
        options(2, 8),
        options(4, 2),
        options(4, 8, kernel="backward"),
        options(4, 8, operator="special_tokens"),
    ):
        assert other is SHIPPED


def test_without_a_cache():
    assert options(4, 8) is SHIPPED


def test_what_is_written_is_read():
    more = tuned.Entry(tuned.Site("special_tokens", "slots", ()), {"BS": 2048}, 3.0, 2.0, "2026")
    path = tuned.cache_file(CPU).parent / "new folder" / "file.json"
    for entries in ([ENTRY, more], []):
        tuned.write(path, CPU, entries)
        assert tuned.read(path, CPU) == entries
    assert [x.name for x in path.parent.iterdir()] == ["file.json"]


def test_a_write_that_fails_leaves_the_old_file(monkeypatch):
    path = written()
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(tuned.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tuned.write(path, CPU, [])
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_read_once(monkeypatch):
    path = written()
    first = options(4, 8)
    path.unlink()
    assert options(4, 8) == first != SHIPPED


def test_where_it_lies(monkeypatch, tmp_path):
    name = f"cpu-triton-{'.'.join(__import__('triton').__version__.split('.')[:2])}.json"
    assert tuned.cache_file(CPU) == tmp_path / name
    monkeypatch.delenv("PEFT_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuned.cache_file(CPU) == tmp_path / "xdg" / "peft_kernels" / name
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert tuned.cache_file(CPU) == tmp_path / "home" / ".cache" / "peft_kernels" / name


def test_named_by_the_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Maker X200 (80 GB)/2")
    assert re.fullmatch(r"maker-x200-80-gb-2-triton-\d+\.\d+\.json", tuned.cache_file(torch.device("cuda", 0)).name)


def test_switched_off(monkeypatch):
    written()
    monkeypatch.setenv("PEFT_KERNELS_TUNED", "0")
    assert options(4, 8) is SHIPPED


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"schema": 2}, "is for schema 2, and this is 1"),
        ({"device": "another"}, "is for device 'another', and this is 'cpu'"),
        ({"triton": "1.0"}, "is for triton '1.0'"),
        ({"peft_kernels": "0.0.0"}, "is for peft_kernels '0.0.0'"),
        ({"entries": None}, "expected an object with a list of entries"),
        ({"entries": [7]}, "is damaged"),
        ({"entries": [{}]}, "is damaged: KeyError: 'operator'"),
        ({"operator": "softmax"}, "no kernel 'forward' of 'softmax' can be tuned"),
        ({"operator": ["softmax"]}, "is damaged: TypeError"),
        ({"kernel": "sideways"}, "no kernel 'sideways' of 'label_logits' can be tuned"),
        ({"key": {"bytes": 4}}, "expected a key of ('bytes', 'words')"),
        ({"key": {"bytes": [4], "words": 8}}, "expected a key of ('bytes', 'words'), integers"),
        ({"key": None}, "is damaged"),
        ({"options": {"BK": 32}}, "BK=32 is no option"),
        ({"options": {"BD": 96}}, "BD=96 is no option"),
        ({"options": {"BD": 8192}}, "BD=8192 is no option"),
        ({"options": {"BD": "64"}}, "BD='64' is no option"),
        ({"options": {"num_warps": True}}, "num_warps=True is no option"),
        ({"options": {"num_stages": 0}}, "num_stages=0 is no option"),
        ({"options": None}, "is damaged"),
        ({"tuned_s": "fast"}, "is damaged: ValueError"),
    ],
)
def test_a_cache_for_something_else_is_named_once(changes, reason):
    path = written(**changes)
    with pytest.warns(UserWarning, match=re.escape(reason)) as found:
        assert tuned.options("label_logits", "forward", CPU, SHIPPED, 4, 8) is SHIPPED
    assert str(path) in str(found[0].message) and "peft-kernels tune" in str(found[0].message)
    assert options(4, 8) is SHIPPED  # no second warning


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"3"])
def test_a_damaged_cache_is_named(content):
    tuned.cache_file(CPU).write_bytes(content)
    with pytest.warns(UserWarning, match="cannot be used"):
        assert tuned.options("label_logits", "forward", CPU, SHIPPED, 4, 8) is SHIPPED


def test_a_cache_that_cannot_be_read_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PEFT_KERNELS_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be used"):
        assert tuned.options("label_logits", "forward", CPU, SHIPPED, 4, 8) is SHIPPED


class Spy:
    """A kernel that records the grids and configs of its launches."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.launches.append((grid, options))
            return self.kernel[grid](*args, **options)

        return launch


def test_reaches_the_launch_and_results_stay_right(device, monkeypatch):
    if reason := logits.unavailable(device.type, torch.float32):
        pytest.skip(reason)
    spy = Spy(logits.triton_kernels.label_logits_fwd_kernel)
    monkeypatch.setattr(logits.triton_kernels, "label_logits_fwd_kernel", spy)
    hidden, weight = torch.randn(3, 300, device=device), torch.randn(20, 300, device=device)
    ids = torch.randint(20, (1, 8), device=device)
    expected = expected_of(lambda impl, *given: impl.forward(*given), reference, hidden, weight, ids, None, None)
    expected.check(logits.forward(hidden, weight, ids, None, None))
    tuned.entries.cache_clear()
    tuned.write(
        tuned.cache_file(hidden.device), hidden.device, [ENTRY._replace(options={"BW": 2, "BD": 64, "num_warps": 2})]
    )
    expected.check(logits.forward(hidden, weight, ids, None, None))
    (grid, shipped), (tuned_grid, found) = spy.launches
    assert (grid, tuned_grid) == ((3,), (12,))
    assert found == {**shipped, "BW": 2, "BD": 64, "num_warps": 2}
