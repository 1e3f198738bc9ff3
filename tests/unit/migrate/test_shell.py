"""Reading shell text: what bash would hand to the program. Where bash is there, it is asked."""

import shutil
import subprocess

import pytest

from diffsynth_ray.errors import JobFileError
from diffsynth_ray.migrate.shell import read_script

AS_BASH = [
    "show a 'b c' \"d e\" f\\ g",
    "show a \\\n  b \\\n  c",
    "show a\\\n  b",
    "show a\\\nb",
    "show a # b \\\nshow c",
    "show a `# the first` \\\n  b`#x` `# and` c",
    "show 'a # b' a#b",
    'show "it\'s" \'say "x"\'',
    'show "a \\" b \\\\ c \\d" \'\\n\'',
    'show "a\\\nb"',
    "show ''",
    'X=1; show $X ${X} "$X" \'$X\' ${Y:-two} "${Y:-three four}" ${Y-five}',
    'ARGS="--a 1  --b"; show $ARGS "$ARGS" x$ARGS',
    'A=(--a "b c"\n --d # no\n); A+=(e); show "${A[@]}" f',
    "show a > out.txt 2>&1",
    "show a 2>/dev/null b &>/dev/null",
    "show a && show b || show c; show d",
    "show a | cat > /dev/null",
    "show a <<END\nshow not this\nEND\nshow b",
    'show --x=\'["a", ["b"]]\'',
    "export Z=9\nshow $Z",
    "if true; then show a; fi",
    "show $ a$",
    "show {a} }",
    "time show a",
    'ARGS="--a 1"; ARGS+=" --b 2"; show $ARGS',
    'X="a b"; Y=$X; export Z=$X; show "$Y" "$Z"',
    'A=(a "b c"); Y="${A[*]}"; show "$Y" "${A[*]}"',
    'X=; show "${X:-two}" "${X-two}"; unset X; show "${X-three}"',
    'Z=/d; show ${Y:-${Z}/e} "${Y:-"f g"}" "${Y:-{\\"a\\":1\\}}"',
    "show $'a\\tb\\'c' $'d'",
    "declare -a B=(c d); show a",
]


@pytest.mark.parametrize("text", AS_BASH)
def test_words_are_those_that_bash_hands_over(text: str, tmp_path) -> None:
    found = [list(each.words[1:]) for each in read_script(text, source="x", environment={}).commands if each.words[0] == "show"]
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    prefix = 'show() { local a; for a in "$@"; do printf "%s\\0" "$a"; done >> shown; printf "\\1" >> shown; }\n'
    # `|| show c` does not run after a success: every branch is read.
    subprocess.run([bash, "-c", prefix + text.replace("|| show c", "; show c")], cwd=tmp_path, check=True, timeout=100)
    said = (tmp_path / "shown").read_text().split("\1")[:-1]
    assert found == [each.split("\0")[:-1] for each in said]


def read(text: str, **environment: str):
    return read_script(text, source="train.sh", environment=environment)


@pytest.mark.parametrize("text", ["${X%.csv}", "${X/a/b}", "${A[1]}", "${#X}", "${X:=a}", "${X:?}"])
def test_expansions_that_are_not_followed_are_noted(text: str) -> None:
    script = read(f"X=a.csv\nshow --x {text}")
    assert script.commands[0].words == ("show", "--x", text)
    assert script.notes == [f"line 2: {text} is an expansion that is not followed; write its value into the job file"]


def test_lines_and_environment_belong_to_the_command() -> None:
    script = read("# first\nexport A=1\n\nB=2 C='3 4' run \\\n x\nrun\n")
    first, second = script.commands
    assert (first.line, first.words, first.environment) == (4, ("run", "x"), {"A": "1", "B": "2", "C": "3 4"})
    assert (second.line, second.environment) == (6, {"A": "1"})
    assert script.notes == []


def test_windows_line_ends_and_byte_order_mark() -> None:
    assert read("\ufeffrun \\\r\n  a\r\n").commands[0].words == ("run", "a")


def test_variables_come_from_the_environment_else_are_kept_and_told() -> None:
    script = read("run $HERE/a ${NOT_THERE}/b $1", HERE="/x")
    assert script.commands[0].words == ("run", "/x/a", "${NOT_THERE}/b", "$1")
    assert [note.split(" has")[0] for note in script.notes] == ["line 1: ${NOT_THERE}", "line 1: $1"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("run a \\  \n  b", "blanks follow the backslash"),
        ("run a # b \\\n  --c", "continues nothing"),
        ("run $(date) `id`", "$(date) is not run"),
        ("for a in 1 2; do\n run $a\ndone", "`for` is not followed"),
        ("# accelerate launch train.py --x\nrun", "a command behind a '#' is left out"),
    ],
)
def test_what_is_not_followed_is_told(text: str, told: str) -> None:
    script = read(text)
    assert any(told in note and note.startswith("line 1") for note in script.notes), script.notes
    assert script.commands[0].words[0] == "run"


def test_blanks_after_a_backslash_do_not_end_the_command() -> None:
    assert read("run a \\  \n  b").commands[0].words == ("run", "a", "b")


@pytest.mark.parametrize("text", ["run\n'a", 'run\n"a', "run\n`a", "run\n$(a", 'run\n"a $(b"'])
def test_an_open_quote_is_an_error_with_its_line(text: str) -> None:
    with pytest.raises(JobFileError, match=r"train.sh.*\n.*line 2: .* not closed"):
        read(text)
