from __future__ import annotations

import re

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from onnxsqueeze.errors import without_paths


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ('File "/opt/lib/python3/x.py", line 12, in fit', 'File "x.py", line 12, in fit'),
        ("Load model from /tmp/a b/model.onnx failed:Protobuf", "Load model from a b/model.onnx failed:Protobuf"),
        ("/onnxruntime_src/core/model.cc:182 onnxruntime::Model", "model.cc:182 onnxruntime::Model"),
        ("--set model=/home/alice/x --data-dir ~/glue ~bob/y", "--set model=x --data-dir glue y"),
        ("in /home/alice/x/, or (see /var/log).", "in x, or (see log)."),
        ("/a/b:/c/d,/e/f //server/g", "b:d,f g"),
        ("RuntimeError('no file\\n/home/alice/x')", "RuntimeError('no file\\nx')"),
        ("file:///home/alice/x and file://localhost/home/x", "file:x and file:x"),
        ("see https://example.org/a/b?c=/d, /home/alice", "see https://example.org/a/b?c=/d, alice"),
    ],
)
def test_of_an_absolute_path_in_a_text_the_last_part_is_left(text: str, left: str) -> None:
    assert without_paths(text) == left


NAMES = st.text("abcXYZ019äж_.-+@#%()[]:,=", min_size=1, max_size=8).filter(
    lambda name: any(c.isalnum() for c in name) and name[-1] not in ":,=(["
)
PATHS = st.builds(
    lambda start, parts: start + "/".join(parts), st.sampled_from(["/", "~/", "~bob/"]), st.lists(NAMES, min_size=1, max_size=6)
)
PLAIN = "int8/uint8 s/2 1/4 (a+b)/2 x[0]/2 +/- / // runs/a/b ./a ../a **/x.py and/or <s> </s> https://x.org/a/b s3://b/c C++ 12:30 'a' \n"
AROUND = ["{}", "'{}'", 'File "{}", line 3', "`{}`", "<{}>", "({}", "[{}", "k={} ", "k:{} ", "a,{} ", "→{}", "{};", "{}\n{}", "x\\n{}"]


@example("/home/0", "<{}>", [])
@given(PATHS, st.sampled_from(AROUND), st.lists(st.sampled_from(PLAIN.split(" "))))
def test_wherever_a_path_stands_its_folders_go_and_all_else_stays(path: str, around: str, words: list[str]) -> None:
    assume(not re.fullmatch(r"</\w+>", around.replace("{}", path)))  # a closing tag, and as a path without a folder
    plain = " ".join(words)
    assert without_paths(plain) == plain
    expected = f"{plain} {around.replace('{}', path.rpartition('/')[2])} {plain}"
    assert without_paths(f"{plain} {around.replace('{}', path)} {plain}") == expected
