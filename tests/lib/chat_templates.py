"""Chat templates of the kinds that models bring."""

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
# Leaves out what the assistant thought before its earlier answers.
THINKING = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content and loop.last %}({{ m.reasoning_content }}){% endif %}{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Begins an answer with a thought that the written conversation does not have.
PROMPTING = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>{% endif %}"
)
# Writes the last message in another way than all before.
REWRITING = "{% for m in messages %}<{{ m.role }}{{ loop.last }}>{{ m.content }}</>{% endfor %}"
