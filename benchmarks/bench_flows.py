"""Images out of latents: `Glow.inverse` beside normflows with the same weights (K=32, L=4, additive, 64x64). Processor time, one thread, one process; ratios from minima.

`bare` is the time of the matrix products alone, at the sizes that the architecture asks for: nobody who computes the same function in the same number format is much faster."""
import time

import pytest
import torch

pytest.importorskip("normflows")

from flow_peers import normflows_twin

from fairbook.flows import Glow

SHAPE, K, L = (3, 64, 64), 32, 4


@torch.no_grad()
def twins(hidden, images):
    "A Glow whose couplings do something, started on `images`, and the same function in normflows; in evaluation mode."
    flow = Glow(SHAPE, K, L, coupling="additive", n_bits=None, hidden=hidden)
    for name, p in flow.named_parameters():
        if name.endswith("last.weight"): p.copy_(.1 * torch.randn_like(p) / (9 * hidden)**.5)
    flow(images)
    return flow.eval(), normflows_twin(flow)


def bare_products(hidden, batch):
    "The matrix products of one decoding, and nothing else."
    sizes = [(n, batch * side * side) for n, side in ((6, 32), (12, 16), (24, 8), (48, 4))]
    jobs = [(torch.randn(*a), torch.randn(*b)) for n, cols in sizes
            for a, b in [((hidden, 9 * n), (9 * n, cols)), ((hidden, hidden), (hidden, cols)), ((9 * n, hidden), (hidden, cols)), ((2 * n, 2 * n), (2 * n, cols))]]
    def run():
        for a, b in jobs:
            for _ in range(K): torch.mm(a, b)
    return run


def turns(runs, rounds):
    "Least processor time of each; they take turns, so that a busy moment hits all."
    best = [float("inf")] * len(runs)
    for _ in range(rounds):
        for i, run in enumerate(runs):
            start = time.process_time()
            run()
            best[i] = min(best[i], time.process_time() - start)
    return best


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("hidden", [64, 128, 256, 512])
@pytest.mark.filterwarnings("ignore:torch.lu is deprecated")
@pytest.mark.benchmark(group="flows, decoding 64x64", timer=time.process_time)
def test_decode(benchmark, hidden, batch):
    torch.manual_seed(0)
    x = torch.rand(max(batch, 2), *SHAPE) - .5
    ours, theirs = twins(hidden, x)
    x = x[:batch]
    with torch.no_grad():
        z, parts = ours(x)[0], theirs.inverse_and_log_det(x)[0]
        decode, decode_theirs = lambda: ours.inverse(z), lambda: theirs.forward_and_log_det(parts)[0]
        error, error_theirs = (float((run() - x).abs().max()) for run in (decode, decode_theirs))
        seconds, peers, bare = turns([decode, decode_theirs, bare_products(hidden, batch)], 10 if batch < 8 else 4)
        benchmark.pedantic(decode, rounds=3)
    benchmark.extra_info.update(hidden=hidden, batch=batch, faster=peers / seconds, over_bare=seconds / bare, peer_over_bare=peers / bare,
                                error=error, error_theirs=error_theirs, latent_rms=float(z.square().mean().sqrt()))


@pytest.mark.parametrize("hidden", [128, 512])
@pytest.mark.filterwarnings("ignore:torch.lu is deprecated")
@pytest.mark.benchmark(group="flows, encoding 64x64, batch 2", timer=time.process_time)
def test_encode(benchmark, hidden):
    torch.manual_seed(0)
    x = torch.rand(2, *SHAPE) - .5
    ours, theirs = twins(hidden, x)
    with torch.no_grad():
        seconds, peers = turns([lambda: ours(x), lambda: theirs.inverse_and_log_det(x)], 6)
        benchmark.pedantic(ours, args=(x,), rounds=3)
    benchmark.extra_info.update(hidden=hidden, faster=peers / seconds)
