#!/usr/bin/env python
"""Runs JSON-Schema-Test-Suite against the grammars of structured outputs.

    python scripts/json_schema_suite.py DIRECTORY/tests/draft2020-12

The suite is github.com/json-schema-org/JSON-Schema-Test-Suite; the source distribution of the package jsonschema has a
copy of it under json/. Each file's groups of tests, a schema each, are counted as

- exact: every valid instance can be written, and no text of an invalid one is allowed;
- refused: the schema is, with the keyword, format or reference at fault;
- too strict: a valid instance cannot be written; too loose: an invalid one can.

An instance counts as written in any of its spellings: the standard's instances do not know the order of properties, nor
1 from 1.0. `format` is an assertion here, as the standard's vocabulary format-assertion has it: of the instances of
format.json that are no such format and valid where it "is only an annotation", it is checked that they are not allowed.
Status 1 if a group is too strict or too loose.
"""

import collections
import decimal
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import llguidance
import typer

from jaxllm.core.structured_outputs import StructuredOutputsParams
from jaxllm.errors import InvalidRequestError
from jaxllm.structured.grammar import limits, to_llguidance
from jaxllm.structured.vocabulary import Vocabulary, llguidance_tokenizer

EOS, FIRST_BYTE = 0, 1
MOST_SPELLINGS = 5000
ANNOTATION = "is only an annotation by default"


def spellings(value: Any) -> Iterator[str]:
    """Texts of the same instance: any order of properties, integers with and without a fraction."""
    if isinstance(value, dict):
        for items in itertools.permutations(value.items()):
            for values in itertools.product(*(list(spellings(item)) for _, item in items)):
                names = [json.dumps(name, ensure_ascii=False) for name, _ in items]
                yield "{" + ", ".join(f"{name}: {text}" for name, text in zip(names, values, strict=True)) + "}"
    elif isinstance(value, list):
        for values in itertools.product(*(list(spellings(item)) for item in value)):
            yield "[" + ", ".join(values) + "]"
    elif isinstance(value, decimal.Decimal):
        yield str(value)
        if value == value.to_integral_value():
            yield str(int(value))
    elif isinstance(value, str):
        yield json.dumps(value, ensure_ascii=False)
        if (escaped := json.dumps(value)) != json.dumps(value, ensure_ascii=False):
            yield escaped
    else:
        yield json.dumps(value)


class Checker:
    """Grammars over bytes."""

    def __init__(self) -> None:
        tokens = [b"</s>"] + [bytes([byte]) for byte in range(256)]
        self._tokenizer = llguidance_tokenizer(Vocabulary(tokens, [EOS], [EOS]))

    def compile(self, schema: Any) -> llguidance.LLMatcher | str:
        """A matcher, or why the schema is refused."""
        try:
            params = StructuredOutputsParams(json=json.dumps(schema)).checked()
            grammar = to_llguidance(params)
        except InvalidRequestError as error:
            return error.limit
        except ValueError as error:
            return str(error)
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits())
        if not matcher.is_error():
            matcher.compute_bitmask()
        return matcher.get_error() if matcher.is_error() else matcher

    @staticmethod
    def accepts(matcher: llguidance.LLMatcher, instance: Any) -> bool:
        """Whether any spelling of an instance is a whole output."""
        for text in itertools.islice(spellings(instance), MOST_SPELLINGS):
            copy, tokens = matcher.deep_copy(), [FIRST_BYTE + byte for byte in text.encode("utf-8", "surrogatepass")]
            if copy.try_consume_tokens(tokens) == len(tokens) and copy.is_accepting():
                return True
        return False


def main(directory: Path, verbose: Annotated[bool, typer.Option(help="tell why schemas are refused")] = False) -> None:
    """Counts, prints a Markdown table and what is not exact."""
    checker = Checker()
    draft = directory.resolve().name
    dialect = f"http://json-schema.org/draft-0{draft[-1]}/schema#" if draft[:-1] == "draft" else None
    totals: dict[str, collections.Counter] = {"required": collections.Counter(), "optional": collections.Counter()}
    table, wrong = [], []
    reasons: collections.Counter = collections.Counter()
    for file in sorted(directory.rglob("*.json")):
        counts: collections.Counter = collections.Counter()
        name = str(file.relative_to(directory))
        schemas = json.loads(file.read_text())
        instances = json.loads(file.read_text(), parse_float=decimal.Decimal)
        for group, exact in zip(schemas, instances, strict=True):
            schema = group["schema"]
            if dialect is not None and isinstance(schema, dict):
                schema.setdefault("$schema", dialect)
            matcher = checker.compile(schema)
            if isinstance(matcher, str):
                counts["refused"] += 1
                reasons[matcher.splitlines()[0][:120]] += 1
                continue
            loose: list[str] = []
            strict: list[str] = []
            for test in exact["tests"]:
                valid = test["valid"] and ANNOTATION not in test["description"]
                if checker.accepts(matcher, test["data"]) != valid:
                    (strict if valid else loose).append(test["description"])
            counts["too loose" if loose else "too strict" if strict else "exact"] += 1
            for kind, found in (("too loose", loose), ("too strict", strict)):
                wrong += [f"{kind}: {name}: {group['description']}: {description}" for description in found]
        totals["optional" if "optional/" in name else "required"] += counts
        table.append((name, counts))
    kinds = ("exact", "refused", "too strict", "too loose")
    print("| file | " + " | ".join(kinds) + " |\n|---|" + "---|" * len(kinds))
    for name, counts in [*table, *totals.items()]:
        print(f"| {name} | " + " | ".join(str(counts[kind] or "") for kind in kinds) + " |")
    print(*wrong, sep="\n")
    if verbose:
        for reason, count in reasons.most_common():
            print(f"{count} refused: {reason}")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    typer.run(main)
