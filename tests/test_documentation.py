"""What README, docs/ and the commands' own help show: commands that parse, options, files and links that exist."""

import ast
import contextlib
import functools
import importlib
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from v4_jax.commands import VERBS, main

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FOREIGN = {"--worker"}  # options of other programs that a text names

named = functools.partial(pytest.mark.parametrize, ids=lambda path: str(path.relative_to(ROOT)))


class Shown(NamedTuple):
    """What a text shows of the command line: its code blocks, line by line, and its code within lines."""

    blocks: list[str]
    inline: list[str]

    @classmethod
    def of(cls, path):
        text = path.read_text().replace("\\\n", " ")
        if path.suffix == ".py":
            return cls(re.findall(r"^ {6}(?=\S)(.*)$", text, flags=re.MULTILINE), [])
        fences = r"```\w*\n(.*?)```"
        blocks = [line for block in re.findall(fences, text, flags=re.DOTALL) for line in block.splitlines()]
        text = re.sub(fences, "", text, flags=re.DOTALL)
        blocks += re.findall(r"^ {4,}(.*)$", text, flags=re.MULTILINE)
        return cls(blocks, re.findall(r"`([^`\n]+)`", re.sub(r"^ {4,}.*$", "", text, flags=re.MULTILINE)))


def commands(lines):
    """The arguments of each `v4-jax VERB ...`."""
    for line in lines:
        for found in re.finditer(r"(?<![\w/-])(?:\.venv/bin/)?v4-jax (?=[a-z])", line):
            rest = line[found.end() :]
            try:
                yield shlex.split(rest, comments=True)
            except ValueError:  # it stands within quotes, which end where the command does
                yield shlex.split(rest.rstrip()[:-1])


def lists_of_words(node: Any) -> Iterator[list]:
    """The lists in YAML, or in a Python program, of texts alone."""
    if isinstance(node, ast.AST):
        for part in ast.walk(node):
            if isinstance(part, ast.List):
                yield from lists_of_words([element.value for element in part.elts if isinstance(element, ast.Constant)])
    elif isinstance(node, dict):
        for part in node.values():
            yield from lists_of_words(part)
    elif isinstance(node, list):
        if node and all(isinstance(part, str) for part in node):
            yield node
        for part in node:
            yield from lists_of_words(part)


def in_other_languages(path):
    """What a page's blocks of YAML and Python hold, which have to parse."""
    for language, block in re.findall(r"```(yaml|python)\n(.*?)```", path.read_text(), flags=re.DOTALL):
        yield from [ast.parse(block)] if language == "python" else yaml.safe_load_all(block)


@pytest.fixture(scope="module")
def options():
    """Options of each verb, from its help."""
    found = {}
    for verb in VERBS:
        with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit):
            main([verb, "--help"])
        found[verb] = set(re.findall(r"--[a-z][\w-]*", said.getvalue()))
    return found


@named("path", [*PAGES, *sorted(ROOT.glob("commands/*.py"))])
def test_commands_parse(path, monkeypatch, capsys):
    """A command in a block is complete: it parses as it stands, with what it would do left out."""
    words = [list_ for block in in_other_languages(path) for list_ in lists_of_words(block)]
    for arguments in [*commands(Shown.of(path).blocks), *(rest for program, *rest in words if program == "v4-jax")]:
        verb = arguments[0]
        assert verb in VERBS, arguments
        module = importlib.import_module(f"v4_jax.commands.{verb}")
        with monkeypatch.context() as context:
            context.setattr(module, verb, functools.wraps(getattr(module, verb))(lambda *_, **__: 0))
            try:
                code = main(arguments)
            except SystemExit as end:
                code = end.code
        assert code == 0, (arguments, capsys.readouterr().err)


@named("path", PAGES)
def test_options_exist(path, options):
    """An option that a text names is one of the command's beside it, or of any command where it stands alone."""
    inline = Shown.of(path).inline
    for arguments in commands(inline):
        assert arguments[0] in VERBS, arguments
        for option in re.findall(r"--[a-z][\w-]*", " ".join(arguments)):
            assert option in options[arguments[0]], arguments
    known = FOREIGN.union(*options.values())
    for code in inline:
        if code.startswith("--"):
            assert re.match(r"--[\w-]+", code)[0] in known, code


@named("path", PAGES)
def test_links_and_programs_exist(path):
    text = path.read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (path.parent / link).exists(), link
    for program in re.findall(r"\bpython ([\w/]+\.py)", text):
        assert (ROOT / program).is_file(), program
