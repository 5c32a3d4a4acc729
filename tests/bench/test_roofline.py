"""bench/roofline.py, whose figures are arithmetic, says what it promises."""

import json

import pytest

from bench import roofline
from bench.lib.cards import CARDS, card_of
from bench.lib.designs import GRANULE, NOT_BUILT, Shape, layer_of, plans
from bench.lib.problems import Problem, problems
from neq_kernels.wgrad.bounds import START
from tests.support.benches import assert_refused

SUITE = {p.name: p for p in problems("full", "cuda")}
WIDE = SUITE["llama-8b/q_proj, o_proj"]
BIASED = SUITE["vit-l/mlp.up"]


def test_a_dense_product_as_by_hand():
    """4096 x 4096 weights, 16384 samples: 550 GFLOP at 0.8 of 989 TFLOP/s."""
    r = roofline.line("H200", WIDE, 1, 0.5)
    assert r["us"]["dense"] == pytest.approx(2 * 16384 * 4096**2 / (0.8 * 989.4e6) + 2, rel=1e-2)
    assert r["bound"]["dense"] == "tensor cores"
    assert r["active"] == 0.5


def test_a_layer_bound_by_memory_as_by_hand():
    """1x1, 64 -> 256 channels, 56² pixels, 256 images: X, dY and dW once, at 0.9 of 4.8 TB/s."""
    r = roofline.line("H200", SUITE["resnet50/layer1.conv3"], 1, 0.5)
    moved = 2 * (256 * 56**2 * (64 + 256) + 64 * 256)
    assert r["us"]["dense"] == pytest.approx(moved / (0.9 * 4.8e6) + 2, rel=1e-2)
    assert r["bound"]["dense"] == "memory"


def test_sectors():
    """Scattered, nearly all of dY's sectors are needed; in granules only those of active ones."""
    scattered, granular = (layer_of(WIDE, 0.25, granule) for granule in (1, GRANULE))
    assert scattered.sectors(scattered.k) == pytest.approx(1 - 0.75**16)
    assert granular.sectors(granular.k) == pytest.approx(0.25)
    assert layer_of(SUITE["resnet32/fc"], 0.25, GRANULE).granule == 1  # of 10 neurons


@pytest.mark.parametrize("card", CARDS)
def test_times_follow_what_they_should(card):
    gpu = CARDS[card]
    for problem in SUITE.values():
        times = {
            (active, granule): {n: p.time(gpu)[0] for n, p in found.items()}
            for active in (0.1, 0.5, 0.9)
            for granule in (1, GRANULE)
            if (found := plans(problem, active, granule, gpu))
        }
        for one in times.values():
            assert one["masked"] > one["dense"] > 0
        for name in {"pack", "grouped"} & times[0.1, 1].keys():
            assert times[0.1, 1][name] <= times[0.9, 1][name], (problem.name, name)
            few = layer_of(problem, 0.1, GRANULE).k <= layer_of(problem, 0.1, 1).k
            assert not few or times[0.1, GRANULE][name] <= times[0.1, 1][name]


def cache_time(tiles, read):
    """Of a Hopper: 32 bytes per clock and multiprocessor."""
    return tiles * read * 16384 * 2 / (32 * 132 * 1.83e3)


def test_a_product_for_granules_as_by_hand():
    """16 by 16 tiles of 128 rows and 256 columns; nothing shares what they read."""
    r = roofline.line("H200", WIDE, GRANULE, 0.5)
    zeros = 4096**2 / (0.9 * 4.8e6)
    expected = cache_time(16 * 16, 128 + 256) + zeros + 2 * START
    assert r["us"]["granular"] == pytest.approx(expected, rel=1e-2)
    assert r["bound"]["granular"] == "cache"


