"""What `pytest --quick` runs: every test once, with its first parameters, if that takes less than three seconds."""

from __future__ import annotations

import pytest

# Those that take longer, on one core, and are not marked slow.
LONG = {
    "tests/attack/test_arguments.py::test_a_call_works_or_says_why_not",
    "tests/attack/test_exact.py::test_exact_problems_have_exact_answers",
    "tests/attack/test_guard_pages.py::test_operators_stay_inside_their_tensors",
    "tests/attack/test_readers.py::test_adapters",
    "tests/cli/test_cli.py::test_a_model_that_does_not_exist",
    "tests/cli/test_cli.py::test_names_that_the_locale_cannot_write",
    "tests/cli/test_cli_calibrate.py::test_a_stopped_run_is_resumed",
    "tests/cli/test_cli_chat.py::test_on_a_terminal",
    "tests/cli/test_cli_compile.py::test_bfloat16_is_no_further_from_float32_than_eager",
    "tests/cli/test_cli_compile.py::test_the_commands_decode_compiled",
    "tests/cli/test_cli_compile.py::test_the_tokens_are_those_of_the_eager_model",
    "tests/cli/test_cli_entry.py::test_a_command_finds_the_package_imported",
    "tests/cli/test_cli_entry.py::test_the_package_is_as_if_it_had_been_imported",
    "tests/cli/test_cli_longer.py::test_a_finished_run_is_made_longer",
    "tests/cli/test_cli_longer.py::test_a_schedule_that_depends_on_the_length",
    "tests/cli/test_cli_longer.py::test_more_epochs",
    "tests/cli/test_cli_outputs.py::test_a_mount_point",
    "tests/cli/test_cli_ownership.py::test_a_run_inside_of_its_data",
    "tests/cli/test_cli_ownership.py::test_a_streamed_run_replaces_its_own_base",
    "tests/cli/test_cli_plan.py::test_advice_makes_it_fit",
    "tests/cli/test_cli_plan.py::test_the_line_through_few_layers_meets_a_deep_model",
    "tests/cli/test_cli_plan_stream.py::test_a_run_on_the_cpu",
    "tests/cli/test_cli_plan_stream.py::test_long_contexts",
    "tests/cli/test_cli_plan_stream.py::test_choices_that_fit",
    "tests/cli/test_cli_plan_stream.py::test_planned_memory_of_streaming",
    "tests/cli/test_cli_settings.py::test_each_option_changes_the_adapter",
    "tests/cli/test_cli_stream.py::test_a_streamed_run_is_the_resident_one",
    "tests/cli/test_cli_stream.py::test_the_ring_uses_the_remaining_memory",
    "tests/cli/test_outputs.py::TestOutputs::runTest",
    "tests/cli/test_run.py::test_the_environment_variable_takes_over_with_a_manual_import",
    "tests/integrations/test_compile_graphs.py::test_a_compiled_model_swaps_adapters_without_compiling_anew",
    "tests/integrations/test_compile_graphs.py::test_dropout_breaks_no_graph",
    "tests/integrations/test_compile_models.py::test_a_checkpointed_block_compiles_twice_for_any_shape",
    "tests/integrations/test_compile_models.py::test_a_checkpointed_language_model_compiles_twice_for_any_shape",
    "tests/integrations/test_compile_models.py::test_a_language_model_becomes_an_aotinductor_package",
    "tests/integrations/test_compile_models.py::test_a_language_model_with_adapters_exports",
    "tests/integrations/test_compile_models.py::test_generation_with_a_static_cache_gives_the_same_tokens",
    "tests/integrations/test_compile_models.py::test_inductor_compiles_the_block_as_one_graph",
    "tests/integrations/test_distributed.py::test_accelerate_launches_the_example",
    "tests/integrations/test_hooks.py::test_a_library_that_failed_to_import_once_is_integrated_the_second_time",
    "tests/integrations/test_hooks.py::test_looking_for_a_library_does_not_disable_its_integration",
    "tests/integrations/test_merge_aware.py::test_it_compiles_as_one_graph",
    "tests/integrations/test_transformers.py::test_import_qlora_ext_is_enough",
    "tests/integrations/test_transformers.py::test_loading_peaks_near_the_4bit_size",
    "tests/kernels/test_codec.py::test_on",
    "tests/kernels/test_encode_cpu.py::test_on",
    "tests/kernels/test_fragments_cpu.py::test_every_fragment_compiles_alone",
    "tests/kernels/test_kernels_cpu.py::test_kernels_are_printed_once_a_problem",
    "tests/kernels/test_kernels_cpu.py::test_on",
    "tests/kernels/test_linear_cpu.py::test_on",
    "tests/kernels/test_linear_few_tokens_cpu.py::test_on",
    "tests/nn/test_dtypes.py::test_a_run_without_bfloat16",
    "tests/project/test_first_day.py::test_a_training_step_of_every_contender",
    "tests/operators/test_accuracy_extremes.py::test_on",
    "tests/streaming/test_streaming.py::test_a_compiled_layer",
}


def function(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


def quick(items: list[pytest.Item]) -> list[pytest.Item]:
    first: dict[str, pytest.Item] = {}
    for item in items:
        if not item.get_closest_marker("slow") and function(item) not in LONG:
            first.setdefault(function(item), item)
    return list(first.values())
