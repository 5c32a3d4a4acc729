"""What has to hold for whatever runs on a GPU."""

import torch

from tests.support.checks import assert_same, exact_gradients


def assert_follows_the_current_stream(call, args):
    """``args[0]`` is written on another stream, late; ``call`` has to wait for it."""
    first, expected = args[0].clone(), call(*args)
    args[0].zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)  # a launch on any other stream would read zeros
        args[0].copy_(first)
        got = call(*args)
    torch.cuda.synchronize()
    assert_same(got, expected)


def assert_replays_in_a_graph(call, args):
    """Also a proof that nothing waits: capturing would fail."""
    call(*args)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call(*args)
    args[0].mul_(3)
    graph.replay()
    assert_same(got, call(*args))


def assert_counts_beyond_an_int32(call, case, layout):
    """Of very many images only the last, where an overflow does not reach, has values."""
    dy, x, *rest = case.args((torch.bfloat16, torch.bfloat16), "cuda")
    far = []
    for t in (dy, x):
        channels, *size = t.shape[1:]
        if layout == "channels_last":
            zeros = t.new_zeros(2**19 + 1, *size, channels).movedim(-1, 1)
        else:
            zeros = t.new_zeros(2**19 + 1, channels, *size)
        zeros[-1:] = t
        far.append(zeros)
    assert_same(call(*far, *rest), exact_gradients(case.op, (dy, x, *rest)))


def assert_same_bits_ten_thousand_times(call, case):
    """Of values whose sums are rounded, so that any other order or operand shows."""
    dy, x, weight, *rest = case.args(device="cuda")
    dy, x = (torch.randn_like(t, dtype=torch.bfloat16) for t in (dy, x))
    args = dy, x, weight.bfloat16(), *rest
    first = [t.view(torch.int16) for t in call(*args)]
    others = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(10_000):
        for got, before in zip(call(*args), first, strict=True):
            others += (got.view(torch.int16) != before).sum()  # nothing waits for the count
    assert others == 0
