"""Importing is cheap: no CUDA context, no compiler, no Triton."""

import json
import subprocess
import sys

import pytest

CODE = """
import json, subprocess, sys
import torch

started = []
sys.addaudithook(lambda event, args: started.append(str(args)) if event in (
    "subprocess.Popen", "os.system", "os.posix_spawn", "os.exec") else None)
import {package}
print(json.dumps(dict(
    started=started,
    cuda=torch.cuda.is_initialized(),
    modules=sorted(sys.modules.keys() & {{
        "triton", "torch._inductor", "transformers", "accelerate", "lightning", "lightning.pytorch"
    }}),
)))
"""


@pytest.mark.parametrize("package", ["neq", "neq_kernels"])
def test_lean(package):
    code = CODE.format(package=package)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == {"started": [], "cuda": False, "modules": []}
