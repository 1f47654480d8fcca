"""DDP, FSDP2, distributed checkpoints and accelerate over gloo processes on the CPU.

Losses are compared with those of one process on the full batch, with relative tolerance 1e-5 in float32 (a different
order of summation) and 5e-3 with bfloat16. Packed weights are compared bit for bit.
"""

from __future__ import annotations

import functools
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig

import distributed_tasks as tasks
import packed_models
import qlora_ext
from distributed_tasks import Setup
from forms import MODULE_FORMS as FORMS
from qlora_ext.integrations.peft import check_base
from tiny_models import save_tiny_llama
from workers import Workers

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
FLOAT32, BFLOAT16 = 1e-5, 5e-3
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Workers]]:
    pools: dict[int, Workers] = {}

    def of(world: int) -> Workers:
        if world not in pools:
            pools[world] = Workers(world, tmp_path_factory.mktemp("meeting"))
        return pools[world]

    yield of
    for pool in pools.values():
        pool.close()


alone = functools.cache(tasks.alone)


def close(losses: list[float], expected: list[float], tolerance: float) -> None:
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=tolerance, atol=0.0)
    assert losses[-1] < losses[0]


FSDP2 = {
    "default": (Setup(), FLOAT32),
    "resharded": (Setup(reshard_after_forward=True), FLOAT32),
    "not_resharded": (Setup(reshard_after_forward=False), FLOAT32),
    "resharded_to_2": (Setup(reshard_after_forward=2), FLOAT32),
    "float32_scales": (Setup(double_quant=False), FLOAT32),
    "tied_head": (Setup(tied=True), FLOAT32),
    "quantized_head": (Setup(quantized_head=True), FLOAT32),
    "experts": (Setup(experts=True), FLOAT32),
    "tied_4bit_embeddings": (Setup(embeddings=True, tied=True), FLOAT32),
    "checkpointing": (Setup(checkpointing=True), FLOAT32),
    "cpu_offload": (Setup(cpu_offload=True), FLOAT32),
    "mixed_precision": (Setup(mixed_precision=BF16), BFLOAT16),
    "mixed_precision_float32_scales": (Setup(mixed_precision=BF16, double_quant=False), BFLOAT16),
    "bfloat16": (Setup(dtype=BF16), BFLOAT16),
    # The order of sums may move a weight to another code.
    "merge_aware": (Setup(merge_aware="q4_0", reshard_after_forward=True), 1e-3),
    "merge_aware_checkpointing": (Setup(merge_aware="int4", checkpointing=True), 1e-3),
    "all_at_once": (
        Setup(dtype=BF16, mixed_precision=BF16, cpu_offload=True, checkpointing=True, reshard_after_forward=True),
        BFLOAT16,
    ),
}


# Options of the model, not of its training.
KINDS = ("dtype", "double_quant", "tied", "quantized_head", "experts", "embeddings", "merge_aware")


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", FSDP2)
def test_fsdp2_trains_as_one_process(name: str, world: int, workers: Callable[[int], Workers]) -> None:
    setup, tolerance = FSDP2[name]
    one = Setup(**{kind: getattr(setup, kind) for kind in KINDS})
    results = workers(world).run(tasks.fsdp2, setup)
    for result in results:
        close(result["losses"], alone(one), tolerance)
        assert (
            len(result["packed"]) == 1
        )  # the same bits before training, when sharded and gathered, and after training
        # One more row and scale per layer if not divisible; nested scales (under 1%) are replicated.
        assert result["held"] < 1.06 * result["total"] / world
    assert len({result["adapters"] for result in results}) == 1


CHECKPOINTS = ("gpt_oss mxfp4", "gpt_oss modelopt", "llama awq", "llama nvfp4-pack-quantized", "llama gguf")


