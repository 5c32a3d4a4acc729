import pytest
from torch import nn

import neq


def test_takes_ddp_only():
    with pytest.raises(TypeError, match="takes a DistributedDataParallel, got Linear"):
        neq.distributed.send_active_rows(nn.Linear(2, 2))
