"""AdamW, its state, and the learning-rate schedule."""

import math

import torch

from weights import shards

BETAS = (0.9, 0.95)  # AdamW's


def make_optimizer(model, lr, weight_decay, pure=False):
    """AdamW over what is trained, its moments there from the start; `pure`: for bf16 weights without fp32 masters."""
    weights = [p for p in model.parameters() if p.requires_grad]
    if pure:
        optimizer = BF16AdamW(weights, lr=lr, weight_decay=weight_decay)
    else:
        optimizer = torch.optim.AdamW(
            weights, lr=lr, betas=BETAS, weight_decay=weight_decay, fused=True
        )
    for p in weights:
        optimizer.state[p] = init_adam_state(p)
    return optimizer


def init_adam_state(parameter):
    """AdamW's state of a parameter before its first update, by torch's names."""
    moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
    return {"step": torch.zeros((), dtype=torch.float32, device=parameter.device), **moments}


class BF16AdamW(torch.optim.Optimizer):
    """AdamW whose weights and moments are all bf16: 8 bytes a parameter, gradient included, where fp32 masters take 16.

    Updates far below a weight's last bit would be lost in rounding to nearest; rounded at random, up or down in proportion to the
    distance, they arrive on average (arXiv 1502.02551). Computed in fp32, some million weights at a time.
    """

    PIECE = 1 << 24

    def __init__(self, weights, lr, weight_decay, betas=BETAS, eps=1e-8):
        super().__init__(
            weights, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        )

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state |= init_adam_state(parameter)
                state["step"] += 1
                tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
                for part in zip(
                    *(
                        shards.local_shard(tensor)[0].flatten().split(self.PIECE)
                        for tensor in tensors
                    )
                ):
                    self.update(*part, state["step"], **group)

    @staticmethod
    def update(weight, grad, mean, square, step, *, lr, weight_decay, betas, eps, **_):
        grad = grad.float()
        new_mean, new_square = (
            mean.float().lerp(grad, 1 - betas[0]),
            square.float().lerp(grad * grad, 1 - betas[1]),
        )
        mean.copy_(new_mean)
        square.copy_(new_square)
        new_mean.div_(new_square.div_(1 - betas[1] ** step).sqrt_().add_(eps)).div_(
            1 - betas[0] ** step
        )
        weight.copy_(
            stochastic_round((weight.float() * (1 - lr * weight_decay)).sub_(new_mean, alpha=lr))
        )


def stochastic_round(x):
    """fp32 → the bf16 just below or above in size, as fp32, in proportion to how near they are: a bf16 is an fp32's first 16 bits."""
    bits = x.view(torch.int32)
    return torch.randint_like(bits, 1 << 16).add_(bits).bitwise_and_(-1 << 16).view(torch.float32)


ADAM_STATE = ("exp_avg", "exp_avg_sq")  # AdamW's, by torch's names


def lr_at(number, steps, peak, warmup):
    """Linear warm-up to `peak`, then half a cosine down to a tenth of it; `number` counts from 1."""
    climb = max(1, round(warmup * steps))
    if number <= climb:
        return peak * number / climb
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * (number - climb) / max(1, steps - climb))))
