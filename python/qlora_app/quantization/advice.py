"""Advice on how to improve a 4-bit model, derived from the measurements of ``check_model``."""

from __future__ import annotations

from qlora_ext.fidelity import ModelCheck

# The budget that is recommended, and the share of the loss that it has to recover to be recommended.
BUDGET, _MIN_SHARE = "5%", 0.1
# An increase below this many standard errors is not significant; below this many nats per token, it is small.
_ERRORS, _SMALL = 2.0, 0.005


def advice_on(check: ModelCheck) -> list[str]:
    """Recommendations, one sentence each, with the numbers behind them. Options are those of ``qlora-ext``."""
    if check.problems:
        return ["the model is damaged: quantize it again, or fetch it again"]
    if check.increase is None:
        return []
    advice = []
    worse = check.damaged or check.worse_than_plain
    found = ""
    if worse:
        layer = worse[0]
        found = (
            f"{len(worse)} of {len(check.layers)} layers have a larger error than plain NF4 of the dense model, the "
            f"largest in {layer.name} (error {layer.error:.3f}, plain NF4 {layer.plain_error:.3f})"
        )
    if check.damaged:
        advice.append(f"quantize again: {found}: its codes or scales are damaged, or belong to another model")
    elif worse and not check.is_calibrated:
        advice.append(f"quantize again, unless an adapter was merged into these 4 bits: {found}")
    if check.increase.nats < max(_SMALL, _ERRORS * check.increase.error):
        return advice or ["nothing: the increase of the loss is small, or not significant on this text"]
    if worse and not advice:
        advice.append(
            f"calibrate on text like this one: on this text {found}; calibration reduces the errors of the layers' "
            "outputs on its own text"
        )
    elif not worse and not check.is_calibrated:
        advice.append(
            f"calibrate: the layers are plain NF4, which costs {check.increase.nats:.3f} nats per token on this text; "
            "quantize --calibrate self makes a better model of the same size"
        )
    chosen = check.chosen(BUDGET)
    total = sum(layer.loss for layer in check.layers)
    share = sum(layer.loss for layer in chosen) / total if total > 0 else 0.0
    if chosen and share >= _MIN_SHARE:
        size = sum(layer.extra_bytes for layer in chosen)
        advice.append(
            f"keep {len(chosen)} layers in 16 bits: quantize --keep {BUDGET} adds {size / 1e6:.1f} MB and avoids an "
            f"estimated {share:.0%} of the loss that 4 bits cost: {', '.join(layer.name for layer in chosen[:3])}"
            + (f" and {len(chosen) - 3} more" if len(chosen) > 3 else "")
        )
    return advice or ["nothing: the layers are calibrated, and no few of them cost most of the loss"]
