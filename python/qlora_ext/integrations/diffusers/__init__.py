"""diffusers (>= 0.35): ``QLoRAConfig`` in ``from_pretrained`` of its models and in ``PipelineQuantizationConfig``.

``quantizer`` is imported by itself as soon as diffusers loads its own quantizers, ``models`` as soon as it loads the
base class of its models, and ``lora`` as soon as it loads its LoRA files' loaders, so that ``import qlora_ext`` is
enough for saved models to be recognised. ``take_over`` waits for ``qlora_ext.take_over_bitsandbytes()``.
"""
