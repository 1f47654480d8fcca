"""Integrations with transformers, diffusers, PEFT, bitsandbytes and torch's FSDP2, one package or module each.

Each is imported when its library is, and after the first 4-bit weight. ``_patches`` lists every change to those
libraries.
"""
