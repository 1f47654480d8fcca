"""Compiled decoding: the tokens of the eager model, a cached package, and a fallback without it."""

from __future__ import annotations

import pathlib
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache, MistralConfig

import qlora_ext
import tiny_models
from forms import FORMS, random_weight
from qlora_app.decoding import (
    BatchDecoder,
    CompilationError,
    Request,
    Sampling,
    cache,
    compile_decoding,
    compiled,
    packages,
    prepare_to_answer,
    step,
)
from qlora_app.errors import UserError
from qlora_app.generation.compiled import decode_compiled
from qlora_app.main import main
from qlora_ext.integrations.peft import LoraLinear4bit
from qlora_ext.nn import layers_of

PROMPT = torch.tensor([[5, 9, 17, 40]])


@pytest.fixture(autouse=True)
def _own_packages(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cache directory for all these tests, and one thread, for which the code is compiled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "packages"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def adapted(dtype: torch.dtype = torch.float32, seed: int = 0, rank: int = 4, alpha: int = 8) -> Any:
    """A tiny Llama in 4 bits, scaled by its seed, with adapters that change its outputs."""
    dense = tiny_models.make("llama", dtype)
    for p in dense.parameters():
        p.data *= 1 + seed / 8
    model = qlora_ext.quantize_model(dense)
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear")).eval()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    return model.requires_grad_(False)


def decode(model: Any, tokens: int, prompt: torch.Tensor = PROMPT, **more: Any) -> torch.Tensor:
    options = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0, **more}
    out: torch.Tensor = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
    return out


def decoder_of(model: Any) -> compiled.Decoder:
    decoder = compile_decoding(model)
    assert decoder is not None
    return decoder


