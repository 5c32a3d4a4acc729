"""Without a GPU: the CUDA sources compile for every target, silently, and keep to registers."""

import re
import subprocess
from functools import cache

import pytest

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


@every_target
def test_pack_columns_has_enough_on_its_way(compile_for, arch):
    """Eight loads in each thread, and registers for all of a multiprocessor's 2048 threads."""
    (source,) = (source for source in SOURCES if source.stem == "pack")
    cubin, said = compile_for(source, arch)
    registers = dict(re.findall(r"function '(\S+)'.*?Used (\d+) registers", said, re.DOTALL))
    in_16_bits = 0
    for name, code in functions(cubin).items():
        if "4packI" not in name:
            continue
        assert int(registers[name]) <= (40 if "packId" in name else 32), name
        if "half" in name or "bfloat16" in name:
            in_16_bits += 1
            assert code.count("LDG", "U16") == code.count("STG", "U16") > 8, name
    assert in_16_bits == 2


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
