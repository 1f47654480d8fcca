"""Chat templates such as those of published models."""

TOOLS = """
{%- if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif -%}
{%- for m in messages -%}
<{{ m.role }}>{{ m.content }}
{%- for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor -%}
</>
{%- endfor -%}
{%- if add_generation_prompt %}<assistant>{% endif -%}
"""
PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Omits the assistant's reasoning before all answers but the last.
THINKING = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content and loop.last %}({{ m.reasoning_content }}){% endif %}{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Begins a generated answer with a reasoning tag, which written conversations do not have.
PROMPTING = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>{% endif %}"
)
# Writes the last message differently from the others.
REWRITING = "{% for m in messages %}<{{ m.role }}{{ loop.last }}>{{ m.content }}</>{% endfor %}"
