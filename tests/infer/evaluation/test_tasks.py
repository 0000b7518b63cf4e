"""Sets that are read."""

import json

import pytest

from v4_jax.infer.evaluation.tasks import TASKS, SetError, read_set

ASK = [{"role": "user", "content": "Write a poem about tapirs"}, {"role": "assistant", "content": "Tapir!"}]
ASK += [{"role": "user", "content": "Prepend x1 to the 1st (1 indexed) poem about tapirs."}]
MRCR = {"prompt": json.dumps(ASK), "answer": "x1Tapir!", "random_string_to_prepend": "x1", "n_needles": 2}
MRCR |= {"desired_msg_index": 1, "total_messages": 3, "n_chars": 100, "date_added": "04-12-2025"}
QUESTION = {"documents": ["One.", "Two."], "question": "Which?", "answer": "Two", "id": "q7", "length": 131072}
NEEDLE = {"text": "AB12 fox AB", "answer": "12", "depth": 0}
CHAT = {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]}
GOOD = {"mrcr": MRCR, "questions": QUESTION, "needle": NEEDLE, "chats": CHAT}


def test_published_format():
    """The prompt is JSON in a string; a list will do as well. More fields than are needed do no harm."""
    lines = [json.dumps(MRCR), "", json.dumps(MRCR | {"prompt": ASK})]
    one, two = read_set("mrcr", lines)
    assert (one.id, two.id) == (1, 3) and one.messages == two.messages == tuple(ASK)
    assert (one.answers, one.prefix, one.series, one.length) == (("x1Tapir!",), "x1", 2, None)
    text, stops = one.plain()
    assert text.startswith("User: Write a poem about tapirs\n\nAssistant: Tapir!\n\nUser: Prepend")
    assert text.endswith("\n\nAssistant:") and stops == ("\n\nUser:",)


def test_question_sets():
    (question,) = read_set("questions", [json.dumps(QUESTION)])
    assert (question.id, question.length, question.answers) == ("q7", 131072, ("Two",))
    (message,) = question.messages
    assert message["content"].startswith("Document 1:\nOne.\n\nDocument 2:\nTwo.\n\nQuestion: Which?\n")
    (question,) = read_set("questions", ['{"context": "One.", "question": "Which?", "answers": ["a", "b"], "id": 5}'])
    assert question.messages[0]["content"].startswith("One.\n\nQuestion") and question.id == 5


@pytest.mark.parametrize(
    ("task", "change", "sentence"),
    [
        ("mrcr", {"prompt": "[{"}, '"prompt" is not JSON'),
        ("mrcr", {"prompt": []}, r'"prompt" is \[\]'),
        ("mrcr", {"prompt": [*ASK[:1], {"role": "model"}]}, 'message 2 of "prompt" has no role out of system, user'),
        ("mrcr", {"prompt": ASK[:2]}, '"prompt" does not end with the user'),
        ("mrcr", {"n_needles": "2"}, '"n_needles" is "2"'),
        ("mrcr", {"n_needles": 0}, '"n_needles" is 0'),
        ("mrcr", {"random_string_to_prepend": None}, '"random_string_to_prepend" is null'),
        ("questions", {"context": "x"}, 'it has both "context" and "documents"'),
        ("questions", {"documents": "x"}, '"documents" is no list of texts'),
        ("questions", {"answers": ["x"]}, 'it has both "answer" and "answers"'),
        ("questions", {"answer": " "}, '"answer" is " "'),
        ("questions", {"length": "128K"}, '"length" is "128K"'),
        ("needle", {"depth": 2}, '"depth" is 2'),
        ("needle", {"prompt": ASK}, 'it has both "text" and "prompt"'),
        ("needle", {"answer": 12}, '"answer" is 12'),
        ("chats", {"answers": []}, '"answers" is no list of texts'),
        ("chats", {"messages": CHAT["messages"][:1]}, 'it has neither "answer" nor "answers"'),
        ("chats", {"messages": "x"}, 'it has neither "answer" nor "answers"'),
    ],
)
def test_lines_that_are_no_questions(task, change, sentence):
    good = GOOD[task]
    with pytest.raises(SetError, match=rf"^line 2 is no question: {sentence}.*; expected "):
        read_set(task, [json.dumps(good), json.dumps(good | change)])


@pytest.mark.parametrize("task", TASKS)
def test_fields_that_are_missing(task):
    good = GOOD[task]
    read_set(task, [json.dumps(good)])
    needed = {"prompt", "n_needles", "random_string_to_prepend", "text", "depth", "documents", "question", "messages"}
    for field in needed & {*good}:
        with pytest.raises(SetError, match=f'^line 1 is no question: .*"{field}"'):
            read_set(task, [json.dumps({key: value for key, value in good.items() if key != field})])
    with pytest.raises(SetError, match="line 1 is not JSON"):
        read_set(task, ['{"answer":'])
    with pytest.raises(SetError, match="line 1 is no question: it is a list"):
        read_set(task, ["[]"])
    with pytest.raises(SetError, match="there are no questions; expected lines with"):
        read_set(task, ["", " "])
