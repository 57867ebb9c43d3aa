"""`python -m dtruntime_torch.gpucheck`: its options, and what it says where there is no GPU."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from dtruntime_torch import _C
from dtruntime_torch.gpucheck import cuda_device, run
from dtruntime_torch.gpucheck.overlap import check_overlap
from tests.gpucheck.host_device import TINY, HostBench

CPU_TORCH = "is a CPU build"
CPU_MODULE = "This dtruntime_torch was built without CUDA: build it again with CUDA_HOME"


@pytest.fixture
def machine(monkeypatch):
    """Makes this a machine with these parts."""

    def make(torch_cuda="13.0", module_cuda="13.0", torch_finds=True, module_finds=1):
        def device_count() -> int:
            if isinstance(module_finds, str):
                raise RuntimeError(module_finds)
            return module_finds

        built = {**_C.build_info(), "cuda": module_cuda}
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: torch_finds)
        monkeypatch.setattr(cuda_device._C, "build_info", lambda: built)
        monkeypatch.setattr(cuda_device._C, "cuda_device_count", device_count)

    return make


def test_nothing_is_missing_where_all_is_there(machine):
    machine()
    assert cuda_device.what_is_missing() == []


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"torch_cuda": None}, [CPU_TORCH]),
        ({"module_cuda": False}, [CPU_MODULE]),
        ({"torch_cuda": None, "module_cuda": False}, [CPU_TORCH, CPU_MODULE]),
        ({"torch_finds": False}, ["finds no GPU: is there one, with a driver for CUDA 13.0?"]),
        ({"module_finds": 0}, ["built for CUDA 13.0, finds no GPU though torch does"]),
        ({"torch_finds": False, "module_finds": 0}, ["finds no GPU: is there one"]),
        ({"module_finds": "driver too old"}, ["built for CUDA 13.0, cannot use the GPU: driver too old."]),
        (
            {"torch_finds": False, "module_finds": "driver too old"},
            ["finds no GPU: is there one", "cannot use the GPU: driver too old."],
        ),
    ],
)
def test_each_thing_that_is_missing_has_its_sentence(parts, said, machine):
    machine(**parts)
    found = cuda_device.what_is_missing()
    assert len(found) == len(said)
    assert all(words in sentence for words, sentence in zip(said, found, strict=True))


def test_without_a_gpu_it_says_so_writes_nothing_and_ends_with_2(machine, monkeypatch, tmp_path, capsys):
    machine(torch_cuda=None)
    monkeypatch.chdir(tmp_path)
    assert run.main([]) == 2
    out = capsys.readouterr().out
    assert out.startswith("There is no GPU that can be checked here.\n") and CPU_TORCH in out
    assert list(tmp_path.iterdir()) == []


def test_the_status_of_the_process_is_that_of_the_run(tmp_path):
    program = (
        "import runpy, sys; from dtruntime_torch.gpucheck import cuda_device\n"
        "cuda_device.what_is_missing = lambda: ['Nothing is here.']\n"
        "sys.argv = ['gpucheck']; runpy.run_module('dtruntime_torch.gpucheck', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[1]) == (2, "Nothing is here.")


@pytest.fixture
def stand_in(machine, monkeypatch):
    """The program with the CPU in the place of a GPU, and one check."""
    machine()
    monkeypatch.setattr(run, "CudaBench", HostBench)
    monkeypatch.setattr(run, "SECTIONS", (check_overlap,))


@pytest.mark.parametrize(("options", "sizes"), [([], "FULL"), (["--quick"], "QUICK")])
def test_quick_takes_the_small_sizes_and_the_report_says_so(options, sizes, stand_in, monkeypatch, tmp_path):
    taken = []
    monkeypatch.setattr(run, sizes, TINY)
    monkeypatch.setattr(run, "SECTIONS", (lambda device, sizes: taken.append(sizes) or [],))
    file = tmp_path / "new folder" / "report.json"
    assert run.main([*options, "--output", str(file)]) == 0
    assert taken == [TINY]
    command = json.loads(file.read_text())["command"]
    assert command == " ".join(["python -m dtruntime_torch.gpucheck", *options])


def test_it_prints_what_it_finds_and_where_it_wrote_it(stand_in, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "FULL", TINY)
    monkeypatch.chdir(tmp_path)
    assert run.main([]) == 0
    out = capsys.readouterr().out
    assert out.startswith("ok      overlap/copies beside computation: 1.00 of it hides")
    assert "stand-in: CPU, no GPU" in out and "3 of 3 checks hold" in out
    assert out.endswith("written to benchmarks/results/stand-in-cpu-no-gpu.json\n")


def test_an_unknown_option_is_refused(capsys):
    with pytest.raises(SystemExit):
        run.main(["--fast"])
    assert "--fast" in capsys.readouterr().err
