"""A mixture of experts in place of the feed-forward: a router, grouped experts, and a shared expert beside them.

The experts' weights are stacked, [E, N, K], and applied by a grouped product: they are no `nn.Linear`s, so
`target_modules="all-linear"` adapts the router and the shared expert and leaves routed experts as they are;
`target_parameters=["experts.w1", "experts.w2", "experts.w3"]` adapts these, too.

Legend of shapes: T tokens, D width, F feed-forward size, E experts, P experts that a token is sent to.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import (
    all_gather_tensor,
    all_gather_tensor_autograd,
    all_to_all_single,
    all_to_all_single_autograd,
    reduce_scatter_tensor_autograd,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard

from llama3.config import LlamaConfig


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply rows `x` [M, K], sorted by expert, by their expert's `weight` [E, N, K]: [M, N].

    bfloat16 takes torch's grouped product, which compiled code has for no other dtype. There every expert multiplies
    all rows and the rows of others are dropped: E times the work, and sizes that do not depend on the routing.

    Args:
        x: the rows.
        weight: of all experts.
        ends: int32 [E], the end of each expert's rows. Rows behind the last end are nobody's; what they get is
            unspecified.
    """
    if x.dtype == torch.bfloat16:
        return F.grouped_mm(x, weight.transpose(-2, -1), offs=ends)
    expert = (torch.arange(len(x), device=x.device) >= ends[:, None]).sum(0)
    products = [torch.where((expert == e)[:, None], F.linear(x, w), 0.0) for e, w in enumerate(weight)]
    return torch.stack(products).sum(0)


