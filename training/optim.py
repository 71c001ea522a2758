"""The optimizers, the state that a checkpoint saves of them, and the learning-rate schedule."""

import math

import torch
from torch import nn

from weights import shards

BETAS = (0.9, 0.95)
ADAM_STATE = ("exp_avg", "exp_avg_sq")  # torch's names of the two moments


def make_optimizer(
    model: nn.Module, lr: float, weight_decay: float, pure_bf16: bool = False
) -> torch.optim.Optimizer:
    """Make AdamW over the trainable parameters, its state allocated.

    `pure_bf16`: the variant for bf16 weights without fp32 masters.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    if pure_bf16:
        optimizer: torch.optim.Optimizer = BF16AdamW(weights, lr=lr, weight_decay=weight_decay)
    else:
        optimizer = torch.optim.AdamW(
            weights, lr=lr, betas=BETAS, weight_decay=weight_decay, fused=True
        )
    for parameter in weights:
        optimizer.state[parameter] = init_adam_state(parameter)
    return optimizer


def init_adam_state(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """Make AdamW's state of a parameter before its first update."""
    state = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device)}
    return state | {name: torch.zeros_like(parameter) for name in ADAM_STATE}


def compile_update(optimizer: torch.optim.Optimizer) -> None:
    """Compile BF16AdamW's update: one pass over 14 bytes a weight, not 162. fp32's is fused."""
    if isinstance(optimizer, BF16AdamW):
        optimizer.update = torch.compile(optimizer.update, dynamic=True)  # type: ignore[method-assign]


# --- what others may ask of an optimizer


def saved_state(optimizer, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what a checkpoint saves of a parameter's state: tensors of the parameter's shape."""
    return {name: optimizer.state[parameter][name] for name in ADAM_STATE}


def state_bytes(optimizer) -> int:
    """Return the size of the whole state."""
    states = optimizer.state.values()
    return sum(tensor.nbytes for state in states for tensor in state.values())


def update_count(optimizer) -> int:
    """Return the number of updates so far. A step without targets makes none."""
    return int(next(iter(optimizer.state.values()))["step"])


def set_update_count(optimizer, count: int) -> None:
    for state in optimizer.state.values():
        state["step"].fill_(count)


def set_lr(optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


# --- AdamW in bf16


class BF16AdamW(torch.optim.Optimizer):
    """AdamW with weights and moments in bf16: 8 bytes a parameter with its gradient, not 16.

    Rounding to nearest would lose updates far below a weight's last bit. Stochastic rounding
    (arXiv 1502.02551) keeps them on average. It computes in fp32, CHUNK_SIZE weights at a time.
    """

    CHUNK_SIZE = 1 << 24

    def __init__(self, weights, lr, weight_decay, betas=BETAS, eps=1e-8):
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__(weights, defaults)

    @torch.no_grad()
    def step(self):  # type: ignore[override]  # without a closure
        for group in self.param_groups:
            settings = [group[name] for name in ("lr", "weight_decay", "betas", "eps")]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state |= init_adam_state(parameter)
                state["step"] += 1
                chunks = []
                for tensor in (parameter, parameter.grad, *(state[name] for name in ADAM_STATE)):
                    local, _ = shards.local_shard(tensor)
                    chunks.append(local.flatten().split(self.CHUNK_SIZE))
                for weight, grad, exp_avg, exp_avg_sq in zip(*chunks):
                    self.update(weight, grad, exp_avg, exp_avg_sq, state["step"], *settings)

    @staticmethod
    def update(weight, grad, exp_avg, exp_avg_sq, step, lr, weight_decay, betas, eps):
        """Update a chunk of weights and its moments in place."""
        grad = grad.float()
        mean = exp_avg.float().lerp(grad, 1 - betas[0])
        square = exp_avg_sq.float().lerp(grad * grad, 1 - betas[1])
        exp_avg.copy_(mean)
        exp_avg_sq.copy_(square)
        # From here on in place: `mean` becomes the update.
        denominator = square.div_(1 - betas[1] ** step).sqrt_().add_(eps)
        mean.div_(denominator).div_(1 - betas[0] ** step)
        decayed = weight.float() * (1 - lr * weight_decay)
        weight.copy_(stochastic_round(decayed.sub_(mean, alpha=lr)))


def stochastic_round(x: torch.Tensor) -> torch.Tensor:
    """Round fp32 values to one of the two nearest bf16 values, the nearer the likelier.

    Returns them as fp32. A bf16 number is the first 16 bits of an fp32 number.
    """
    bits = x.view(torch.int32)
    return torch.randint_like(bits, 1 << 16).add_(bits).bitwise_and_(-1 << 16).view(torch.float32)


# --- the learning rate


def lr_at(step: int, steps: int, peak: float, warmup: float) -> float:
    """Return the rate of `step` (from 1): linear warm-up to `peak`, then a cosine to a tenth."""
    warmup_steps = max(1, round(warmup * steps))
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
