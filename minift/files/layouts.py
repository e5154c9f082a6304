"""Rows as other data sets have them → rows of minift: conversations, and fields under other names."""

import json
from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

from minift.errors import UserError
from minift.files.text import check_unicode
from minift.prompts import question_fields

CONVERSATIONS = ("messages", "conversations", "conversation")
SIDES = ("chosen", "rejected")
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
FOLLOWS = {"": ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",)}
# A conversation replaces these fields: in some data sets they hold a part of it, or a rendered copy.
REPLACED = {*CONVERSATIONS, "instruction", "input", "history", "output", "prompt", "completion", "text"}


class Layout(NamedTuple):
    """Fields that together mean one thing, minift's names for them, and the field that goes before the question."""

    fields: tuple[str, ...]
    names: dict[str, str]
    system: str = ""


# The first one that fits is used.
LAYOUTS = (
    # databricks-dolly-15k
    Layout(("instruction", "context", "response"), {"context": "input", "response": "output", "category": "kind"}),
    Layout(("instruction", "response"), {"response": "output"}),  # GPTeacher, which also has an input
    Layout(("system", "question", *SIDES), {"question": "instruction"}, "system"),  # Intel/orca_dpo_pairs
    Layout(  # Open-Orca/OpenOrca
        ("system_prompt", "question", "response"), {"question": "instruction", "response": "output"}, "system_prompt"
    ),
)


def to_own_fields(
    row: dict[str, Any], schemas: Mapping[str, tuple[str, ...]], where: str
) -> tuple[dict[str, Any], list[str]]:
    """Return a row with the fields that `schemas` name, and remarks about fields that are read as others.

    Of a conversation, the last turn becomes "instruction" and "output", and the turns before it "history". It is not
    read if the row follows a schema without it and has a question there. Raises UserError for a conversation in which
    user and assistant do not take turns.
    """
    own = {field for fields in schemas.values() for field in fields}
    follows = any(all(field in row for field in fields) for name, fields in schemas.items() if name != "text")
    if "chosen" in own and all(isinstance(row.get(side), list) for side in SIDES):
        return _from_two_conversations(row, where)
    for name in CONVERSATIONS if not (follows and question_fields(row)) else ():
        if name in row:
            return _from_conversation(row, name, own, where)
    for layout in LAYOUTS:
        if not all(field in row for field in layout.fields) or ("chosen" in layout.fields and "chosen" not in own):
            continue
        names = {old: new for old, new in layout.names.items() if old in row and new not in row and old not in own}
        renamed = {names.get(name, name): value for name, value in row.items()}
        remark = "whose " + ", ".join(f"'{old}' is read as '{new}'" for old, new in names.items())
        if layout.system and "question" in names:
            system, question = renamed.pop(layout.system), renamed["instruction"]
            if isinstance(system, str) and isinstance(question, str):
                renamed["instruction"] = _after_system(system, question)
                remark += f", with '{layout.system}' before it"
        return renamed, [remark] if names else []
    return row, []


def _after_system(system: str, question: str) -> str:
    """Put the system's text before a question, as trl's chat template for Gemma does."""
    return f"{system}\n\n{question}" if system.strip() else question


def _from_conversation(
    row: Mapping[str, Any], name: str, own: set[str], where: str
) -> tuple[dict[str, Any], list[str]]:
    """Return a row whose conversation, the field `name`, is replaced by the fields of its last turn; and remarks."""
    texts, remarks = _texts_in(row[name], name, where)  # of user and assistant in turn
    if name != CONVERSATIONS[0]:
        remarks.append(f"whose '{name}' is read as '{CONVERSATIONS[0]}'")
    if "output" in own and len(texts) == 1:
        raise UserError(f"{where}: field '{name}' has no answer of the assistant, so there is nothing to learn")
    if "output" in own and len(texts) % 2 == 1:
        remarks.append("whose last message is the user's: it is left out")
        texts.pop()
    ends_with_answer = len(texts) % 2 == 0
    answer = {"response" if "response" in own else "output": texts.pop()} if ends_with_answer else {}
    return _without(row, REPLACED) | _question(texts) | answer, remarks


def _from_two_conversations(row: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """Return a row whose sides are lists of messages as a pair of texts; a "prompt" that is a list begins both sides.

    Raises UserError if the sides differ in more than their last messages, or these are not the assistant's.
    """
    start = row["prompt"] if isinstance(row.get("prompt"), list) else []
    (chosen, remarks), (rejected, _) = (_texts_in([*start, *row[side]], side, where) for side in SIDES)
    for side, texts in (("chosen", chosen), ("rejected", rejected)):
        if len(texts) % 2:
            raise UserError(f"{where}: the last message of '{side}' is the user's, expected an answer of the assistant")
    if chosen[:-1] != rejected[:-1]:
        raise UserError(f"{where}: 'chosen' and 'rejected' differ in more than their last messages")
    sides = {"chosen": chosen.pop(), "rejected": rejected.pop()}
    return _without(row, REPLACED) | _question(chosen) | sides, remarks


def _without(row: Mapping[str, Any], names: Set[str]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


def _question(texts: Sequence[str]) -> dict[str, Any]:
    """Return the last text as an instruction, and those before it as its history."""
    *earlier, instruction = texts
    history = [list(turn) for turn in zip(earlier[::2], earlier[1::2], strict=True)]
    return {"instruction": instruction} | ({"history": history} if history else {})


def _texts_in(messages: object, name: str, where: str) -> tuple[list[str], list[str]]:
    """Return the texts of user and assistant in turn, and remarks; the system's text becomes part of the first one.

    Raises UserError for anything but {"role", "content"} of user and assistant in turn, after the system's if there is
    one. {"from": "human" or "gpt", "value"}, as in ShareGPT, is the same.
    """
    if not isinstance(messages, list) or not messages:
        found = json.dumps(messages)
        raise UserError(f'{where}: field \'{name}\' is {found:.40}, expected a list of {{"role": …, "content": …}}')
    roles, texts = [""], []
    others: dict[str, None] = {}
    for number, message in enumerate(messages, start=1):
        here = f"{where}: message {number} of '{name}'"
        if not isinstance(message, dict):
            raise UserError(f'{here} is {json.dumps(message):.40}, expected {{"role": …, "content": …}}')
        keys = ("from", "value") if "from" in message else ("role", "content")
        role, content = (message.get(key) for key in keys)
        others |= dict.fromkeys(key for key in message if key not in keys)
        if not isinstance(role, str) or role not in ROLES:
            raise UserError(f"{here}: '{keys[0]}' is {json.dumps(role):.40}, expected system, user or assistant")
        if not isinstance(content, str):
            raise UserError(f"{here}: '{keys[1]}' is {json.dumps(content):.40}, expected a string")
        check_unicode(keys[1], content, here)
        if ROLES[role] not in FOLLOWS[roles[-1]]:
            expected = " or ".join(FOLLOWS[roles[-1]])
            rule = "a system message may come first, then user and assistant take turns"
            raise UserError(f"{here}: '{keys[0]}' is \"{role}\", expected {expected}: {rule}")
        roles.append(ROLES[role])
        texts.append(content)
    if roles[-1] == "system":
        raise UserError(f"{where}: field '{name}' has no message of the user")
    if roles[1] == "system":
        system, question, *texts = texts
        texts = [_after_system(system, question), *texts]
    named = ", ".join(f"{key!r:.40}" for key in others)
    return texts, [f"whose messages have fields that are not read: {named}"] if named else []
