"""From what a request asks to a grammar of llguidance. Runs in the sandbox: some of it takes what time it likes."""

import dataclasses
import json
from typing import Any

from jaxllm.core.structured_outputs import StructuredOutputsParams
from jaxllm.structured.json_schema import prepare
from jaxllm.structured.structural_tag import json_options, structural_tag_lark


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
    return llguidance.LLMatcher.grammar_from_lark(structural_tag_lark(json.loads(value)))


def _json_grammar(params: StructuredOutputsParams) -> str:
    import llguidance

    schema = '{"type": "object"}' if params.json_object else params.json
    assert isinstance(schema, str)
    prepared = prepare(json.loads(schema), close_objects=params.disable_additional_properties)
    options: Any = json_options(prepared, dataclasses.asdict(params))
    return llguidance.LLMatcher.grammar_from_json_schema(prepared.schema, overrides=options)
