"""From what a request asks to a grammar of llguidance. Runs in the sandbox: some of it takes what time it likes."""

import json
from typing import Any

from jaxllm.core.structured_outputs import StructuredOutputsParams
from jaxllm.errors import InvalidRequestError
from jaxllm.structured.json_schema import prepare


def limits() -> Any:
    """What a grammar may cost: some 20 ms of lexing before the first token, 15 ms a token, 100 MB of lexer states."""
    import llguidance

    return llguidance.LLParserLimits(max_lexer_states=50_000, verbose_errors=False)


def to_llguidance(params: StructuredOutputsParams) -> str:
    """The grammar's text. Raises InvalidRequestError (or ValueError, from the library) for what is none."""
    import llguidance

    kind, value = params.kind, getattr(params, params.kind)
    if kind in ("json", "json_object"):
        return _json_grammar(params)
    if kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(value)
    if kind == "choice":  # one terminal, so that a choice may begin with another
        choices = " | ".join(json.dumps(text, ensure_ascii=False) for text in value)
        return llguidance.LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {choices}\n")
    if kind == "grammar":
        return llguidance.grammar_from("grammar", value)
    return _structural_tag(json.loads(value))


def _json_grammar(params: StructuredOutputsParams) -> str:
    import llguidance

    schema = '{"type": "object"}' if params.json_object else params.json
    assert isinstance(schema, str)
    prepared = prepare(json.loads(schema), close_objects=params.disable_additional_properties)
    options: Any = {"json_allowed_escapes": prepared.escapes, "whitespace_flexible": not params.disable_any_whitespace}
    if params.whitespace_pattern is not None:
        options["whitespace_pattern"] = params.whitespace_pattern
    return llguidance.LLMatcher.grammar_from_json_schema(prepared.schema, overrides=options)


def _structural_tag(tag: Any) -> str:
    """vLLM's structural tag of structures and triggers."""
    import llguidance

    def need(holds: bool, limit: str) -> None:
        if not holds:
            raise InvalidRequestError("structured_outputs.structural_tag", tag, limit)

    need(isinstance(tag, dict) and set(tag) == {"structures", "triggers"}, "needs 'structures' and 'triggers'")
    structures, triggers = tag["structures"], tag["triggers"]
    need(isinstance(triggers, list) and all(isinstance(t, str) and t for t in triggers), "triggers are strings")
    need(isinstance(structures, list) and bool(structures), "needs at least one structure")
    tags = []
    for structure in structures:
        need(isinstance(structure, dict), "a structure is an object")
        begin, schema, end = (structure.get(name) for name in ("begin", "schema", "end"))
        need(isinstance(begin, str) and isinstance(end, str), "a structure's 'begin' and 'end' are strings")
        need(isinstance(schema, dict), "a structure's 'schema' is a JSON schema")
        trigger = next((text for text in triggers if begin.startswith(text)), "")
        need(bool(trigger), f"no trigger begins {begin!r}")
        tags.append(llguidance.StructTag(trigger=trigger, begin=begin, grammar=schema, end=end))
    return llguidance.StructTag.to_grammar(tags)