def save_checkpoint(directory: pathlib.Path, name: str) -> pathlib.Path:
    """A checkpoint in a 4-bit format of another library."""
    family, kind = name.split()
    if kind != "gguf":
        return packed_models.save(directory, family, kind).path
    gguf_files = pytest.importorskip("gguf_files", reason="the command's libraries are not installed")
    model = AutoModelForCausalLM.from_config(LlamaConfig(**gguf_files.WIDE), dtype=torch.float32)
    gguf_files.write(model, directory / "model.gguf", "llama", kinds=["Q4_1"])
    return directory / "model.gguf"


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_fsdp2_trains_checkpoints(name: str, tmp_path: pathlib.Path, workers: Callable[[int], Workers]) -> None:
    setup = Setup(checkpoint=save_checkpoint(tmp_path, name))
    expected = tasks.alone(setup)
    results = workers(2).run(tasks.fsdp2, setup)
    for result in results:
        close(result["losses"], expected, FLOAT32)
        assert len(result["packed"]) == 1
        assert result["held"] < 0.7 * result["total"]  # the table of a tiny weight's scales is replicated
    assert len({result["adapters"] for result in results}) == 1
    workers(2).run(tasks.save_adapter, setup, str(tmp_path / "adapter"))


def test_hsdp_shards_in_one_dimension_of_the_mesh(workers: Callable[[int], Workers]) -> None:
    for result in workers(4).run(tasks.fsdp2, Setup(mesh=(2, 2))):
        close(result["losses"], alone(Setup()), FLOAT32)
        assert len(result["packed"]) == 1
        assert result["held"] < 1.06 * result["total"] / 2


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_ddp_trains_as_one_process(world: int, checkpointing: bool, workers: Callable[[int], Workers]) -> None:
    results = workers(world).run(tasks.ddp, Setup(checkpointing=checkpointing))
    for result in results:
        close(result["losses"], alone(Setup()), FLOAT32)
        assert len(result["packed"]) == 1
    assert len({result["adapters"] for result in results}) == 1


def test_ddp_leaves_streamed_layers_where_they_are(tmp_path: pathlib.Path, workers: Callable[[int], Workers]) -> None:
    """Otherwise DDP would broadcast them into memory, and on CUDA reject a model on two devices."""
    tasks.make_model(Setup()).unload().save_pretrained(tmp_path)
    resident = workers(2).run(tasks.streamed_ddp, tmp_path, False)
    streamed = workers(2).run(tasks.streamed_ddp, tmp_path, True)
    assert {r["adapters"] for r in streamed} == {r["adapters"] for r in resident}
    for found, expected in zip(streamed, resident, strict=True):
        assert found["losses"] == expected["losses"]
        assert found["losses"][-1] < found["losses"][0]
        assert found["ignored"] == found["packed"] != set()
        assert not found["written"]
        assert not expected["ignored"]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("form", ["nf4", "nf4 alone", "mxfp4", "q4_0", "int4", "q4_1", "awq", "q6_k", "q8_0"])
@pytest.mark.parametrize("mixed", [True, False])
def test_every_byte_survives(world: int, form: str, mixed: bool, workers: Callable[[int], Workers]) -> None:
    results = workers(world).run(tasks.odd_bytes, FORMS[form], mixed)
    assert all(len(result["packed"]) == 1 for result in results)
    assert {byte for result in results for bytes_ in result["weight"] for byte in bytes_} == set(range(256))


def test_a_sharded_model_changes_its_dtype(workers: Callable[[int], Workers]) -> None:
    for packed, computes_in_bfloat16 in workers(2).run(tasks.casts_after_sharding, Setup()):
        assert len(packed) == 1
        assert computes_in_bfloat16


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_checkpoint_of_4_resumes_on_2(double_quant: bool, tmp_path, workers: Callable[[int], Workers]) -> None:
    setup = Setup(double_quant=double_quant)
    saved = workers(4).run(tasks.save_checkpoint, setup, str(tmp_path), 2)
    resumed = workers(2).run(tasks.resume_checkpoint, Setup(double_quant=double_quant, seed=1), str(tmp_path), 1)
    for result in resumed:
        assert result["fresh"] != saved[0]["packed"]
        assert result["packed"] == saved[0]["packed"]
        assert result["adapters"] == saved[0]["adapters"]
        close(saved[0]["losses"] + result["losses"], alone(setup), FLOAT32)


