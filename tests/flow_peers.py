"The same functions in other libraries: `normflows_twin` of an additive Glow, `zuko_twin` of a VectorFlow, with copied weights. Shared by tests and benchmarks."
import torch


def normflows_glow(shape, K, L, hidden):
    "The flow of normflows with the architecture of an additive `Glow`, but for the priors, which are not the splits'. z -> x is its forward direction."
    import normflows as nf
    c, h, w = shape
    blocks = [[nf.flows.GlowBlock(c * 2**(L + 1 - i), hidden, split_mode="channel", scale=False) for _ in range(K)] + [nf.flows.Squeeze()] for i in range(L)]
    sizes = [(c * 2**(L + 1), h // 2**L, w // 2**L)] + [(c * 2**(L - i), h // 2**(L - i), w // 2**(L - i)) for i in range(1, L)]
    return nf.MultiscaleFlow([nf.distributions.DiagGaussian(s) for s in sizes], blocks, [nf.flows.Merge() for _ in range(L - 1)])


def _copy_step(step, block):
    "One step of ours into a GlowBlock, whose list runs from z to x and whose coupling adds where ours subtracts."
    coupling, mix, norm = block.flows
    net, theirs = step.coupling.net, [m for m in coupling.flows[1].param_map.net if hasattr(m, "weight")]
    for (w, b), conv in zip([(net.first.weight, net.first.bias), (net.second.weight, net.second.bias),
                             (-net.last.weight * net.gain()[:, None, None, None], -net.last.bias * net.gain())], theirs, strict=True):
        assert conv.weight.shape == w.shape
        conv.weight.copy_(w), conv.bias.copy_(b)
    packed = step.mix.packed
    mix.P.copy_(torch.eye(len(packed), dtype=packed.dtype, device=packed.device)[step.mix.order])
    for tensor, value in (mix.L, packed.tril(-1)), (mix.U, packed.triu(1)), (mix.sign_S, step.mix.sign), (mix.log_S, packed.diagonal()): tensor.copy_(value)
    norm.s.copy_(-step.norm.log_scale.view_as(norm.s)), norm.t.copy_(-step.norm.bias.view_as(norm.t))
    norm.data_dep_init_done = torch.tensor(1.)


@torch.no_grad()
def normflows_twin(glow):
    "`glow` (additive, LU, n_bits=None) in normflows: `inverse_and_log_det(x)` gives the parts of the latent, coarsest first, and the log-determinant."
    step = glow.levels[0].steps[0]
    twin = normflows_glow(glow.image_shape, len(glow.levels[0].steps), len(glow.levels), step.coupling.net.first.out_channels).to(step.norm.bias.dtype)
    for level, blocks in zip(reversed(glow.levels), twin.flows, strict=True):
        for ours, block in zip(reversed(level.steps), blocks): _copy_step(ours, block)
    return twin.eval()


def zuko_twin(flow):
    "A `VectorFlow` in zuko's transforms, with the layers' parameters: `call_and_ladj(x)` gives latent and log-determinant."
    import zuko.transforms as T
    from torch.distributions.transforms import AffineTransform
    steps = []
    for step in flow.steps:
        norm, mix, coupling = step.norm, step.mix, step.coupling
        steps.append(AffineTransform(norm.bias * norm.log_scale.exp(), norm.log_scale.exp(), event_dim=0))
        if mix.mixing == "lu":
            A = mix.packed
            L, U = A.tril(-1) + torch.eye(len(A), dtype=A.dtype), A.triu(1) + (mix.sign * A.diagonal().exp()).diag()
            d = U.diagonal()
            steps += [T.LULinearTransform((L * d).tril() + (U / d[:, None]).triu(1)), T.PermutationTransform(mix.order)]
        else:                                                                       # zuko has no Cayley transform: its exponential of the matching angle
            steps.append(T.RotationTransform(_half_log(mix._build().detach())))
        def meta(a, c=coupling):
            out = c.net(a)
            t, s = (out, torch.zeros_like(out)) if out.shape[-1] == c.sizes[1] else (out[:, :c.sizes[1]], c.bound * torch.tanh(out[:, c.sizes[1]:] / c.bound))
            return T.DependentTransform(AffineTransform(t, s.exp()), 1)
        steps.append(T.CouplingTransform(meta, torch.arange(flow.dim) < coupling.sizes[0]))
    return T.ComposedTransform(*[T.DependentTransform(s, 1) if s.domain.event_dim == 0 else s for s in steps])


def _half_log(W):
    "A with exp(A - A^T) = W, for a rotation W without eigenvalue -1."
    values, vectors = torch.linalg.eig(W)
    log = (vectors @ torch.diag(values.log()) @ torch.linalg.inv(vectors)).real
    return (log - log.T) / 4