def test_the_tokens_are_those_of_the_eager_model() -> None:
    """Also with caches that grow, with several conversations, and with sampling."""
    model = adapted()
    drawn = {"do_sample": True, "temperature": 1.5, "top_k": 0}

    def everything() -> list[torch.Tensor]:
        torch.manual_seed(5)
        longer = torch.arange(3, 103)[None]
        return [decode(model, 600), decode(model, 9, longer), decode(model, 9), decode(model, 40, **drawn)]

    expected = everything()
    decoder = decoder_of(model)
    got = everything()
    assert decoder.steps == 599 + 8 + 8 + 39  # the first token of each is computed with its prompt
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_other_adapters_run_eagerly(tmp_path: pathlib.Path) -> None:
    """Compiled code contains the adapter that was active, and its scaling."""

    def with_another() -> Any:
        torch.manual_seed(3)
        model.add_adapter("other", LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        return model

    def answers() -> list[torch.Tensor]:
        """Of the default adapter, then of others, then of the default one with another scaling."""
        found = [decode(model, 6)]
        found.append(decode(model, 6, adapter_names=["other"]))
        with model.disable_adapter():
            found.append(decode(model, 6))
        model.set_adapter("other")
        found.append(decode(model, 6))
        model.set_adapter("default")
        found.append(decode(model, 6))
        hotswap_adapter(model, tmp_path, adapter_name="default")
        return [*found, decode(model, 6)]

    adapted(alpha=80).save_pretrained(tmp_path)
    model = adapted()
    with_another()
    expected = answers()
    assert len({str(tokens) for tokens in expected}) == 4
    model = adapted()
    decoder = decoder_of(model)
    with_another()
    assert all(torch.equal(a, b) for a, b in zip(answers(), expected, strict=True))
    assert decoder.steps == 2 * 5


def test_batches_are_those_of_the_eager_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after the weights have changed, and where steps must run eagerly."""
    model = adapted()
    prompts = [drawn(1, length)[0].tolist() for length in (4, 1, 30, 7, 7)]
    options = [Sampling(30, temperature=i % 2, seed=i, stop_tokens=()) for i in range(5)]

    def answers(engine: BatchDecoder) -> list[list[int]]:
        requests = [engine.submit(prompt, each) for prompt, each in zip(prompts, options, strict=True)]
        engine.run()
        return [request.tokens for request in requests]

    engine, eager = BatchDecoder(model, 3, compiled=True, prompt_part=13), BatchDecoder(model, 3, compiled=False)
    assert (engine.compiled, eager.compiled) == (True, False)
    with monkeypatch.context() as patch:
        patch.setattr(step.EagerStep, "__call__", lambda *_: pytest.fail("a step ran eagerly"))
        first = answers(engine)
    assert first == answers(eager)
    engine = BatchDecoder(model, 3, compiled=True, prompt_part=13, reproducible=True)
    assert answers(engine) == first
    both = []
    for others in ([], ["__base__"]):  # which make compiled steps impossible
        both.append(engine.submit(prompts[2], options[1], "default"))
        for other in others:
            engine.submit(prompts[0], options[0], other)
        engine.run()
    assert both[0].logprobs == both[1].logprobs
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data *= 2
    second = answers(engine)
    assert second == answers(eager) != first
    with model.disable_adapter():
        assert answers(engine) == answers(eager) != second
    model.get_base_model().model.layers[0].mlp.gate_proj.to(torch.float64).to(torch.float32)  # in other memory
    assert answers(engine) == second
    for _, layer in layers_of(model):
        layer.activations = "int8"
    assert answers(engine) == answers(eager)


def test_sequences_with_different_adapters_run_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bits of each sequence alone, and with the adapters as they are at each step."""
    model = adapted()
    engine, eager = (BatchDecoder(model, 4, compiled=compiled, reproducible=True) for compiled in (True, False))

    def add(name: str, rank: int, *modules: str, **more: Any) -> None:
        config = LoraConfig(r=rank, target_modules=modules, lora_alpha=9, init_lora_weights=False, **more)
        model.add_adapter(name, config)
        model.requires_grad_(False).eval()

    torch.manual_seed(4)
    add("one", 2, "q_proj", "down_proj")
    add("two", 9, "v_proj", "down_proj")
    engine._compile_mixed(True, None)  # as if the decoder were made now
    names = [None, "one", "__base__", "two"]
    layers = [module for module in model.modules() if isinstance(module, LoraLinear4bit)]
    steps: list[BatchDecoder] = []
    stepping: list[BatchDecoder] = []
    usual = step.EagerStep.__call__
    monkeypatch.setattr(step.EagerStep, "__call__", lambda *each: steps.append(stepping[-1]) or usual(*each))

    def submit(each: BatchDecoder, i: int, name: str | None) -> Request:
        return each.submit(drawn(1, 4 + i)[0].tolist(), Sampling(8, seed=i, stop_tokens=()), name)

    def runs_compiled(change: Callable[[], object] = lambda: None, names: Sequence[str | None] = names) -> bool:
        """Whether all steps did, with ``change`` after the fourth. The tokens are those of the eager decoder."""
        steps.clear()
        requests = [[submit(each, i, name) for i, name in enumerate(names)] for each in (engine, eager)]
        for i in range(8):
            for each in (engine, eager):
                stepping.append(each)
                each.step()
            if i == 3:
                change()
        assert [r.tokens for r in requests[0]] == [r.tokens for r in requests[1]]
        assert all(len(r.tokens) == 8 for r in requests[0])
        return engine not in steps

    def scale(name: str, factor: float = 3) -> None:
        for layer in (layer for layer in layers if name in layer.scaling):
            layer.scaling[name] *= factor

    def write(name: str, through_data: bool = False) -> None:
        for weight in (layer.lora_B[name].weight for layer in layers if name in layer.lora_B):
            (weight.data if through_data else weight).mul_(-1)

    assert runs_compiled()
    together = [submit(engine, i, name) for i, name in enumerate(names)]
    engine.run()
    for i, name in enumerate(names):
        request = submit(engine, i, name)
        engine.run()
        assert (request.tokens, request.logprobs) == (together[i].tokens, together[i].logprobs)
    assert runs_compiled(names=["two", "two"])
    assert runs_compiled(lambda: model.set_adapter("two"), [None] * 4)  # no longer the adapter that was compiled
    model.set_adapter("default")
    assert runs_compiled(lambda: write("two"))
    assert runs_compiled(lambda: scale("two"))
    write("one", through_data=True)  # noticed by prompts
    assert runs_compiled()
    assert runs_compiled(lambda: scale("default"), [None] * 4)
    assert runs_compiled(lambda: scale("default", 1 / 3), [None] * 4)
    model.get_base_model().model.layers[0].self_attn.q_proj.lora_A["one"].to(torch.float64)
    assert runs_compiled()
    assert runs_compiled(lambda: add("three", 16, "v_proj"))
    assert runs_compiled(names=["three", "one"])
    model.delete_adapter("one")
    assert runs_compiled(names=["three", "two", None])
    with model.disable_adapter():
        assert not runs_compiled(names=[None, None])
    add("large", 17, "v_proj")
    add("dora", 2, "q_proj", use_dora=True)
    assert not runs_compiled(names=["three", "large"])
    assert runs_compiled(names=["three", "two"])
    model.set_adapter("dora")
    assert not runs_compiled(names=[None, None])
    model.set_adapter("default")
    add("elsewhere", 2, "lm_head")
    assert not runs_compiled(names=["three", "two"])


def test_weights_of_other_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "keeps_last_logits", lambda lm: False)  # nothing is compiled for prompts
    model = adapted()
    for i, (_, layer) in enumerate(layers_of(model)):
        form = FORMS[("mxfp4", "q4_k")[i % 2]]
        layer.set_weight(random_weight(form, layer.packed_shapes["weight"], i))
    expected = decode(model, 20)
    decoder = decoder_of(model)
    assert torch.equal(decode(model, 20), expected)
    assert decoder.steps == 19