@pytest.mark.parametrize(("name", "share"), [("cluster", 0.8), ("cluster at .7", 0.7)])
def test_a_cluster_as_by_hand(name, share):
    """Half of dY and X from the cache, so the tensor cores bound it."""
    r = roofline.line("H200", WIDE, 1, 0.5)
    flops, zeros = 2 * 16384 * 4096 * 2048, 4096**2 / (0.9 * 4.8e6)
    assert r["us"][name] == pytest.approx(flops / (share * 989.4e6) + zeros + 2 * START, rel=2e-2)
    few = roofline.line("H200", WIDE, 1, 0.1)  # in tiles, 10 times the sectors
    tiles, sectors = 4 * 16, 128 / 0.1 * (1 - 0.9**16)
    bound = cache_time(tiles, (sectors + 256) / 2) / (share / 0.8)
    assert few["us"][name] > bound
    assert few["bound"][name] == "cache"


def test_few_tiles_are_cut_into_parts():
    """512 rows of 2048 columns: 2 by 8 tiles at half, so 9 parts for 132 multiprocessors."""
    layer, gpu = layer_of(SUITE["llama-1b/k_proj, v_proj"], 0.5, 1), CARDS["H200"]
    kernels = NOT_BUILT["cluster"](layer, Shape(1, 1), gpu).kernels
    assert kernels[1].memory == 2 * 4 * 9 * 256 * 2048 + 2 * 512 * 2048
    assert NOT_BUILT["cluster"](layer, Shape(1, 1), CARDS["A100"]) is None  # without clusters


def test_what_the_planners_choices_leave():
    """A layer that stays dense pays for its zeros; by the GPU alone, launches cost nothing."""
    layers = [roofline.line("H200", SUITE[name], 1, 0.25) for name in ("swin-t/patches", WIDE.name)]
    assert [r["planned"] for r in layers] == ["dense", "pack"]
    for times in ("us", "gpu_us"):
        spent = layers[0][times]["masked"] + 64 * layers[1][times]["pack"]
        dense = layers[0][times]["dense"] + 64 * layers[1][times]["dense"]
        assert roofline.as_planned(layers, times) == pytest.approx(spent / dense)
    small = roofline.line("H200", SUITE["resnet32/fc"], 1, 0.5)
    assert small["us"]["masked"] == 17 + 7.5  # two operators and a launch
    assert small["gpu_us"]["masked"] < 10


def test_a_bias_favours_packing():
    """Its sums come with the copy, while dense reads dY once more."""
    without = roofline.line("H200", Problem(**vars(BIASED) | {"bias": False}), 1, 0.5)
    with_bias = roofline.line("H200", BIASED, 1, 0.5)
    assert with_bias["us"]["dense"] > without["us"]["dense"] * 1.1
    assert with_bias["realised"] > without["realised"]


def test_whole(tmp_path, capsys):
    file, picture = tmp_path / "roofline.json", tmp_path / "roofline.png"
    arguments = ["--cards", "A100,H200", "--only", "^(vit-s|resnet32|convnext-t)/", "--layers"]
    roofline.main([*arguments, "--json", str(file), "--plot", str(picture)])
    written = json.loads(file.read_text())
    assert written["environment"]["what"] == "modelled, not measured"
    assert written["environment"]["cards"]["H200"]["processors"] == 132
    rows = written["results"]
    names = {
        p.name for p in SUITE.values() if p.name.startswith(("vit-s", "resnet32", "convnext-t"))
    }
    assert {r["name"] for r in rows} == names
    assert len(rows) == len(names) * 2 * 2 * 4
    for r in rows:
        assert r["us"][r["best"]] <= r["us"]["masked"]
        assert r["floor_us"] <= min(r["us"].values())
        assert (r["realised"] is None) == (r["grouped"] or r["active"] == 1)
    assert picture.stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "gathering" in printed
    (vit,) = (r for r in printed.splitlines() if r.split()[:2] == ["H200", "vit-s"])
    some = [r for r in rows if r["card"] == "H200" and r["asked_granule"] == 1]
    some = [r for r in some if r["name"].startswith("vit-s") and r["asked_active"] == 0.25]
    for times in "us", "gpu_us":
        assert f"{roofline.as_planned(some, times):.2f}" in vit