class Experts(nn.Module):
    """E SwiGLUs, each applied to the rows that were sent to it."""

    def __init__(self, config: LlamaConfig, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        sizes = {"w1": (config.ffn_dim, config.dim), "w2": (config.dim, config.ffn_dim)}
        sizes["w3"] = sizes["w1"]
        for name, size in sizes.items():
            setattr(self, name, nn.Parameter(torch.empty(config.n_experts, *size, dtype=dtype)))

    w1: nn.Parameter
    w2: nn.Parameter
    w3: nn.Parameter

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Map rows `x` [T * P, D], sorted by expert, to rows of the same size.

        Args:
            x: the rows.
            ends: int32 [E], the end of each expert's rows. Rows behind the last end are nobody's.
        """
        gate, up = (grouped_product(x, _local(weight), ends) for weight in (self.w1, self.w3))
        return grouped_product(F.silu(gate) * up, _local(self.w2), ends)

    def init_weights(self, output_std: float) -> None:
        nn.init.trunc_normal_(self.w1, std=0.02)
        for weight in (self.w2, self.w3):
            nn.init.trunc_normal_(weight, std=output_std)


def _local(weight: Tensor) -> Tensor:
    """This rank's experts."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


class Router(nn.Module):
    """Chooses P experts for each token, and how much of each."""

    def __init__(self, config: LlamaConfig, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.chosen = config.experts_per_token
        self.gate = nn.Linear(config.dim, config.n_experts, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """For tokens `x` [T, D]: the weights of their experts [T, P], which sum to 1, and the experts [T, P]."""
        scores, experts = self.choose(self.gate(x))
        accurate = torch.promote_types(scores.dtype, torch.float32)
        return scores.softmax(-1, dtype=accurate).to(x.dtype), experts

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Of the scores of all experts [T, E]: those of the best P, and which these are."""
        best, experts = scores.topk(self.chosen)
        return best, experts


class MixtureOfExperts(nn.Module):
    """The sum of a shared expert and of the routed ones that each token is sent to.

    Args:
        config: the size.
        shared: the expert that sees every token, a `FeedForward`.
        dtype: of all parameters.
    """

    def __init__(self, config: LlamaConfig, shared: Any, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.router = Router(config, dtype)
        self.experts = Experts(config, dtype)
        self.count = config.n_experts
        self.shared = shared
        self.ranks: DeviceMesh | None = None
        """The ranks that hold the experts between them; None where this rank holds all of them."""
        self.parts: DeviceMesh | None = None
        """The tensor-parallel ranks, which hold some channels of each expert; None where this rank holds all."""
        self.exchange = False
        """Whether `ranks` exchange the tokens that are asked for, instead of collecting all of them."""

    @property
    def held(self) -> int:
        """How many experts this rank holds: all, or its part of them."""
        return self.count // (self.ranks.size() if self.ranks is not None else 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, S, D] to [B, S, D]; under tensor parallelism to this rank's part of the sequence."""
        whole: Any = x
        # With some channels of each expert, this rank's outputs and gradients are terms of a sum over `parts`.
        own = x if self.parts is None else whole.to_local(grad_placements=[Partial()])
        tokens = own.flatten(0, 1)
        weights, experts = self.router(tokens)
        routed: Any = self.routed(tokens, weights, experts).view_as(own)
        if self.parts is not None:
            terms = DTensor.from_local(routed, self.parts, [Partial()], run_check=False)
            routed = terms.redistribute(placements=[Shard(1)]).to_local()
        return self.shared(x) + routed

    def routed(self, tokens: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Send tokens [T, D] to their experts [T, P] and sum what comes back by `weights` [T, P]: [T, D].

        With experts on several ranks, each rank collects the tokens of all, does what is for its own experts, and
        gives every rank its sums. That moves more than an exchange of what is asked for, but the sizes of a compiled
        graph do not depend on where tokens go; `exchange` chooses the other way.
        """
        if self.ranks is None:
            return self._own(tokens, weights, experts, 0)
        if self.exchange:
            return self._exchanged(tokens, weights, experts, (self.ranks, 0))
        group = (self.ranks, 0)
        tokens, weights = (all_gather_tensor_autograd(t, 0, group) for t in (tokens.contiguous(), weights.contiguous()))
        experts = all_gather_tensor(experts.contiguous(), 0, group)
        first = self.ranks.get_local_rank() * self.held
        return reduce_scatter_tensor_autograd(self._own(tokens, weights, experts, first), "sum", 0, group)

    def _exchanged(self, tokens: Tensor, weights: Tensor, experts: Tensor, group: Any) -> Tensor:
        """The sums of this rank's tokens, by an all-to-all there and one back, of sizes that are read on the way."""
        count, chosen, held = self.count, experts.flatten(), self.held
        order = chosen.argsort(stable=True)
        sources = order // experts.shape[1]
        sent = (chosen == torch.arange(count, device=chosen.device)[:, None]).sum(-1)  # [E], by this rank
        got = all_to_all_single(sent, None, None, group).view(-1, held)  # [ranks, own experts], by each rank
        there, here = sent.view(-1, held).sum(-1).tolist(), got.sum(-1).tolist()
        rows = all_to_all_single_autograd(tokens[sources], here, there, group)
        # They come by rank and then by expert.
        expert = torch.arange(held, device=got.device).repeat(len(got)).repeat_interleave(got.flatten())
        by_expert = expert.argsort(stable=True)
        outputs = self.experts(rows[by_expert], got.sum(0).cumsum(0).to(torch.int32))
        back = all_to_all_single_autograd(outputs[by_expert.argsort()], there, here, group)
        return torch.zeros_like(tokens).index_add(0, sources, back * weights.flatten()[order, None])

    def _own(self, tokens: Tensor, weights: Tensor, experts: Tensor, first: int) -> Tensor:
        """The part of the sums that experts `first`, `first` + 1, ... of this rank contribute."""
        held = self.held
        own = experts.flatten() - first
        own = torch.where((own >= 0) & (own < held), own, held)  # behind the last: somebody else's
        order = own.argsort(stable=True)
        # By comparison: the sizes of a compiled graph must not depend on where tokens go.
        ends = (own == torch.arange(held, device=own.device)[:, None]).sum(-1).cumsum(0).to(torch.int32)
        sources = order // experts.shape[1]
        mine = (own[order] < held)[:, None]
        # Both ways: what a grouped product leaves in the rows of nobody, and in their gradients, is unspecified. Before
        # it is weighted, or the gradient of the weights has a zero times whatever that is.
        rows = torch.where(mine, tokens[sources], 0.0)
        outputs = torch.where(mine, self.experts(rows, ends), 0.0) * weights.flatten()[order, None]
        return torch.zeros_like(tokens).index_add(0, sources, outputs)

    def init_weights(self, output_std: float) -> None:
        nn.init.trunc_normal_(self.router.gate.weight, std=0.02)
        self.experts.init_weights(output_std)
        cast(Any, self.shared).init_weights(output_std)