def read(model: Any, tokens: torch.Tensor, cache: DynamicCache, **more: Any) -> torch.Tensor:
    """The logits of the last token."""
    with torch.no_grad():
        out = model(input_ids=tokens, use_cache=True, logits_to_keep=1, **{compiled.CACHE: cache}, **more)
    logits: torch.Tensor = out.logits
    return logits


def drawn(*shape: int) -> torch.Tensor:
    return torch.randint(3, 128, shape, generator=torch.Generator().manual_seed(6))


def test_prompts_are_read_by_compiled_code() -> None:
    """Prompts of a few tokens, at the start and later, with one set of caches and larger ones."""
    model = adapted()
    lengths = [1, 2, 8, 250, 3, compiled.MAX_PROMPT, 1, compiled.MAX_PROMPT + 1, 5]

    def logits() -> list[torch.Tensor]:
        cache = DynamicCache(config=model.config)
        return [read(model, part, cache) for part in drawn(1, sum(lengths)).split(lengths, 1)]

    expected = logits()
    decoder = decoder_of(model)
    for _ in range(2):
        for got, right in zip(logits(), expected, strict=True):
            assert got.shape == (1, 1, 128)
            torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)
    assert (decoder.prompts, decoder.steps) == (2 * 6, 2 * 2)  # the longest prompt runs eagerly


@pytest.mark.parametrize("padded", [0, 3])
def test_padding_and_other_positions_run_eagerly(padded: int) -> None:
    model = adapted()
    tokens, mask = drawn(1, 12), torch.ones(1, 12, dtype=torch.int64)
    mask[:, :padded] = 0
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    positions = torch.arange(100, 112)[None]

    def everything() -> list[torch.Tensor]:
        answer = model.generate(input_ids=tokens, attention_mask=mask, **options)
        return [answer, read(model, tokens, DynamicCache(config=model.config), position_ids=positions)]

    expected = everything()
    decoder = decoder_of(model)
    got = everything()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert (decoder.prompts, decoder.steps) == ((0, 0) if padded else (1, 5))


