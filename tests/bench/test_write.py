"""What a bench prints becomes Markdown: text in code blocks, tables as tables."""

from __future__ import annotations

from tests.bench.write import conditions, fenced


def test_text_is_fenced_and_tables_are_left_alone() -> None:
    assert fenced(["a", "b", "| x |", "|---|", "c"]) == [
        *["```text", "a", "b", "```"], *["", "| x |", "|---|", ""], *["```text", "c", "```"]
    ]  # fmt: skip
    assert fenced([]) == []


def test_conditions_name_the_day_the_machine_and_the_packages() -> None:
    assert all(word in conditions() for word in ("-", "cores of", "torch ", "onnxruntime "))
