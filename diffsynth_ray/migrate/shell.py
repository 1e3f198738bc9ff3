"""A launch script's text -> its commands, read as bash would, without running anything.

Understood: line continuations, quotes, comments, several commands a line, assignments and `export`, `$NAME` and
`${NAME:-default}`, arrays, redirections, here-documents. What is not followed (loops, command substitution, other
expansions) is noted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from diffsynth_ray.errors import JobFileError, Problem
from diffsynth_ray.migrate.secrets import hide_secrets

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=")
_VARIABLE = re.compile(r"\$([A-Za-z_]\w*|\d|[@*])")
_BRACED = re.compile(r"([A-Za-z_]\w*|\d+|[@*])(\[[@*]\])?(?:(:?)-(.*))?", re.DOTALL)
_DECLARING = ("export", "declare", "local", "readonly")
_LOOPS = {"for", "while", "until", "if", "elif", "case", "select", "function"}
_KEYWORDS = {"then", "do", "else", "{", "!", "time"}
_CLOSINGS = {"fi", "done", "esac", "}"}
_ONLY_A_COMMENT = re.compile(r"`\s*#[^\n]*`")
"""How one comments an option of a command that goes on in the next line: a substitution that gives nothing."""
_COMMENTED_LAUNCH = re.compile(r"#+\s*(?:accelerate\s+launch|torchrun|python3?)\s.*\S")


@dataclass(frozen=True)
class Command:
    """One command."""

    line: int
    """Its first line, from 1."""
    words: tuple[str, ...]
    environment: Mapping[str, str]
    """What is exported before it or assigned in front of it."""

    def shown(self) -> str:
        """The command in one short line, for messages; without secrets."""
        text = " ".join(hide_secrets(self.words))
        return text if len(text) <= 90 else f"{text[:87]}..."


@dataclass
class Script:
    """A script's commands, in order, and what the reader has to tell about it."""

    commands: list[Command] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_script(text: str, *, source: str, environment: Mapping[str, str]) -> Script:
    """Read a script; `environment` gives the values of variables that it does not set itself.

    Raises JobFileError where a quote is not closed.
    """
    reader = _Reader(text.removeprefix("\ufeff").replace("\r\n", "\n"), source=source, environment=environment)
    reader.read()
    return reader.script


