"""Compiled programs in files: whole or not at all, and never more than the limit."""

import os

from jaxinfer.search import program_files


def test_what_is_written_is_read(tmp_path):
    description, blobs = {"name": "n", "numbers": [1, 2.5, None]}, [b"", b"\n\x00code", bytes(range(256)) * 9]
    program_files.write("abc", description, blobs, tmp_path / "programs")
    assert program_files.read("abc", tmp_path / "programs") == (description, blobs)
    program_files.write("abc", {}, [], tmp_path / "programs")
    assert program_files.read("abc", tmp_path / "programs") == ({}, [])


def test_what_is_missing_or_damaged_is_not_read(tmp_path):
    assert program_files.read("abc", tmp_path) is None
    program_files.write("abc", {"a": 1}, [b"code" * 50], tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        assert program_files.read("abc", tmp_path) is None
        file.write_bytes(whole[:place])
        assert program_files.read("abc", tmp_path) is None
    file.write_bytes(whole)
    assert program_files.read("abc", tmp_path) == ({"a": 1}, [b"code" * 50])


def test_a_file_is_read_under_its_own_name_only(tmp_path):
    program_files.write("abc", {}, [b"code"], tmp_path)
    os.rename(tmp_path / "abc", tmp_path / "other")
    assert program_files.read("other", tmp_path) is None


def test_the_files_not_used_for_longest_go(tmp_path):
    blob = os.urandom(1000)
    for age, name in enumerate("abcd"):
        program_files.write(name, {}, [blob], tmp_path)
        os.utime(tmp_path / name, (1000 + age, 1000 + age))
    assert program_files.read("a", tmp_path) is not None
    program_files.write("e", {}, [blob], tmp_path, limit=3500)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "d", "e"}
    program_files.write("f", {}, [os.urandom(4000)], tmp_path, limit=3500)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "d", "e"}, "one too large alone is not kept"


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "programs"
    program_files.write("abc", {}, [b"code"], folder)
    assert program_files.read("abc", folder) is None