def test_a_model_is_built_on_meta_and_filled(workers: Callable[[int], Workers]) -> None:
    for result in workers(2).run(tasks.from_meta, Setup()):
        assert len(result["packed"]) == 1
        close(result["losses"], alone(Setup()), FLOAT32)


def test_inputs_in_the_dtype_of_a_sharded_weight_are_rejected() -> None:
    layer = qlora_ext.nn.Linear4bit.from_linear(torch.nn.Linear(64, 48))
    x = torch.randn(3, 64)
    assert layer(x.to(layer.weight.dtype)).dtype == torch.float32
    layer.expose()  # as fully_shard does
    with pytest.raises(TypeError, match=r"x: expected a floating dtype, got torch\.uint8; .* FSDP2 shards as bytes"):
        layer(x.to(layer.weight.dtype))


def test_a_streamed_model_is_not_sharded(tmp_path: pathlib.Path) -> None:
    tasks.build_model(Setup()).save_pretrained(tmp_path)
    model = qlora_ext.streaming.stream(AutoModelForCausalLM.from_pretrained(tmp_path), source="disk")
    with pytest.raises(ValueError, match="fully_shard: expected a model that is not streamed"):
        tasks.fully_shard(model)


def test_checkpointing_repeats_dropout(workers: Callable[[int], Workers]) -> None:
    assert all(workers(2).run(tasks.checkpointed_dropout, Setup()))


def test_full_state_dicts_are_loaded_and_gathered(workers: Callable[[int], Workers]) -> None:
    assert len(set(workers(2).run(tasks.full_state, Setup()))) == 1


def test_peft_saves_the_adapters_of_a_sharded_model(tmp_path, workers: Callable[[int], Workers]) -> None:
    for messages in workers(2).run(tasks.save_adapter, Setup(), str(tmp_path)):
        assert any("write_base(model, directory) on every rank" in message for message in messages)


def test_accelerate_shards_by_the_shown_configuration(workers: Callable[[int], Workers]) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    config = yaml.safe_load((EXAMPLES / "accelerate_fsdp2.yaml").read_text())
    setup = Setup(dtype=BF16)
    for result in workers(2).run(tasks.accelerate_prepares, setup, config):
        close(result["losses"], alone(setup), BFLOAT16)
        assert len(result["packed"]) == 1
        assert result["held"] < 1.06 * result["total"] / 2
        assert result["sharded_modules"] > 2


def test_accelerate_launches_the_example(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    save_tiny_llama(tmp_path / "model", seed=0)
    (tmp_path / "data.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    launch = ["-m", "accelerate.commands.launch", "--config_file", EXAMPLES / "processes.yaml"]
    run = [EXAMPLES / "finetune_fsdp2.py", "--steps", "4", "--batch-size", "4", "--seq-len", "32", "--lr", "5e-3"]
    files = ["--model", tmp_path / "model", "--data", tmp_path / "data.txt", "--output", tmp_path / "out"]
    done = subprocess.run([sys.executable, *launch, *run, *files], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("step ")]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert (tmp_path / "out" / "state" / ".metadata").is_file()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=qlora_ext.QLoRAConfig())
    model = PeftModel.from_pretrained(base, tmp_path / "out")
    assert check_base(model, tmp_path / "out") is True
    assert all(p.any() for name, p in model.named_parameters() if "lora_B" in name)


def test_a_rank_that_fails_or_hangs_fails_the_test(tmp_path) -> None:
    pool = Workers(2, tmp_path, timeout=60.0)
    with pytest.raises(AssertionError, match="rank 1 had enough"):
        pool.run(tasks.fails_on_rank_1)
    pool.run(tasks.fsdp2, Setup())
    pool.timeout = 1.0
    with pytest.raises(TimeoutError, match=r"ranks \[1\] did not answer"):
        pool.run(tasks.hangs_on_rank_1)
