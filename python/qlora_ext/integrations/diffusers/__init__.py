"""diffusers (>= 0.35): ``QLoRAConfig`` in ``from_pretrained`` of its models and in ``PipelineQuantizationConfig``.

The modules are imported automatically: ``quantizer`` with diffusers' own quantizers, ``models`` with the base class of
its models, ``lora`` with its loaders of LoRA files. ``import qlora_ext`` is thus enough for saved models to load.
``take_over`` is imported after a call of ``qlora_ext.take_over_bitsandbytes()``.
"""
