"""The formats besides NF4 that benches measure, by their names in tables."""

from __future__ import annotations

from qlora_ext.form import Form

FORMS: dict[str, Form] = {
    "FP4": Form("fp4"),
    "MXFP4": Form("e2m1", "table8", 32),
    "NVFP4": Form("e2m1", "table8", 16),
    "INT4, groups of 32": Form("int4", "bfloat16", 32),
    "INT4, groups of 128": Form("int4", "bfloat16", 128),
    "GGUF Q4_0": Form("int4", "float16", 32),
    "GGUF Q4_1": Form("uint4", "float16", 32, offsets="float16"),
    "GGUF Q4_K": Form("uint4", "nested_table8", 32, 8, "scaled8"),
    "GGUF IQ4_NL": Form("iq4_nl", "float16", 32),
}
# Those of more than 4 bits.
WIDE_FORMS: dict[str, Form] = {
    "GGUF Q5_0": Form("int5", "float16", 32),
    "GGUF Q5_K": Form("uint5", "nested_table8", 32, 8, "scaled8"),
    "GGUF Q6_K": Form("int6", "nested_table8", 16, 16),
    "GGUF Q8_0": Form("int8", "float16", 32),
    "INT8, groups of 128": Form("int8", "bfloat16", 128),
    "FP8, tiles of 128 x 128": Form("e4m3", "float32", 128),
}
# Those on which int8 activations are compared with exact ones.
INT8_FORMS: dict[str, Form] = {
    "NF4": Form(),
    **{name: FORMS[name] for name in ("GGUF Q4_1", "GGUF Q4_0", "MXFP4", "INT4, groups of 32")},
}
