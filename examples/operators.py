"""Trains a low-rank update of one frozen 4-bit weight through torch.ops alone: no module, and no autograd.

    python examples/operators.py

``linear_nf4_with_h`` returns h = scaling * dropout(x) @ A.T beside y, ``linear_nf4_dx_with_g`` returns
g = scaling * dy @ B beside dx, and ``linear_nf4_dlora`` takes both, so that training computes nothing twice.
"""

import torch

import qlora_ext  # registers the operators

assert qlora_ext
ops = torch.ops.qlora
generator = torch.Generator().manual_seed(0)
TOKENS, N, K, RANK, BLOCK = 64, 96, 128, 8, 64

weight = torch.randn(N, K, generator=generator) / K**0.5
packed, scales = ops.quantize_nf4(weight, BLOCK)  # uint8, two codes per byte; a float32 scale per block
coded, nested, offset = ops.quantize_absmax(scales, 256)  # double quantization: 8-bit scales
w4 = (packed, coded, nested, offset, BLOCK, 256)
stored = sum(t.nbytes for t in (packed, coded, nested, offset))
print(f"{weight.nbytes} bytes in float32, {stored} in 4 bits")

x = torch.randn(TOKENS, K, generator=generator)
update = torch.randn(N, RANK, generator=generator) @ torch.randn(RANK, K, generator=generator) / K
target = ops.linear_nf4(x, *w4, N, None, None, None, 0.0, 0.0, 0) + x @ update.T  # what A and B have to learn
a = torch.randn(RANK, K, generator=generator) / K**0.5
b = torch.zeros(N, RANK)
scaling, dropout, seed = 2.0, 0.0, 0

for step in range(301):
    y, h = ops.linear_nf4_with_h(x, *w4, N, None, a, b, scaling, dropout, seed)
    dy = (y - target) / TOKENS  # the gradient of half the squared error, per token
    dx, g = ops.linear_nf4_dx_with_g(dy, *w4, K, a, b, scaling, dropout, seed)  # dx is for the layer before
    da, db = ops.linear_nf4_dlora(dy, x, a, b, scaling, dropout, seed, None, h, g)
    a -= 0.1 * da
    b -= 0.1 * db
    if step % 100 == 0:
        print(f"step {step}  error {(y - target).square().mean().item():.6f}")