class _Reader:
    """Goes through the text once, character by character."""

    def __init__(self, text: str, *, source: str, environment: Mapping[str, str]) -> None:
        self.text, self.source, self.outside = text, source, environment
        self.position = 0
        self.line = 1
        self.script = Script()
        self.variables: dict[str, str] = {}
        self.arrays: dict[str, list[str]] = {}
        self.exported: dict[str, str] = {}
        self.here_documents: list[str] = []
        """Delimiters of here-documents that begin after this line."""
        self._begin_command()

    def _begin_command(self) -> None:
        self.words: list[str] = []
        self.assigned: dict[str, str] = {}
        self.command_line = 0
        self.word: str | None = None
        self.is_plain = True
        """No part of the word is quoted or from a variable: it may be a keyword or an assignment."""
        self.skip_word = False

    def read(self) -> None:
        """Read all commands."""
        while self.position < len(self.text):
            self._read_one(self.text[self.position])
        self._end_command()

    def _read_one(self, char: str) -> None:
        if char == "\\":
            self._escape()
        elif char == "'":
            end = self._find("'", self.position + 1)
            self._add(self.text[self.position + 1 : end], plain=False)
            self._move(end + 1)
        elif char == '"':
            self._double_quoted()
        elif char == "$":
            self._variable(splits=True)
        elif char == "`":
            end = self._find("`", self.position + 1) + 1
            if _ONLY_A_COMMENT.fullmatch(self.text, self.position, end):
                self._move(end)
            else:
                self._substitution(end)
        elif char == "#" and self.word is None:
            self._comment()
        elif char in " \t":
            self._end_word()
            self._move(self.position + 1)
        elif char in "<>":
            self._redirection()
        elif char == "(" and self.word is not None and self.is_plain and _ASSIGNMENT.fullmatch(self.word):
            self._array()
        elif char in "\n;&|()":
            self._separator(char)
        else:
            self._add(char)
            self._move(self.position + 1)

    def _move(self, position: int) -> None:
        self.line += self.text.count("\n", self.position, position)
        self.position = position

    def _find(self, mark: str, start: int) -> int:
        end = self.text.find(mark, start)
        if end < 0:
            raise JobFileError(self.source, [Problem(f"line {self.line}", f"the quote {mark} is not closed")])
        return end

    def _note(self, text: str) -> None:
        self.script.notes.append(f"line {self.line}: {text}")

    def _add(self, text: str, *, plain: bool = True) -> None:
        self.command_line = self.command_line or self.line
        self.word = (self.word or "") + text
        self.is_plain &= plain

    def _escape(self) -> None:
        blanks = re.compile(r"\\[ \t]*\n").match(self.text, self.position)
        if blanks is None:
            self._add(self.text[self.position + 1 : self.position + 2], plain=False)
            self._move(self.position + 2)
            return
        if len(blanks[0]) > 2:
            self._note("blanks follow the backslash, at which bash would end the command; read as a continued line")
            self._end_word()
        self._move(blanks.end())

    def _double_quoted(self) -> None:
        self._add("", plain=False)
        start = self.position
        self.position += 1
        while self.position < len(self.text):
            char = self.text[self.position]
            if char == '"':
                self._move(self.position + 1)
                return
            if char == "\\" and self.text[self.position + 1 : self.position + 2] in ("$", "`", '"', "\\", "\n"):
                escaped = self.text[self.position + 1]
                self._add("" if escaped == "\n" else escaped)
                self._move(self.position + 2)
            elif char == "$":
                self._variable(splits=False)
            elif char == "`":
                self._substitution(self._find("`", self.position + 1) + 1)
            else:
                self._add(char)
                self._move(self.position + 1)
        self.line = 1 + self.text.count("\n", 0, start)
        self._find('"', len(self.text))

    def _comment(self) -> None:
        end = self.text.find("\n", self.position)
        end = len(self.text) if end < 0 else end
        comment = self.text[self.position : end]
        if _COMMENTED_LAUNCH.match(comment):
            words = comment.lstrip("# ").rstrip("\\").split()
            self._note(f"a command behind a '#' is left out: {' '.join(hide_secrets(words))[:80]}")
        if self.words and self.text[end - 1 : end] == "\\":
            self._note("a backslash at the end of a comment continues nothing: the command ends here, as in bash")
        self._move(end)

    def _variable(self, *, splits: bool) -> None:
        """Read what begins with `$`; `splits`: it is not in double quotes."""
        if self.text.startswith("$(", self.position):
            self._substitution(self._closing_parenthesis(self.position + 1))
        elif self.text.startswith("${", self.position):
            self._braced(self._closing_brace(quoted=not splits), splits=splits)
        elif splits and self.text.startswith("$'", self.position):
            self._escaped_quote()
        elif (found := _VARIABLE.match(self.text, self.position)) is not None:
            self._add_value(self._value_of(found[1], found[0], default=None), splits=splits)
            self._move(found.end())
        else:
            self._add("$", plain=False)
            self._move(self.position + 1)

    def _braced(self, end: int, *, splits: bool) -> None:
        written = self.text[self.position : end]
        found = _BRACED.fullmatch(written[2:-1])
        if found is None:
            self._note(f"{written} is an expansion that is not followed; write its value into the job file")
            self._add(written, plain=False)
        elif found[2] and (splits or found[2] == "[@]") and not self._is_assigning():
            self._add_words(self.arrays.get(found[1], []))
        elif found[2]:
            self._add(" ".join(self.arrays.get(found[1], [])), plain=False)
        else:
            self._add_value(self._value_of(found[1], written, default=found[4], also_empty=found[3] == ":"), splits=splits)
        self._move(end)

    def _add_value(self, value: str, *, splits: bool) -> None:
        if splits and not self._is_assigning() and len(parts := value.split()) != 1:
            self._add_words(parts)
        else:
            self._add(value, plain=False)

    def _is_assigning(self) -> bool:
        """Whether the word is the value of a variable, in which blanks separate nothing."""
        may_assign = not self.words or self.words[0] in _DECLARING
        return may_assign and self.word is not None and _ASSIGNMENT.match(self.word) is not None

    def _escaped_quote(self) -> None:
        """`$'...'`, in which a backslash stands for a character that cannot be typed."""
        end = self.position + 2
        while self.text[end : end + 1] not in ("'", ""):
            end += 2 if self.text[end] == "\\" else 1
        end = self._find("'", end)
        escaped = self.text[self.position + 2 : end].encode("latin-1", "backslashreplace")
        self._add(escaped.decode("unicode_escape", "replace"), plain=False)
        self._move(end + 1)

    def _value_of(self, name: str, written: str, *, default: str | None, also_empty: bool = False) -> str:
        """A variable's value; `default` where it has none, or (`also_empty`) an empty one."""
        value = self.variables.get(name, self.outside.get(name))
        if value is None and name in self.arrays:
            value = (self.arrays[name] or [""])[0]
        if default is not None and (value is None or (also_empty and value == "")):
            return " ".join(self._words_of(f"default {default}")[1:])
        if value is None:
            self._note(f"{written} has no value here; set it in the environment of `dsray import`, or in the job file")
            return written
        return value

    def _words_of(self, text: str) -> list[str]:
        """The words of a part of the script, read with the same variables."""
        inner = _Reader(text, source=self.source, environment=self.outside)
        inner.line, inner.variables, inner.arrays = self.line, self.variables, self.arrays
        inner.read()
        self.script.notes += inner.script.notes
        return [word for command in inner.script.commands for word in command.words]

    def _add_words(self, parts: list[str]) -> None:
        for index, part in enumerate(parts):
            if index:
                self._end_word()
            self._add(part, plain=False)

    def _closing_parenthesis(self, start: int) -> int:
        depth = 0
        for index in range(start, len(self.text)):
            depth += {"(": 1, ")": -1}.get(self.text[index], 0)
            if depth == 0:
                return index + 1
        raise JobFileError(self.source, [Problem(f"line {self.line}", "the parenthesis of $( is not closed")])

    def _closing_brace(self, *, quoted: bool) -> int:
        """Behind the brace that closes the `${` at the position; `quoted`: in double quotes, where ' is a character."""
        depth, index = 0, self.position
        while index < len(self.text):
            char = self.text[index]
            if char == "\\":
                index += 1
            elif char == '"' or (char == "'" and not quoted):
                index = self._find(char, index + 1)
            elif self.text.startswith("${", index):
                depth, index = depth + 1, index + 1
            elif char == "}":
                depth -= 1
                if depth == 0:
                    return index + 1
            index += 1
        raise JobFileError(self.source, [Problem(f"line {self.line}", "the brace of ${ is not closed")])

    def _substitution(self, end: int) -> None:
        written = self.text[self.position : end]
        self._note(f"{written} is not run; write its result into the job file")
        self._add(written, plain=False)
        self._move(end)

    def _array(self) -> None:
        assert self.word is not None  # an assignment
        name, plus = _ASSIGNMENT.fullmatch(self.word).groups()  # type: ignore[union-attr]
        end = self._closing_parenthesis(self.position)
        values = self._words_of(self.text[self.position + 1 : end - 1])
        self.arrays[name] = [*(self.arrays.get(name, []) if plus else []), *values]
        self.word, self.is_plain = None, True
        self._move(end)

    def _redirection(self) -> None:
        if self.word is not None and self.word.isdigit() and self.is_plain:
            self.word = None
        self._end_word()
        operator = re.compile(r"<<-?(?!<)|<<<|[<>]&|>>|&>|[<>]").match(self.text, self.position)
        assert operator is not None  # the character is one of < and >
        self._move(operator.end())
        if operator[0] in ("<<", "<<-"):
            word = re.compile(r"[ \t]*(['\"]?)(\w+)\1").match(self.text, self.position)
            if word is not None:
                self.here_documents.append(word[2])
                self._move(word.end())
            return
        self.skip_word = True

    def _separator(self, char: str) -> None:
        if self.text.startswith("&>", self.position):
            self._end_word()
            self._move(self.position + 1)
            return
        self._end_command()
        self._move(self.position + 1)
        if char == "\n":
            for delimiter in self.here_documents:
                end = re.compile(rf"^\t*{re.escape(delimiter)}$", re.MULTILINE).search(self.text, self.position)
                self._move(end.end() if end else len(self.text))
            self.here_documents = []

    def _end_word(self) -> None:
        word, plain = self.word, self.is_plain
        self.word, self.is_plain = None, True
        if word is None:
            return
        if self.skip_word:
            self.skip_word = False
            return
        assignment = _ASSIGNMENT.match(word)
        if not self.words and assignment:
            name, plus = assignment.groups()
            before = self.assigned.get(name, self.variables.get(name, self.outside.get(name, ""))) if plus else ""
            self.assigned[name] = before + word[assignment.end() :]
        elif not self.words and plain and word in _LOOPS:
            self._note(f"`{word}` is not followed: what stands inside is taken once")
            self.words.append(word)
        elif self.words or not plain or word not in _KEYWORDS:
            self.words.append(word)

    def _end_command(self) -> None:
        self._end_word()
        words, assigned, line = self.words, self.assigned, self.command_line
        self._begin_command()
        if not words:
            self.variables.update(assigned)
            return
        if words[0] == "unset":
            for name in words[1:]:
                for known in (self.variables, self.arrays, self.exported):
                    known.pop(name, None)
            return
        if words[0] in _DECLARING:
            for word in words[1:]:
                name, equals, value = word.partition("=")
                if not name.isidentifier():
                    continue  # an option
                self.variables[name] = value if equals else self.variables.get(name, "")
                self.exported[name] = self.variables[name]
            return
        if words[0] in _LOOPS | _CLOSINGS:
            return
        self.script.commands.append(Command(line, tuple(words), {**self.exported, **assigned}))
