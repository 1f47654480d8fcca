"""The models that a command names: finds, checks and loads them in 4 bits, with their adapters.

``sources`` finds a model, ``validate_model`` checks that it is complete, ``pretrained`` and ``loading`` read it,
``conversion`` writes it in 4 bits; ``adapter_files`` reads an adapter, ``adapted`` puts it on its base.
"""

from .loading import Loader as Loader
from .loading import load_dense as load_dense
from .pretrained import load_tokenizer as load_tokenizer
from .pretrained import restore_use_cache as restore_use_cache
from .sources import DEFAULT_MODEL as DEFAULT_MODEL
from .sources import ModelSource as ModelSource
from .sources import package_files as package_files
from .sources import resolve as resolve
