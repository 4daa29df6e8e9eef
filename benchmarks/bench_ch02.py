"""Certificates of chapter 2: the paper's procedure as its authors wrote it, beside ours, on the same models. Processor time on one thread, except where threads are compared.

`plain` is 30,000 calls of the whole encoder for one person: 10,000 draws for the centre, found in a loop over all of them with one median each, 10,000 for the check, 10,000 for the radius; bounds by Hoeffding and Dvoretzky-Kiefer-Wolfowitz."""
import math
import time

import pytest
import torch
from scipy.stats import norm

from fairbook.lassi import SimilaritySet, certify, certify_dataset, mlp_encoder
from fairbook.scene_study import draw_scenes, load_scene_model, shipped_similarity
from fairbook.shapes3d import Shapes3D
from fairbook.shapes_flow import load_shapes_flow
from fairbook.smoothing import _small_ball, exact_line, linear_radius

SIGMA, N, ALPHA, DELTA = .65, 10_000, .01, .05


@torch.no_grad()
def plain(encoder, z, similar, head, seed):
    "Center smoothing as in the authors' code: (certified, radius)."
    draw = torch.Generator().manual_seed(seed)
    def codes(): return torch.cat([encoder(z + SIGMA * similar.eps * torch.randn(500, 1, generator=draw) @ similar.a) for _ in range(N // 500)])
    Z = codes()
    least, centre = math.inf, None
    for c in Z:
        r = (Z - c).norm(dim=1).median().item()
        if r < least: least, centre = r, c
    slack = math.sqrt(math.log(2 / (ALPHA / 2)) / 2 / N)
    share = ((codes() - centre).norm(dim=1) <= least).float().mean().item()
    if max(slack, .5 - (share - slack)) > DELTA: return False, math.inf
    level = norm.cdf(norm.ppf(.5 + DELTA) + 1 / SIGMA) + math.sqrt(math.log(1 / (ALPHA / 2)) / 2 / N)
    radius = 3 * (codes() - centre).norm(dim=1).quantile(level, interpolation="higher").item()
    return radius < float(linear_radius(head, centre)), radius


def models(name):
    "Latents of a few people, encoder, head, similarity set: a shipped model, or one of the paper's size with random weights."
    if name == "shipped":
        m = load_scene_model("LASSI")
        return draw_scenes(load_shapes_flow(), "test", 5, 77).z, m.encoder, m.heads[1.], shipped_similarity()
    torch.manual_seed(0)
    encoder = mlp_encoder(12_288).train()
    z = torch.randn(64, 12_288)
    with torch.no_grad():
        for _ in range(20): encoder(z)                       # running means and variances of the BatchNorms
    return z[:2], encoder.eval(), torch.nn.Linear(512, 2), SimilaritySet(.3 * torch.randn(12_288), 1.)


WAYS = {"exact binomial": ("center", {}), "sequential": ("center", dict(sequential=True, n_center=300)), "exact_line": ("exact_line", {}), "lattice": ("lattice", {})}


@pytest.mark.parametrize("name", ["shipped", "12288-2048-1024-512"])
@pytest.mark.benchmark(group="chapter 2, one certificate", timer=time.process_time)
def test_certificate(benchmark, name):
    people, encoder, head, similar = models(name)
    took, said = {}, {}
    def clock(way, run):
        start = time.process_time()
        said[way] = [run(i, z) for i, z in enumerate(people)]
        took[way] = (time.process_time() - start) / len(people)
    for way, (method, options) in WAYS.items(): clock(way, lambda i, z: certify(z, encoder, head, similar, method, seed=i, **options))
    clock("plain", lambda i, z: plain(encoder, z, similar, head, i))
    many = torch.cat([people, people.repeat(20, 1)[:20] + .1 * torch.randn(20, people.shape[1])])
    start = time.process_time()
    lines = certify_dataset(many, encoder, head, similar, "exact_line")
    took["exact_line"], said["exact_line"] = (time.process_time() - start) / len(many), lines.certificates[:len(people)]      # amortised: the weights are prepared twice for all
    benchmark.pedantic(lambda: certify(people[0], encoder, head, similar, "exact_line"), rounds=3)
    verdicts = {way: sum(a[0] == b.certified for a, b in zip(said["plain"], said[way])) / len(people) for way in WAYS}
    radius = sum(b.radius / a[1] for a, b in zip(said["plain"], said["exact binomial"])) / len(people)
    benchmark.extra_info.update(model=name, people=len(people), plain=took["plain"], radius=radius, **{f"{w} seconds": took[w] for w in WAYS}, **{f"{w} faster": took["plain"] / took[w] for w in WAYS},
                                **{f"{w} agrees": v for w, v in verdicts.items()}, **{f"{w} evaluations": sum(c.evaluations for c in said[w]) / len(people) for w in WAYS})


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.benchmark(group="chapter 2, exact_line at 12288-2048-1024-512")
def test_exact_line(benchmark, workers):
    _, encoder, head, similar = models("12288-2048-1024-512")
    people = torch.randn(40, 12_288)
    run = lambda: exact_line(encoder.body, people, similar.a[0], similar.eps, head=head, workers=workers)
    found = benchmark.pedantic(run, rounds=8, warmup_rounds=1)
    benchmark.extra_info.update(workers=workers, people=len(people), knots=sum(c.evaluations for c in found) / len(found), each=benchmark.stats.stats.min / len(people))


@pytest.mark.parametrize("n", [500, 1000, 2000])
@pytest.mark.benchmark(group="chapter 2, centre of n codes of 512 numbers", timer=time.process_time)
def test_centre_search(benchmark, n):
    torch.manual_seed(0)
    codes = torch.randn(n, 512, dtype=torch.float64)
    benchmark.pedantic(lambda: _small_ball(codes, n // 2), rounds=3, warmup_rounds=1)
    benchmark.extra_info.update(n=n)


@pytest.mark.benchmark(group="chapter 2, version 1: pictures are decoded", timer=time.process_time)
def test_decoded(benchmark):
    m, z = load_scene_model("v1 contrastive"), draw_scenes(load_shapes_flow(), "test", 3, 78).z
    found = {k: [certify(x, m.encoder, m.heads[1.], shipped_similarity(), k, seed=i, **o).evaluations for i, x in enumerate(z)] for k, o in (("lattice", {}), ("center", dict(sequential=True, n_center=300, n=1000)))}
    benchmark.pedantic(lambda: certify(z[0], m.encoder, m.heads[1.], shipped_similarity(), "lattice"), rounds=3)
    benchmark.extra_info.update(**{f"{k} evaluations": max(v) for k, v in found.items()})


@pytest.mark.benchmark(group="chapter 2, pictures drawn")
def test_pictures(benchmark):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    scenes = Shapes3D(64, "test").warm()
    rows = list(range(500))
    benchmark.pedantic(lambda: scenes.batch(rows), rounds=5, warmup_rounds=1)
    benchmark.extra_info.update(size=64, threads=2, per_second=len(rows) / benchmark.stats.stats.min)
    torch.set_num_threads(before)
