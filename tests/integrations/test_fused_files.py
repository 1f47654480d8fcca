"""4-bit models of families whose files fuse, transpose or rename weights are saved and loaded bit for bit."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
import transformers

from qlora_ext import QLoRAConfig, quantize_model
from qlora_ext.nn import Linear4bit

IDS = torch.arange(3, 15)[None]
SIZES = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
# Nomic-BERT's files store q, k and v in one tensor.
CONFIG = {"NomicBert": {**SIZES, "intermediate_size": 96, "max_position_embeddings": 64}}


def dense(tmp_path: pathlib.Path) -> pathlib.Path:
    if not hasattr(transformers, "NomicBertConfig"):
        pytest.skip(f"transformers {transformers.__version__} has no Nomic-BERT")
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(transformers.NomicBertConfig(**CONFIG["NomicBert"]))
    model.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def load(path: pathlib.Path, **options: Any) -> Any:
    return transformers.AutoModel.from_pretrained(path, dtype=torch.float32, **options).eval()


def check(again: Any, model: Any) -> None:
    assert any(isinstance(m, Linear4bit) for m in again.modules())
    assert torch.equal(again(IDS)[0], model(IDS)[0])


@pytest.mark.parametrize("double_quant", [True, False])
def test_saved_as_bitsandbytes(double_quant: bool, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from qlora_ext.integrations.bitsandbytes import save_pretrained

    model = load(dense(tmp_path), quantization_config=QLoRAConfig(double_quant=double_quant))
    save_pretrained(model, tmp_path / "bitsandbytes")
    theirs = load(tmp_path / "bitsandbytes")  # with bitsandbytes' layers
    torch.testing.assert_close(theirs(IDS)[0], model(IDS)[0], rtol=1e-2, atol=1e-2)
    check(load(tmp_path / "bitsandbytes", quantization_config=QLoRAConfig()), model)


def test_saved_by_sentence_transformers(tmp_path: pathlib.Path) -> None:
    sentence_transformers = pytest.importorskip(
        "sentence_transformers", reason="sentence-transformers is not installed"
    )
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    path = dense(tmp_path)
    words = {f"[{name}]": i for i, name in enumerate(("PAD", "UNK", "CLS", "SEP"))} | {
        f"w{i}": i + 4 for i in range(99)
    }
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(path)
    word = sentence_transformers.models.Transformer(
        str(path), model_args={"quantization_config": QLoRAConfig(), "dtype": torch.float32}
    )
    pooling = sentence_transformers.models.Pooling(word.get_word_embedding_dimension())
    model = sentence_transformers.SentenceTransformer(modules=[word, pooling], device="cpu")
    model.save(str(tmp_path / "saved"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    text = ["w1 w2 w3", "w4"]
    assert (model.encode(text) == again.encode(text)).all()
    assert any(isinstance(m, Linear4bit) for m in again.modules())


def test_a_weight_whose_file_name_is_a_module_here(tmp_path: pathlib.Path) -> None:
    """A file's ``gate`` is the model's ``gate.weight``. Scales of packed weights must not be named by this rule."""
    loading = pytest.importorskip("transformers.core_model_loading", reason="transformers < 5 renames nothing")
    from qlora_ext.integrations.transformers import conversions

    model = torch.nn.ModuleDict({"gate": torch.nn.Linear(64, 64), "mlp": torch.nn.Linear(64, 64)})
    quantize_model(model)
    lossy = loading.WeightRenaming(r"^gate", "gate.weight")
    harmless = loading.WeightRenaming(r"^ffn", "mlp")
    fused = loading.WeightConverter("w13", ["gate.weight", "up.weight"], operations=[loading.Chunk(dim=0)])
    assert conversions.for_saving(model, [lossy, harmless, fused]) == [harmless]
    assert conversions.for_loading(model, [lossy, harmless, fused]) == [harmless, fused]
