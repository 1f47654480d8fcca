"""Adapters merged into 4-bit weights: the codes, the layers of PEFT models, and training for the merged model.

``codes.py`` adds an update to a weight, and needs torch only. The other modules need PEFT, whose integration imports
them: ``layers.py`` has what PEFT's layers over 4-bit modules share, ``merge.py`` merges a model, ``weights.py`` reads
its weights without and with adapters, ``merge_aware.py`` trains with the merged weights, and ``target_format.py``
encodes a base in the format in which it will be served.
"""

from .codes import merged_weight as merged_weight
