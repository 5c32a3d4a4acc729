"""A Controller on several ranks."""

import gc
import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

import neq
from tests.support.training import Net, data, masks

# everything here is too small for two
pytestmark = pytest.mark.usefixtures("one_thread")


class Contrary(neq.Policy):
    """Chooses otherwise on each rank."""

    measures = False

    def choose(self, layers, epoch):
        return [[dist.get_rank()] for _ in layers]


DISTRIBUTED = {"equilibrium": neq.Equilibrium, "released": neq.Equilibrium.released}


def trained(name, rank, folder):
    """The masks, φ of each epoch, and the number of records."""
    x, labels = data()
    mine = slice(rank, None, 2)
    torch.manual_seed(rank)  # DDP takes rank 0's weights
    model = DistributedDataParallel(Net().eval(), find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    control = neq.Controller(
        model,
        probe=x[:6][mine] if name == "equilibrium" else x[:6][:4] if rank else x[:6][4:],
        policy=DISTRIBUTED[name](3e-4),
        optimizer=optimizer,
        history=f"{folder}/history-{name}.jsonl",
    )
    phi = []
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(model(x[mine]), labels[mine]).backward()
        optimizer.step()
        control.step()
        phi.append(control.scores["phi"])
    assert next(iter(control.layers)) == "conv"
    return masks(control), torch.stack(phi), len(control.history.records)


def trained_by_itself(rank):
    """The masks and how many epochs are over, of a Controller that decides after two steps."""
    x, labels = data()
    model = DistributedDataParallel(Net().eval(), find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    options = {"policy": neq.Equilibrium(3e-4), "optimizer": optimizer, "every": 2}
    control = neq.Controller(model, probe=x[:6][rank::2], **options)
    for _ in range(7):
        optimizer.zero_grad()
        F.cross_entropy(model(x[rank::2]), labels[rank::2]).backward()
        optimizer.step()
    return masks(control), control.epoch


def on_rank(rank, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", f"file://{folder}/init", rank=rank, world_size=2)
    torch.set_num_threads(1)
    results = {name: trained(name, rank, folder) for name in DISTRIBUTED}
    contrary = neq.Controller(Net(), optimizer=(), policy=Contrary())
    contrary.step()
    results["contrary"] = masks(contrary)
    results["every"] = trained_by_itself(rank)
    torch.save(results, f"{folder}/{rank}.pt")
    # a rank that left while another still uses its connections would abort that one
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("spawn")  # a fork would share threads that are not there
    processes = [context.Process(target=on_rank, args=(rank, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("policy", DISTRIBUTED)
def test_ranks_decide_alike_from_the_samples_of_all(policy, ranks):
    (first, phi, _), (second, phi_, _) = (results[policy] for results in ranks[1])
    assert torch.allclose(phi, phi_, 0, 0, equal_nan=True)
    for name, mask in first.items():
        assert torch.equal(mask, second[name]), name
    shares = torch.cat(list(first.values())).double().mean()
    assert 0.1 < shares < 0.9

    # one process with all samples measures the same
    x, labels = data()
    torch.manual_seed(0)
    model = Net().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    control = neq.Controller(
        model, probe=x[:6], policy=DISTRIBUTED[policy](3e-4), optimizer=optimizer
    )
    for epoch in range(4):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
        control.step()
        assert torch.allclose(control.scores["phi"], phi[epoch], atol=1e-5, equal_nan=True)


def test_only_rank_0_writes_history(ranks):
    folder, (first, second) = ranks
    assert [first["equilibrium"][2], second["equilibrium"][2]] == [4, 0]
    assert len((folder / "history-equilibrium.jsonl").read_text().splitlines()) == 4


def test_ranks_that_decide_by_themselves_decide_alike(ranks):
    (first, epochs), (second, epochs_) = (results["every"] for results in ranks[1])
    assert epochs == epochs_ == 3
    assert first.keys() == second.keys()
    assert all(torch.equal(mask, second[name]) for name, mask in first.items())
    assert 0 < torch.cat(list(first.values())).double().mean() < 1


def test_where_ranks_choose_otherwise_rank_0_holds(ranks):
    _, results = ranks
    for result in results:
        assert all(m.nonzero().tolist() == [[0]] for m in result["contrary"].values())
