"""diffusers (>= 0.35): ``QLoRAConfig`` in ``from_pretrained`` of its models and in ``PipelineQuantizationConfig``.

The modules are imported automatically: ``quantizer`` with diffusers' own quantizers, so that ``import qlora_ext`` is
enough for saved models to load, and ``models`` with the base class of its models, after the first 4-bit weight.
``take_over`` is imported after a call of ``qlora_ext.take_over_bitsandbytes()``.
"""
