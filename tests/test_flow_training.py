"Fitting flows: the same run however often it is killed, and files that cannot be mistaken."
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from fairbook import flow_training
from fairbook.flow_training import _half, _order, fit_flow, load_flow, save_flow, save_tensors
from fairbook.flows import Glow, VectorFlow

ROWS = torch.randn(60, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1., 2., .5]) + 1
PICTURES = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def vector():
    torch.manual_seed(1)
    return VectorFlow(3, 2, 8)

def glow():
    torch.manual_seed(1)
    return Glow((3, 8, 8), K=1, L=2, hidden=8)

CASES = [(vector, ROWS), (glow, PICTURES)]
same = lambda a, b: all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize("make, data", CASES)
@pytest.mark.parametrize("kill", [1, 3])
def test_a_killed_run_ends_as_an_undisturbed_one(make, data, kill, tmp_path, monkeypatch):
    path, count = tmp_path / "run.safetensors", []
    def save_then_die(*args):
        save_tensors(*args)
        count.append(1)
        if len(count) == kill: raise KeyboardInterrupt
    options = dict(epochs=4, batch_size=16, checkpoint=path, validation=data[:10])
    monkeypatch.setattr(flow_training, "save_tensors", save_then_die)
    with pytest.raises(KeyboardInterrupt): fit_flow(make(), data, **options)
    monkeypatch.undo()
    torch.rand(7)                                                      # another process has other random numbers
    resumed, whole = make(), make()
    torch.rand(3)
    a, b = fit_flow(resumed, data, **options), fit_flow(whole, data, **options | dict(checkpoint=None))
    assert a.resumed_at == kill and a.losses == b.losses and a.validation == b.validation and same(resumed, whole)
    assert fit_flow(make(), data, **options).resumed_at == 4           # nothing left to do


@pytest.mark.parametrize("make, data", CASES)
def test_likelihood_rises_and_reads_as_documented(make, data):
    flow = make()
    before = torch.get_rng_state()
    fit = fit_flow(flow, data, epochs=12, batch_size=20, learning_rate=3e-3)
    assert torch.equal(before, torch.get_rng_state()) and not flow.training and fit.validation == [] and len(fit.losses) == 12
    assert fit.losses[-1] < fit.losses[1]


def test_validation_is_the_mean_of_minus_log_p_per_number():
    flow = vector()
    fit = fit_flow(flow, ROWS[:40], epochs=2, validation=ROWS[40:])
    with torch.no_grad(): assert fit.validation[-1] == pytest.approx(-flow.log_prob(ROWS[40:]).mean().item() / 3, rel=1e-5)


@given(st.integers(2, 50), st.integers(2, 60), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_every_row_once_and_no_lonely_one(n, batch, epoch):
    order = _order(n, batch, 0, epoch)
    assert sorted(torch.cat(order).tolist()) == list(range(n)) and min(map(len, order)) >= 2
    assert n < 8 or not torch.equal(torch.cat(order), torch.cat(_order(n, batch, 0, epoch + 1)))


def test_half_precision_is_in_the_couplings_only_and_goes_away():
    flow, seen = vector(), []
    watch = [m.register_forward_hook(lambda m, args, out: seen.append((type(m).__name__, out.dtype))) for m in flow.modules() if isinstance(m, torch.nn.Linear)]
    with pytest.raises(ZeroDivisionError), _half(flow, torch.device("cpu")):
        z, log_det = flow(ROWS)
        assert z.dtype == log_det.dtype == torch.float32 and {d for _, d in seen} == {torch.bfloat16}
        1 / 0
    seen.clear()
    flow(ROWS)
    assert {d for _, d in seen} == {torch.float32} and not torch.is_autocast_enabled("cpu")
    for h in watch: h.remove()
    assert math.isfinite(fit_flow(flow, ROWS, epochs=2, bf16=True).losses[-1])


def test_a_flow_comes_back(tmp_path):
    flow = vector()
    path = save_flow(flow, tmp_path / "new" / "flow.safetensors")
    assert same(load_flow(VectorFlow(3, 2, 8), path), flow)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged"): load_flow(flow, path)


@pytest.mark.parametrize("other, words", [(lambda: VectorFlow(3, 3, 8), "missing"), (lambda: VectorFlow(3, 1, 8), "unknown"), (lambda: VectorFlow(3, 2, 16), "in the file")])
def test_weights_of_another_flow(tmp_path, other, words):
    with pytest.raises(ValueError, match=f"belongs to another flow.*{words}"): load_flow(other(), save_flow(vector(), tmp_path / "a.safetensors"))
    run = tmp_path / "run.safetensors"
    fit_flow(vector(), ROWS, epochs=1, checkpoint=run)
    with pytest.raises(ValueError, match="belongs to another flow"): fit_flow(other(), ROWS, epochs=2, checkpoint=run)


@pytest.mark.parametrize("change, words", [
    (dict(epochs=0), "epochs must be at least 1"), (dict(batch_size=1), "batch_size must be at least 2"), (dict(data=ROWS[:1]), "at least 2 rows"), (dict(data=[[1., 2.]]), "must be a tensor"),
    (dict(data=ROWS.clone().index_fill_(0, torch.tensor([3]), math.nan)), "1 rows are not"), (dict(validation=ROWS[:1]), "validation"), (dict(learning_rate=1e9), "the loss is"),
])
def test_bad_input(untyped, change, words):
    with pytest.raises(ValueError, match=words): fit_flow(vector(), **dict(data=ROWS, epochs=3) | change)


def test_a_longer_run_is_not_cut(tmp_path):
    fit_flow(vector(), ROWS, epochs=3, checkpoint=tmp_path / "run.safetensors")
    with pytest.raises(ValueError, match="holds 3 epochs"): fit_flow(vector(), ROWS, epochs=2, checkpoint=tmp_path / "run.safetensors")
