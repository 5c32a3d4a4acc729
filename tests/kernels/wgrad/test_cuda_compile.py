"""Without a GPU: the CUDA sources compile for every target, silently, and keep to registers."""

import re
import subprocess
from functools import cache

import pytest

from neq_kernels.shapes import ceil_div
from tests.support import ROOT
from tests.support.aot import every_target, functions

SOURCES = sorted((ROOT / "csrc/cuda").rglob("*.cu"))


@pytest.fixture(scope="module")
def compile_for(tmp_path_factory):
    """(the machine code of a source for a target, what the compiler said)."""

    @cache
    def compile_for(source, target):
        cubin = tmp_path_factory.mktemp(source.stem) / f"{target}.cubin"
        command = ["nvcc", "-std=c++20", "-O3", "-Werror", "all-warnings", "-Xcompiler=-Wall"]
        command += [f"-gencode=arch=compute_{target},code=sm_{target}", "-Xptxas=-v"]
        command += ["-cubin", str(source), "-o", str(cubin)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        return cubin, run.stdout + run.stderr

    return compile_for


@every_target
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles(compile_for, source, arch):
    _, said = compile_for(source, arch)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert spills
    assert set(spills) == {("0", "0")}
    assert set(re.findall(r"(\d+) bytes stack frame", said)) == {"0"}


@every_target
def test_conv_wgrad_multiplies_on_tensor_cores_what_it_copies_asynchronously(compile_for, arch):
    """For each dtype and number of octets: nine matrices and one for the bias."""
    (source,) = (source for source in SOURCES if source.stem == "conv_wgrad")
    products = set()
    for name, code in functions(compile_for(source, arch)[0]).items():
        if "sum_part" not in name:
            continue
        bfloat16 = "bfloat16" in name
        products.add((bfloat16, code.count("HMMA", "16816", "F32", *["BF16"] * bfloat16)))
        assert code.count("LDSM", "MT88", "4") == 9, name
        assert code.count("LDGSTS") == code.count("LDGSTS", "128") > 0, name
        assert not code.count("LDG", "U16"), name
    assert products == {(dtype, 10 * octets) for dtype in (False, True) for octets in (1, 2, 3, 4)}


@pytest.fixture
def packing(compile_for):
    """By dtype: a kernel's machine code for a target, and how many threads a processor holds."""
    (source,) = (source for source in SOURCES if source.stem == "pack")

    def packing(arch):
        cubin, said = compile_for(source, arch)
        registers = dict(re.findall(r"function '(\S+)'.*?Used (\d+) registers", said, re.DOTALL))
        found = {}
        for name, code in functions(cubin).items():
            if dtype := re.search(r"4packI(?:\d+)?(f|d|__half|__nv_bfloat16)[fd]E", name):
                of_block = 256 * ceil_div(int(registers[name]), 8) * 8
                found[dtype[1]] = code, 256 * min(65536 // of_block, 8)
        return found

    return packing


@every_target
def test_pack_columns_has_enough_on_its_way(packing, arch):
    """At least what eight loads of 16 bits in each of 2048 threads ask for."""
    kernels = packing(arch)
    assert kernels.keys() == {"f", "d", "__half", "__nv_bfloat16"}
    for dtype, (code, threads) in kernels.items():
        in_16_bits = dtype.startswith("__")
        loads = 11
        assert threads * loads * (2 if in_16_bits else 4) >= 2048 * 8 * 2, dtype
        if in_16_bits:
            assert code.count("LDG", "U16") == code.count("STG", "U16") > loads, dtype


@every_target
def test_pack_columns_moves_neighbours_16_bytes_at_a_time(packing, arch):
    """Two loads in a round, and a last one: 32 bytes of each thread are on their way."""
    for dtype, (code, threads) in packing(arch).items():
        assert code.count("LDG", "128") == code.count("STG", "128") == 3, dtype
        assert threads * 2 * 16 >= 2048 * 8 * 2, dtype


@every_target
def test_place_rows_moves_16_bytes_at_a_time(compile_for, arch):
    """Of dW; of packed rows in 16 bits that become float32, eight."""
    (source,) = (source for source in SOURCES if source.stem == "place")
    kernels = functions(compile_for(source, arch)[0])
    assert len(kernels) == 12
    for name, code in kernels.items():
        if "Li1E" in name:  # element by element
            continue
        widens = "halff" in name or "bfloat16f" in name
        assert code.count("STG", "128") >= 1, name
        assert code.count("LDG", "64" if widens else "128") >= 1, name
        assert not code.count("LDG", "U16"), name
