"""The demo model: transformers' DeepseekV3ForCausalLM, with experts that train fast on a CPU.

Shapes: T tokens, K experts per token, E experts, D hidden, F expert width, S slots (T * K assignments plus padding).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

NUM_BUCKETS = 16
BIAS_STEP = 5e-3


def demo_config(vocab_size: int) -> DeepseekV3Config:
    """DeepSeek-V3's architecture, 11 million parameters: every feature is there, every width is small."""
    return DeepseekV3Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        moe_intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        n_shared_experts=1,
        n_routed_experts=256,
        num_experts_per_tok=8,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        first_k_dense_replace=1,
        q_lora_rank=64,
        kv_lora_rank=64,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=32,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.05,
        num_mtp_layers=0,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


class Regather(torch.autograd.Function):
    """Gather rows by an index whose inverse is known, so that the gradient is a gather too and not a scatter."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor, padding: Tensor | None) -> Tensor:
        """rows[index]; gradient rows named by `padding` are zero."""
        ctx.save_for_backward(inverse, padding)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of row r is the gradient of the one place it went to."""
        inverse, padding = ctx.saved_tensors
        grad = grads[0].index_select(0, inverse)
        if padding is not None:
            grad.index_fill_(0, padding, 0.0)
        return grad, None, None, None


def regather(rows: Tensor, index: Tensor, inverse: Tensor, padding: Tensor | None = None) -> Tensor:
    """`rows[index]`, differentiable; see Regather."""
    result: Tensor = Regather.apply(rows, index, inverse, padding)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True, kw_only=True)
class SlotPlan:
    """Where each assignment of a token to an expert goes: experts ordered by load, cut into buckets of equal size.

    Each expert of a bucket has as many slots as the bucket's largest one needs.
    """

    order_E: Tensor
    rank_E: Tensor
    bucket_sizes: list[int]
    slot_of_assignment: Tensor
    assignment_of_slot: Tensor
    padding: Tensor


def plan_slots(ids: Tensor, num_experts: int) -> SlotPlan:
    """The plan for assignments whose experts are `ids` (one dimension, token by token)."""
    loads_E = torch.bincount(ids, minlength=num_experts)
    order_E = torch.argsort(loads_E)
    rank_E = torch.argsort(order_E)
    per_bucket = num_experts // NUM_BUCKETS
    loads_E = loads_E[order_E]
    capacities = loads_E.view(NUM_BUCKETS, per_bucket)[:, -1].clamp(min=1)
    capacity_E = capacities.repeat_interleave(per_bucket)
    start_E = capacity_E.cumsum(0) - capacity_E
    first_E = loads_E.cumsum(0) - loads_E

    by_expert = torch.argsort(rank_E[ids], stable=True)
    place_of = torch.repeat_interleave(torch.arange(num_experts), loads_E)
    slots = start_E[place_of] + torch.arange(ids.numel()) - first_E[place_of]
    assignment_of_slot = torch.full((int(capacity_E.sum()),), -1).index_copy_(0, slots, by_expert)
    return SlotPlan(
        order_E=order_E,
        rank_E=rank_E,
        bucket_sizes=[int(capacity) * per_bucket for capacity in capacities],
        slot_of_assignment=torch.empty_like(ids).index_copy_(0, by_expert, slots),
        assignment_of_slot=assignment_of_slot.clamp(min=0),
        padding=(assignment_of_slot < 0).nonzero().squeeze(1),
    )