def test_how_another_model_judges_the_choices():
    """One layer that is packed, and two that are not: a winner, and none."""
    names = WIDE.name, "llama-8b/down_proj", "resnet50/layer1.conv3"
    found = [roofline.line("H200", SUITE[name], 1, 0.25) for name in names]
    found[1]["planned"] = "dense"
    (cells,) = zip(*(column.cells for column in roofline.judged(found).columns), strict=True)
    assert cells == ("H200", "0.25", "1", "0", "0", "2", "1", "2")
    found[2]["planned"] = "pack"
    (cells,) = zip(*(column.cells for column in roofline.judged(found).columns), strict=True)
    assert cells == ("H200", "0.25", "2", "1", "1", "2", "1", "2")


def test_what_designs_realise_of_wide_layers():
    found = [roofline.line("H200", WIDE, 1, 0.5), roofline.line("H200", BIASED, 1, 0.5)]
    rows = [*zip(*(column.cells for column in roofline.realised(found).columns), strict=True)]
    assert [row[:5] for row in rows] == [
        ("H200", "1", "no", "0.5", "1"),
        ("H200", "1", "yes", "0.5", "1"),
    ]
    share = 2 * (1 - found[0]["us"]["pack"] / found[0]["us"]["dense"])
    assert rows[0][6] == f"{share:.2f} ({int(share >= 0.9)})"


MEASURED = {
    "name": "llama-8b/q_proj, o_proj",
    "dtype": "bfloat16",
    "layout": "contiguous",
    "active": 0.5,
    "backend": "pack",
    "dense_ms": 1.0,
    "neq_ms": 0.5,
}


def test_compare(tmp_path, capsys):
    """Each line of a run that the model knows: measured, modelled, and how they compare."""
    file = tmp_path / "gpu_check.json"
    others = [
        MEASURED | change
        for change in ({"active": 1.0}, {"dtype": "float32"}, {"name": "none/such"})
    ]
    granular = MEASURED | {"granule": 16, "active": 0.25}
    wrong = MEASURED | {"neq_ms": None, "backend": "dense", "active": 0.25}
    images = MEASURED | {"name": "resnet50/layer1.conv3", "layout": "contiguous"}
    run = {"environment": {"gpu": "NVIDIA H200", "threads": 1}}
    file.write_text(json.dumps(run | {"results": [MEASURED, *others, wrong, images, granular]}))
    roofline.main(["--compare", str(file)])
    lines = [line for line in capsys.readouterr().out.splitlines() if "llama" in line]
    assert len(lines) == 3
    in_granules, scattered = (roofline.line("H200", WIDE, g, 0.25)["us"]["pack"] for g in (16, 1))
    assert f"{0.5e3 / in_granules:.2f}" in lines[2]
    assert f"{0.5e3 / scattered:.2f}" not in lines[2]
    modelled = roofline.line("H200", WIDE, 1, 0.5)["us"]
    for us, ms in ((modelled["dense"], 1.0), (modelled["pack"], 0.5)):
        assert f"{us / 1e3:.3f}"[:5] in lines[0]
        assert f"{1e3 * ms / us:.2f}" in lines[0]
    assert "tensor cores" in lines[0]
    file.write_text(json.dumps({"environment": {"gpu": "Tesla T4", "threads": 1}, "results": []}))
    with pytest.raises(SystemExit, match="no card of A100, H100, H200, B200, RTX 4090 is Tesla T4"):
        roofline.main(["--compare", str(file)])


def test_cards(capsys):
    assert card_of("NVIDIA H200") == "H200"
    assert card_of("NVIDIA GeForce RTX 4090") == "RTX 4090"
    assert card_of("NVIDIA A100-SXM4-80GB") == "A100"
    assert_refused(roofline.parse, ["--cards", "T4"], "known are A100, H100", capsys)
