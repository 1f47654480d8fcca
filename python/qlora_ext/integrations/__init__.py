"""Adapters to the libraries around, a room each: transformers, PEFT, bitsandbytes, torch's FSDP2.

Each is imported only where its library is used. What they change in those libraries is listed in ``_patches``.
"""