def test_conversations_that_alternate_keep_their_caches() -> None:
    model = adapted()
    tokens = drawn(3, 7)

    def logits() -> list[torch.Tensor]:
        caches = [DynamicCache(config=model.config) for _ in tokens]
        parts = [(row, cache, begin) for begin in (0, 4, 5, 6) for row, cache in zip(tokens, caches, strict=True)]
        return [read(model, row[None, begin : max(4, begin + 1)], cache) for row, cache, begin in parts]

    expected = logits()
    decoder = decoder_of(model)
    for got, right in zip(logits(), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)
    assert (decoder.prompts, decoder.steps) == (3, 9)


def test_the_cache_stays_the_model_s_own() -> None:
    """After compiled decoding, calls for all logits of several tokens run eagerly on the same cache."""
    model = adapted()
    more = torch.tensor([[7, 8, 9]])

    def last(token_by_token: torch.Tensor) -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=PROMPT, use_cache=True, **{compiled.CACHE: cache})
            for token in token_by_token:
                model(input_ids=token.reshape(1, 1), use_cache=True, **{compiled.CACHE: cache})
            return model(input_ids=more, use_cache=True, **{compiled.CACHE: cache}).logits

    expected = last(torch.tensor([11, 12]))
    decoder = decoder_of(model)
    torch.testing.assert_close(last(torch.tensor([11, 12])), expected, rtol=1e-4, atol=1e-5)
    assert decoder.steps == 2


def test_bfloat16_is_no_further_from_float32_than_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "keeps_last_logits", lambda lm: False)  # nothing is compiled for prompts
    tokens = torch.randint(3, 128, (1, 48), generator=torch.Generator().manual_seed(2))

    def logits(model: Any) -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            steps = [model(input_ids=t.reshape(1, 1), use_cache=True, **{compiled.CACHE: cache}) for t in tokens[0]]
        return torch.cat([step.logits for step in steps]).double()

    model = adapted(torch.bfloat16)
    eager = logits(model)
    decoder_of(model)
    exact = logits(adapted(torch.bfloat16).float())

    def error(got: torch.Tensor) -> float:
        return float((got - exact).norm() / exact.norm())

    assert 1e-4 < error(eager) < 0.05
    assert error(logits(model)) < 1.2 * error(eager)


def test_one_package_serves_all_models_of_a_shape(capfd: pytest.CaptureFixture[str]) -> None:
    decoder_of(adapted())
    capfd.readouterr()
    other = adapted(seed=1)
    expected = decode(other, 20)
    decoder = decode_compiled(other, "auto", worthwhile=False)
    assert decoder is not None
    assert capfd.readouterr().err == ""  # no compilation
    assert torch.equal(decode(other, 20), expected)
    assert decoder.steps == 19
    norm = other.get_base_model().model.norm
    norm.weight.data = norm.weight.data.clone()  # compiled code reads the memory that it had
    assert torch.equal(decode(other, 20), expected)
    assert decoder.steps == 19
    for different in (adapted(rank=2), adapted(alpha=16)):
        assert decode_compiled(different, "auto", worthwhile=False) is None
    assert decode_compiled(adapted(), "never", worthwhile=True) is None


def test_a_cached_package_needs_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder_of(adapted())
    monkeypatch.setattr(packages, "compile_package", lambda *_: pytest.fail("compiled again"))
    printed: list[str] = []
    assert compile_decoding(adapted(seed=2), missing=False, progress=printed.append) is not None
    assert compile_decoding(adapted(rank=5), missing=False, progress=printed.append) is None
    assert printed == []


