"""What would make a 4-bit model better, by what was measured of it."""

from __future__ import annotations

from .check import ModelCheck

# As advice: a budget, and the share of the loss's estimated rise that it has to win back to be worth its bytes.
BUDGET, _WORTH = "5%", 0.1
# An increase that is not told from none, in its standard errors; or too small to look for, in nats per token.
_ERRORS, _SMALL = 2.0, 0.005


def advice_on(check: ModelCheck) -> list[str]:
    """Sentences about what to do, each with the figures that it rests on; the options are those of ``qlora-ext``.

    Example:
        >>> found = qlora_ext.fidelity.ModelCheck(["up: every scale is zero"], tokens=512, bytes=1000)
        >>> qlora_ext.fidelity.advice_on(found)
        ['the model is damaged: quantize it again, or fetch it again']
    """
    if check.problems:
        return ["the model is damaged: quantize it again, or fetch it again"]
    if check.increase is None:
        return []
    said = []
    worse = check.damaged or check.worse_than_plain
    if worse:
        layer = worse[0]
        found = (
            f"{len(worse)} of {len(check.layers)} layers have a larger error than plain NF4 of the dense model, the "
            f"largest in {layer.name} (error {layer.error:.3f}, plain NF4 {layer.plain_error:.3f})"
        )
        said.append(
            f"quantize again: {found}: its codes or scales are another model's, or damaged"
            if check.damaged
            else f"quantize again, unless an adapter was merged into these 4 bits: {found}"
        )
    if check.increase.nats < max(_SMALL, _ERRORS * check.increase.error):
        return said or ["nothing: the increase of the loss is small, or not told from none on this text"]
    if not worse and not check.is_calibrated:
        said.append(
            f"calibrate: the layers are plain NF4, which costs {check.increase.nats:.3f} nats per token here; quantize "
            "--calibrate self makes a better model of the same size"
        )
    kept = check.chosen(BUDGET)
    whole = sum(layer.loss for layer in check.layers)
    share = sum(layer.loss for layer in kept) / whole if whole > 0 else 0.0
    if kept and share >= _WORTH:
        size = sum(layer.extra_bytes for layer in kept)
        said.append(
            f"keep {len(kept)} layers in 16 bits: quantize --keep {BUDGET} adds {size / 1e6:.1f} MB, and they make an "
            f"estimated {share:.0%} of what 4 bits cost: {', '.join(layer.name for layer in kept[:3])}"
            + (f" and {len(kept) - 3} more" if len(kept) > 3 else "")
        )
    return said or ["nothing: the layers cost about the same each, and are calibrated"]