def bucketed_experts(experts: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The routed experts as a few batched products instead of a loop over 256 small ones.

    Same signature and result as transformers' own loop (DeepseekV3Experts.forward), four times as fast on two cores.
    """
    num_tokens, top_k = ids_TK.shape
    plan = plan_slots(ids_TK.reshape(-1), experts.num_experts)
    per_bucket = experts.num_experts // NUM_BUCKETS
    rows = x_TD.unsqueeze(1).expand(-1, top_k, -1).reshape(num_tokens * top_k, -1)
    x_SD = regather(rows, plan.assignment_of_slot, plan.slot_of_assignment)
    gate_up = torch.split(regather(experts.gate_up_proj, plan.order_E, plan.rank_E).mT, per_bucket)
    down = torch.split(regather(experts.down_proj, plan.order_E, plan.rank_E).mT, per_bucket)
    outputs = []
    for bucket, x in enumerate(torch.split(x_SD, plan.bucket_sizes)):
        gate, up = torch.bmm(x.view(per_bucket, -1, x.shape[-1]), gate_up[bucket]).chunk(2, dim=-1)
        outputs.append(torch.bmm(F.silu(gate) * up, down[bucket]).flatten(0, 1))
    y = regather(torch.cat(outputs), plan.slot_of_assignment, plan.assignment_of_slot, plan.padding)
    return torch.bmm(weights_TK.unsqueeze(1), y.view(num_tokens, top_k, -1)).squeeze(1)


def build_model(config: DeepseekV3Config) -> DeepseekV3ForCausalLM:
    """The model in float32, with the fast experts."""
    ALL_EXPERTS_FUNCTIONS.register("bucketed", bucketed_experts)
    config._experts_implementation = "bucketed"
    config._attn_implementation = "sdpa"
    return DeepseekV3ForCausalLM(config)


class LoadBalancer:
    """DeepSeek-V3's balance without an auxiliary loss (arXiv 2412.19437, section 2.1.2).

    After each step the bias of an overloaded expert goes down by a fixed amount, that of an underloaded one up. The
    bias takes part in the choice of experts only, never in their weights, so it distorts no gradient.
    """

    def __init__(self, model: nn.Module) -> None:
        self.routers = [module for module in model.modules() if isinstance(module, DeepseekV3TopkRouter)]
        self.loads = [torch.zeros(router.num_experts, dtype=torch.int64) for router in self.routers]
        for router, load in zip(self.routers, self.loads, strict=True):
            router.register_forward_hook(lambda module, args, output, load=load: self._count(output[2], load))

    @staticmethod
    def _count(ids_TK: Tensor, load: Tensor) -> None:
        load += torch.bincount(ids_TK.reshape(-1), minlength=load.numel())

    def take_loads(self) -> list[Tensor]:
        """Assignments per expert, one tensor a layer, since the last call."""
        loads = [load.clone() for load in self.loads]
        for load in self.loads:
            load.zero_()
        return loads

    def update_biases(self, loads: list[Tensor], step: float) -> None:
        """bias += step * sign(mean load - load)."""
        for router, load in zip(self.routers, loads, strict=True):
            counts = load.float()
            router.e_score_correction_bias.add_(torch.sign(counts.mean() - counts), alpha=step)


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of a linear head, 512 rows at a time: the logits of a batch never exist all at once."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> Tensor:
        """The loss; both gradients are computed on the way."""
        grad_hidden, grad_head = torch.empty_like(hidden_TD), torch.zeros_like(head_VD)
        total = hidden_TD.new_zeros(())
        for start in range(0, len(hidden_TD), 512):
            rows = slice(start, start + 512)
            targets = targets_T[rows].unsqueeze(1)
            logits = hidden_TD[rows] @ head_VD.T
            picked = logits.gather(1, targets)
            top = logits.amax(1, keepdim=True)
            exps = logits.sub_(top).exp_()
            sums = exps.sum(1, keepdim=True)
            total += (sums.log() + top - picked).sum()
            grad = exps.div_(sums).scatter_add_(1, targets, torch.full_like(sums, -1.0)).div_(len(hidden_TD))
            grad_hidden[rows] = grad @ head_VD
            grad_head.addmm_(grad.T, hidden_TD[rows])
        ctx.save_for_backward(grad_hidden, grad_head)
        return total / len(hidden_TD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the stored gradients."""
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * grads[0], grad_head * grads[0], None


def next_token_loss(model: DeepseekV3ForCausalLM, rows_BT: Tensor) -> Tensor:
    """Mean loss in nats of predicting each row's tokens from the ones before."""
    hidden = model.model(rows_BT[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)
    loss: Tensor = HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden, model.lm_head.weight, rows_BT[:, 1:].reshape(-1)
    )
    return loss
