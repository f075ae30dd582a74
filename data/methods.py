"""The methods to compare AFLoRA with, made from its layers: LoRA and ELoRA in a few lines.

Both train only what they leave trainable, and no freezer goes with them. The sources: Hu et al.
(arXiv 2106.09685) for LoRA, Kopiczko et al. (2310.11454) for ELoRA, which is published as VeRA.
"""

import torch
import torch.nn.functional as F

from aflora import AFLoRALinear, kaiming_uniform


class ELoRALinear(AFLoRALinear):
    """With frozen matrices of a high rank, scaling activations is cheaper than folding vectors."""

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        y = self.base(tokens)
        h = F.linear(tokens, self.lora_A.to(x.dtype)).to(y.dtype) * self.s_d.to(y.dtype)
        y = y + F.linear(h, self.lora_B.to(y.dtype)) * self.s_b.to(y.dtype)
        return y.view(*x.shape[:-1], -1)


@torch.no_grad()
def as_lora(layers, alpha=16):
    """Turns AFLoRA's layers into LoRA's: A divided by sqrt(6), B = 0, scaled by alpha / rank."""
    for layer in layers.values():
        layer.lora_A.div_(6**0.5)
        layer.lora_B.zero_()
        layer.s_d.fill_(alpha / len(layer.s_d))
        layer.s_b.fill_(1)
        layer.s_d.requires_grad_(False)
        layer.s_b.requires_grad_(False)


def as_elora(layers):
    """Turns AFLoRA's layers into ELoRA's: one frozen pair A, B per shape; the vectors train."""
    pairs = {}
    for layer in layers.values():
        shape = (layer.base.out_features, layer.base.in_features)
        seed, _, _ = layer.key.partition("/")
        layer.key = f"{seed}/{shape}"
        layer.__class__ = ELoRALinear
        if shape not in pairs:
            pairs[shape] = layer
            for name in ("lora_A", "lora_B"):
                matrix = getattr(layer, name).requires_grad_(False)
                matrix.copy_(kaiming_uniform(f"{layer.key}/{name}", matrix.shape))
        layer.lora_A = pairs[shape].lora_A
        layer.lora_B = pairs[shape].lora_B
