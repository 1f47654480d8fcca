"""Adapters to the libraries around: transformers, PEFT, bitsandbytes' files. Imported only where they are used."""