def test_the_commands_decode_compiled(finished_run: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--adapter", str(finished_run), "--prompt", "count 3", "--max-new-tokens", "40", "--dtype", "float32"]

    def answer(*more: str) -> tuple[str, str]:
        capfd.readouterr()
        assert main(["generate", *options, *more]) == 0
        out, err = capfd.readouterr()
        return out, err

    eager, printed = answer()  # too few tokens to compile for
    assert printed == ""
    first, printed = answer("--compile", "always")
    assert "compiling the model" in printed
    assert "compiled in" in printed
    assert (first, *answer()) == (eager, eager, "")


def test_without_a_compiler_or_where_it_fails_the_model_stays_eager(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no such instruction\nand more")

    model = adapted(rank=3)
    forward = model.get_base_model().forward
    with monkeypatch.context() as patch:
        patch.setattr(packages, "compile_package", broken)
        assert decode_compiled(model, "auto", worthwhile=True) is None
        assert "not compiled (no such instruction)" in capfd.readouterr().err
        with pytest.raises(UserError, match="--compile always: this model cannot be compiled: no such instruction"):
            decode_compiled(model, "always", worthwhile=True)
        with pytest.raises(CompilationError, match=r"^no such instruction$"):
            compile_decoding(model)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="there is no C\\+\\+ compiler"):
        decode_compiled(model, "always", worthwhile=True)
    with pytest.raises(CompilationError, match=r"^there is no C\+\+ compiler$"):
        compile_decoding(model, missing=False)
    assert decode_compiled(model, "auto", worthwhile=False) is None
    assert model.get_base_model().forward == forward


def test_models_that_are_not_compiled() -> None:
    sliding = AutoModelForCausalLM.from_config(MistralConfig(**tiny_models.SIZES, sliding_window=8))
    assert packages.obstacle(sliding) == "its attention has a sliding window"
    prefix = get_peft_model(tiny_models.make("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert packages.obstacle(prefix) == "the adapter is a prompt"
    merge_aware = adapted()
    qlora_ext.integrations.peft.set_merge_aware(merge_aware)
    assert packages.obstacle(merge_aware) == "the adapter is merge-aware"
    assert packages.obstacle(adapted()) is None


def test_a_damaged_package_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    expected = decode(model, 5)
    decoder_of(adapted())
    name = packages.digest(model, compiled._OneSequence(packages.causal_lm(model)))
    package = cache.directory() / f"{name}.pt2"
    full = package.read_bytes()
    compiled_anew = []

    def make(functions: Any, package: pathlib.Path) -> None:
        compiled_anew.append(package)
        package.write_bytes(full)

    monkeypatch.setattr(packages, "compile_package", make)
    package.write_bytes(full[: len(full) // 2])
    assert decode_compiled(adapted(), "auto", worthwhile=False) is None
    decoder_of(model)
    assert torch.equal(decode(model, 5), expected)
    assert compiled_anew == [package]
    with zipfile.ZipFile(package, "w") as archive:  # complete, but not a package
        archive.writestr("a", "b")
    assert decode_compiled(adapted(), "auto", worthwhile=True) is not None
    assert compiled_anew == [package] * 2


def test_a_prompt_does_not_copy_the_output_head() -> None:
    """The last token of a prompt is a slice. For its strides, torch would use a batched product and copy the head."""

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default, torch.ops.aten.bmm.default):
                self.elements = max(self.elements, *(t.numel() for t in args if isinstance(t, torch.Tensor)))
            return func(*args, **(kwargs or {}))

    def largest(model: Any) -> int:
        with torch.no_grad(), Largest() as mode:
            model(input_ids=PROMPT, logits_to_keep=1)
        return mode.elements

    model = adapted(torch.bfloat16)
    head = model.get_output_embeddings().weight.numel()
    with torch.no_grad():
        expected = model(input_ids=PROMPT, logits_to_keep=1).logits
    assert largest(model) >= head  # without it
    prepare_to_answer(model)
    assert largest(model) < head
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=PROMPT, logits_to_keep=1).logits, expected)
