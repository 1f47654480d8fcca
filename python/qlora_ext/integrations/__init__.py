"""Integrations with transformers, diffusers, PEFT, bitsandbytes and torch's FSDP2, one package or module each.

Each is imported only where its library is used. What they change in those libraries is listed in ``_patches``.
"""
