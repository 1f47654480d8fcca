"""Integrations with transformers, diffusers, PEFT, bitsandbytes and torch's FSDP2, one package or module each.

Each is imported only when its library is. ``_patches`` lists every change to those libraries.
"""
